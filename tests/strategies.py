"""Hypothesis strategies that several op tests draw from: random tensors by shape and seed, and how they lie in memory."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

SEEDS = st.integers(0, 2**31)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SCALES = st.sampled_from([1.0, 1.0, 1e-4, 1e3])
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def strided(draw: st.DrawFn, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values, with elements of the last axis side by side, as a tensor of its own or as a slice of one whose rows are wider, as
    q is of a fused projection; NaN lies beside it."""
    before, after = draw(st.sampled_from([(0, 0), (0, 0), (0, 8), (8, 3)]))
    wide = torch.full((*values.shape[:-1], before + values.shape[-1] + after), torch.nan)
    inside = wide.to(dtype).narrow(-1, before, values.shape[-1])
    inside.copy_(values)
    return inside


def assert_near(mine: Tensor, exact: Tensor) -> None:
    """Equal to a float64 reference within the tolerance of mine's dtype."""
    tolerance = TOLERANCE[mine.dtype]
    torch.testing.assert_close(mine.double(), exact, atol=tolerance, rtol=tolerance)
