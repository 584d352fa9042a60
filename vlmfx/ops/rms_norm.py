"""RMS norm over the last axis, as Llama, Qwen2 and Phi-3 use it."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfx.ops.registry import Cost, nbytes, refuse, register, wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., hidden), weight (hidden,) → x's shape and dtype; eps is added to the mean square.

    Statistics are float32; x is rounded to its own dtype before the weight multiplies it, as in huggingface/transformers:
    src/transformers/models/llama/modeling_llama.py. Raises ShapeError."""
    return OP(x, weight, eps)


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition of right."""
    x32 = wide(x)
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Layer norm is one kernel on the CPU; of x beside −x the mean is 0 and the variance is x's mean square."""
    size = x.shape[-1]
    return torch.layer_norm(torch.cat((x, -x), -1), (2 * size,), None, None, eps).narrow(-1, 0, size) * weight


def check(x: Tensor, weight: Tensor, eps: float) -> None:
    """Raise ShapeError for what the kernels do not take."""
    if weight.dim() != 1 or weight.shape != x.shape[-1:]:
        refuse("rms_norm", "weight", weight.shape, f"shape {tuple(x.shape[-1:])}, the last of x")
    if weight.dtype != x.dtype:
        refuse("rms_norm", "weight", weight.dtype, f"{x.dtype}, as x has")


OP = register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    reference=reference,
    cpu=cpu,
    fake=lambda x, weight, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
    check=check,
    cost=lambda x, weight, eps: Cost(flops=4 * x.numel(), bytes=nbytes(x, x, weight)),
    kernels={"cuda": "triton.rms_norm"},
    tolerance={torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
    is_inline=True,
)
