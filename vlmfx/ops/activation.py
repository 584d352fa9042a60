"""Activations by the names that checkpoints use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfx.ops.registry import Cost, nbytes, refuse, register, wide


def quick_gelu(x: Tensor) -> Tensor:
    """x·sigmoid(1.702 x), CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


def activation(x: Tensor, kind: str) -> Tensor:
    """x (..., width) → x's shape and dtype, by a kind of ACTIVATIONS; computed in float32 and rounded once. Raises ShapeError."""
    return OP(x, kind)


def reference(x: Tensor, kind: str) -> Tensor:
    """The definition of right."""
    return ACTIVATIONS[kind](wide(x)).to(x.dtype)


def cpu(x: Tensor, kind: str) -> Tensor:
    """torch's own; it also computes the fused ones in float32, and quick_gelu, which is three of its ops, in x's dtype."""
    return ACTIVATIONS[kind](x).contiguous()


def check(x: Tensor, kind: str) -> None:
    """Raise ShapeError for what the kernels do not take."""
    if kind not in ACTIVATIONS:
        refuse("activation", "kind", repr(kind), f"one of {', '.join(ACTIVATIONS)}")
    if not x.dim():
        refuse("activation", "x", x.shape, "at least one axis")
    if not x.is_floating_point():
        refuse("activation", "x", x.dtype, "a floating-point dtype")


OP = register(
    "activation(Tensor x, str kind) -> Tensor",
    reference=reference,
    cpu=cpu,
    fake=lambda x, kind: torch.empty_like(x, memory_format=torch.contiguous_format),
    check=check,
    cost=lambda x, kind: Cost(flops=10 * x.numel(), bytes=nbytes(x, x)),
    kernels={"cuda": "triton.activation"},
    tolerance={torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
    is_inline=True,
)
