"""Layer norm over the last axis, as the vision towers use it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfx.ops.registry import Cost, nbytes, refuse, register, wide


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (..., hidden), weight and bias (hidden,) → x's shape and dtype; eps is added to the variance.

    Computed in float32 and rounded once, as torch does. Raises ShapeError."""
    return OP(x, weight, bias, eps)


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The definition of right."""
    x32 = wide(x)
    centred = x32 - x32.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normed * wide(weight) + wide(bias)).to(x.dtype)


def cpu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """torch's own, a single kernel."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def check(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Raise ShapeError for what the kernels do not take."""
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.dim() != 1 or vector.shape != x.shape[-1:]:
            refuse("layer_norm", name, vector.shape, f"shape {tuple(x.shape[-1:])}, the last of x")
        if vector.dtype != x.dtype:
            refuse("layer_norm", name, vector.dtype, f"{x.dtype}, as x has")


OP = register(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    reference=reference,
    cpu=cpu,
    fake=lambda x, weight, bias, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
    check=check,
    cost=lambda x, weight, bias, eps: Cost(flops=7 * x.numel(), bytes=nbytes(x, x, weight, bias)),
    kernels={"cuda": "triton.layer_norm"},
    tolerance={torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
    is_inline=True,
)
