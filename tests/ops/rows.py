"""Strategies for ops that work row by row: how many rows there are, how long they are, and how they lie in memory."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

# Powers of two with their neighbours, a length that is no multiple of 8, as 3420 in Qwen2.5-VL, and rows of more than one tile.
WIDTHS = st.one_of(st.integers(1, 300), st.sampled_from([127, 128, 129, 511, 513, 1140, 4097]))


@st.composite
def leading(draw: st.DrawFn, width: int) -> tuple[int, ...]:
    """The axes before the last, one to three of them: no rows, one, a tile of 4096 elements, one row more or less, several tiles."""
    tile = min(max(4096 // width, 1), 32)
    num = draw(st.one_of(st.integers(0, 9), st.sampled_from([tile - 1, tile, tile + 1, 2 * tile + 1])))
    return draw(st.sampled_from([(num,), (num,), (num, 1), (2, num), (num, 3), (2, num, 2)]))


@st.composite
def laid_out(draw: st.DrawFn, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values as a tensor of its own or a slice of a larger one along any axes, as heads are of a fused projection; NaN lies
    beside them. Now and then the axes lie in another order, and elements of a row apart."""
    if not values.numel():
        return values.to(dtype)  # of an empty slice torch's opcheck can make no copy
    axes = list(range(values.dim()))
    order = draw(st.sampled_from([axes, axes, axes, [*axes[-2::-1], axes[-1]], axes[::-1]]))
    beside = [draw(st.sampled_from([0, 0, 8, 3])) for _ in axes]
    wide = torch.full([values.shape[a] + beside[a] for a in order], torch.nan, dtype=dtype)
    inside = wide.permute([order.index(a) for a in axes])
    for a in axes:
        inside = inside.narrow(a, beside[a] // 2, values.shape[a])
    inside.copy_(values)
    return inside
