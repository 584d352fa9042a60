"""Rotary position embedding of the half-split kind, from angle tables to rotated heads.

One form of table serves plain positions, M-RoPE by sections or interleaved, and the rows and columns of a picture: what differs is
only which position turns which pair, and that is settled when the angles are made."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlmfx.ops.registry import Cost, nbytes, refuse, register, wide


class RotaryTable(NamedTuple):
    """cos and sin of one step, both (tokens, head_dim); both halves of cos are equal, and so are those of sin but for the first
    half's sign, which is rotate_half's minus."""

    cos: Tensor
    sin: Tensor


def rotary_table(angles: Tensor, dtype: torch.dtype) -> RotaryTable:
    """The table of angles (tokens, head_dim/2), which must be float32: bfloat16 rounds position 257 to 256."""
    both = torch.cat((-angles, angles), -1)
    return RotaryTable(both.cos().to(dtype), both.sin().to(dtype))


def rotary(x: Tensor, table: RotaryTable) -> Tensor:
    """x (tokens, heads, head_dim) with dimension i turned against i + head_dim/2 by the token's angle, in x's dtype.

    x·cos + rotate_half(x)·sin, where rotate_half([a, b]) = [-b, a] is a roll by half once sin carries the sign. x may hold the heads
    of q beside those of k, and be a slice of a wider projection. The table is float32 or of x's dtype. Raises ShapeError.
    Source: arXiv:2104.09864; huggingface/transformers: src/transformers/models/llama/modeling_llama.py."""
    return OP(x, table.cos, table.sin)


def inverse_frequencies(dim: int, theta: float, device: torch.device, factors: Tensor | None = None) -> Tensor:
    """theta^(-2i/dim) for i < dim/2, float32: the angle a position adds to each pair, divided by factors (..., dim/2) float32."""
    periods = theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    # Multiplied before the division, as in the references: another rounding is 3e-4 of a turn's cosine at position 131,071.
    if factors is not None:
        periods = factors * periods
    return 1.0 / periods


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition of right: in float32, rounded once."""
    x32, cos32, sin32 = wide(x), wide(cos[:, None]), wide(sin[:, None])
    return (x32 * cos32 + x32.roll(x.shape[-1] // 2, -1) * sin32).to(x.dtype)


def cpu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In the table's dtype: with a 16-bit table the product is rounded before the sum is."""
    turned = torch.addcmul(x * cos.unsqueeze(1), x.roll(x.shape[-1] // 2, -1), sin.unsqueeze(1))
    return turned.to(x.dtype)


def check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ShapeError for what the kernels do not take."""
    if x.dim() != 3 or x.shape[2] % 2:
        refuse("rotary", "x", x.shape, "shape (tokens, heads, head_dim), with head_dim an even number")
    check_table("rotary", x, cos, sin)


def check_table(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ShapeError unless cos and sin are the table of x (tokens, heads, head_dim)."""
    tokens, _, head_dim = x.shape
    for name, part in (("cos", cos), ("sin", sin)):
        if part.shape != (tokens, head_dim):
            refuse(op, name, part.shape, f"shape ({tokens}, {head_dim}), tokens and head_dim")
        if part.dtype != torch.float32 and part.dtype != x.dtype:
            refuse(op, name, part.dtype, f"torch.float32 or {x.dtype}, as the heads have")
    if sin.dtype != cos.dtype:
        refuse(op, "sin", sin.dtype, f"{cos.dtype}, as cos has")


OP = register(
    "rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    reference=reference,
    cpu=cpu,
    fake=lambda x, cos, sin: torch.empty_like(x, memory_format=torch.contiguous_format),
    check=check,
    cost=lambda x, cos, sin: Cost(flops=3 * x.numel(), bytes=nbytes(x, x) + nbytes(cos, sin) // 2),
    kernels={"cuda": "triton.rotary"},
    tolerance={torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
    is_inline=True,
)
