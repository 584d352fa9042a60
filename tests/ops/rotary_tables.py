"""Strategy for rotary tables of every kind that the models make, by the functions that make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import SEEDS
from vlmfx.models.rope import LongRope, rope
from vlmfx.models.vit import rope_2d
from vlmfx.ops.rotary import RotaryTable

FURTHEST = 200  # a float32 angle is exact to 1e-5 of a turn there


@dataclass(frozen=True)
class Config:
    """What `rope` looks at."""

    head_dim: int
    rope_theta: float = 10000.0
    mrope_section: tuple[int, ...] = ()
    mrope_interleaved: bool = False
    long_rope: LongRope | None = None


@st.composite
def rotary_tables(draw: st.DrawFn, tokens: int, head_dim: int, dtype: torch.dtype) -> RotaryTable:
    """Plain, M-RoPE by sections, M-RoPE interleaved, or of a picture's rows and columns (which splits the pairs in two)."""
    half, g = head_dim // 2, torch.Generator().manual_seed(draw(SEEDS))
    kinds = ["plain", "sections", "interleaved", *(["rows and columns"] if half % 2 == 0 else [])]
    kind = draw(st.sampled_from(kinds))
    if kind == "plain":
        return rope(Config(head_dim), torch.randint(0, FURTHEST, (tokens,), generator=g), dtype)
    if kind == "rows and columns":
        table = rope_2d(head_dim, torch.randint(0, FURTHEST, (tokens, 2), generator=g))
        return RotaryTable(table.cos.to(dtype), table.sin.to(dtype))
    height, width = draw(st.integers(0, half // 3)), draw(st.integers(0, half // 3))
    cfg = Config(head_dim, 1e6, (half - height - width, height, width), kind == "interleaved")
    return rope(cfg, torch.randint(0, FURTHEST, (3, tokens), generator=g), dtype)


def heads_of(fused: Tensor, first: int, num: int) -> Tensor:
    """These heads of (tokens, heads, head_dim), a view; of no token one of its own, as opcheck cannot copy an empty view."""
    return fused.narrow(1, first, num) if len(fused) else fused.new_empty(0, num, fused.shape[2])


def table_dtypes(dtype: torch.dtype) -> Any:
    """float32, as the towers have it, or the heads' own, as the decoders do."""
    return st.sampled_from([torch.float32, dtype])
