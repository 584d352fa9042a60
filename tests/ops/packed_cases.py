"""Strategies for packed heads: q, k and v as they leave a projection, with padding that holds NaN."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.kernels import Kernel, assert_equal
from tests.strategies import SEEDS, normal
from vlmfx.ops.registry import Op

# One part, two, and two of which the second is not full; below a product's least width; the widest that models here have.
HEAD_DIMS = st.sampled_from([80, 72, 64, 16, 8, 24, 96, 128])


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def starts_of(lengths: Sequence[int]) -> Tensor:
    """cu_seqlens of segments of these lengths."""
    return int32([0, *accumulate(lengths)])


@st.composite
def heads(draw: st.DrawFn, rows: int, pad: int, counts: list[int], head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Normal numbers, (rows + pad, count, head_dim) for each count, each a tensor of its own or all slices of one; NaN in the pad
    rows and beside the slices. Elements lie side by side, mostly."""
    seed, kind = draw(SEEDS), draw(st.sampled_from(["apart", "fused", "fused", "wide", "spread"]))
    if kind == "apart" or not rows + pad:  # torch's check of schemas cannot copy a slice without elements
        found = [normal(seed + i, rows + pad, count, head_dim, dtype=dtype) for i, count in enumerate(counts)]
    elif kind == "spread":
        found = [
            normal(seed + i, rows + pad, count, head_dim, 2, dtype=dtype)[..., 0] for i, count in enumerate(counts)
        ]
    else:
        width = head_dim + (8 if kind == "wide" else 0)
        fused = normal(seed, rows + pad, sum(counts) + 1, width, dtype=dtype)
        fused[..., head_dim:] = torch.nan
        fused[:, -1] = torch.nan
        found = list(fused[..., :head_dim].split([*counts, 1], 1))[:-1]
    for tensor in found:
        tensor[rows:] = torch.nan
    return found


def tiny(dtype: torch.dtype) -> float:
    """A power of two by which normal numbers still have their digits, or in float16 most of them."""
    return 2.0**-10 if dtype == torch.float16 else 2.0**-100


def assert_same(op: Op, kernel: Kernel, got: Tensor, expected: Tensor) -> None:
    """To the bit, but for the CPU kernel, which adds up in another order where segments of one length share a call."""
    if kernel.name == "cpu":
        assert_equal(op, got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
