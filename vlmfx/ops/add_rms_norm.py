"""The residual add and the RMS norm behind it as one op, which reads and writes the residual stream once."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfx.ops import rms_norm
from vlmfx.ops.registry import Cost, nbytes, refuse, register


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x and residual (..., hidden), weight (hidden,) → rms_norm(x + residual) and x + residual, both of x's shape and dtype.

    The sum is rounded to x's dtype before it is normed, as where the two are apart; the norm is ops/rms_norm.py's. Raises ShapeError."""
    return OP(x, residual, weight, eps)


def reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The definition of right."""
    total = x + residual
    return rms_norm.reference(total, weight, eps), total


def cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the reference, with the CPU's norm."""
    total = (x + residual).contiguous()
    return rms_norm.cpu(total, weight, eps), total


def check(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """Raise ShapeError for what the kernels do not take."""
    if residual.shape != x.shape:
        refuse("add_rms_norm", "residual", residual.shape, f"shape {tuple(x.shape)}, as x has")
    if weight.dim() != 1 or weight.shape != x.shape[-1:]:
        refuse("add_rms_norm", "weight", weight.shape, f"shape {tuple(x.shape[-1:])}, the last of x")
    for name, other in (("residual", residual), ("weight", weight)):
        if other.dtype != x.dtype:
            refuse("add_rms_norm", name, other.dtype, f"{x.dtype}, as x has")


def fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Two tensors as x, contiguous."""
    normed, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    return normed, total


OP = register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    reference=reference,
    cpu=cpu,
    fake=fake,
    check=check,
    cost=lambda x, residual, weight, eps: Cost(flops=5 * x.numel(), bytes=nbytes(x, residual, x, x, weight)),
    kernels={"cuda": "triton.add_rms_norm"},
    tolerance={torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
    is_inline=True,
)
