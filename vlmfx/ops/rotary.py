"""Rotary position embedding of the half-split kind, from angle tables to rotated heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RotaryTable(NamedTuple):
    """cos and sin of one step, both (tokens, 1, head_dim); the first half of sin carries rotate_half's minus sign."""

    cos: Tensor
    sin: Tensor


def rotary_table(angles: Tensor, dtype: torch.dtype) -> RotaryTable:
    """The table of angles (tokens, head_dim/2), which must be float32: bfloat16 rounds position 257 to 256."""
    both = torch.cat((-angles, angles), -1)[:, None]
    return RotaryTable(both.cos().to(dtype), both.sin().to(dtype))


def rotary(x: Tensor, table: RotaryTable) -> Tensor:
    """x (tokens, heads, head_dim) with dimension i turned against i + head_dim/2 by the token's angle.

    x·cos + rotate_half(x)·sin, where rotate_half([a, b]) = [-b, a] is a roll by half once sin carries the sign."""
    turned = torch.addcmul(x * table.cos, x.roll(x.shape[-1] // 2, -1), table.sin)
    return turned.to(x.dtype)


def inverse_frequencies(dim: int, theta: float, device: torch.device, factors: Sequence[float] | None = None) -> Tensor:
    """theta^(-2i/dim) for i < dim/2, float32: the angle a position adds to each pair, which a factor a pair may divide."""
    periods = theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    # Multiplied before the division, as in the references: another rounding is 3e-4 of a turn's cosine at position 131,071.
    if factors is not None:
        periods = torch.tensor(factors, dtype=torch.float32, device=device) * periods
    return 1.0 / periods
