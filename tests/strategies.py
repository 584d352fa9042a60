"""Hypothesis strategies that several op tests draw from: random tensors by shape and seed."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

SEEDS = st.integers(0, 2**31)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(mine: Tensor, exact: Tensor) -> None:
    """Equal to a float64 reference within the tolerance of mine's dtype."""
    tolerance = TOLERANCE[mine.dtype]
    torch.testing.assert_close(mine.double(), exact, atol=tolerance, rtol=tolerance)
