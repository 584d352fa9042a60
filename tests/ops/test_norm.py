"""rms_norm and layer_norm equal their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import DTYPES, SEEDS, assert_near, normal
from vlmfx.ops.norm import layer_norm, rms_norm


@settings(deadline=None)
@given(
    rows=st.integers(0, 9),
    hidden=st.integers(1, 300),
    seed=SEEDS,
    dtype=DTYPES,
    eps=st.sampled_from([1e-6, 1e-5, 1e-2]),
)
def test_rms_norm(rows, hidden, seed, dtype, eps):
    x, weight = normal(seed, rows, hidden, dtype=dtype), normal(seed + 1, hidden, dtype=dtype)
    out = rms_norm(x, weight, eps)
    assert out.shape == x.shape
    assert out.dtype == dtype
    exact = x.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + eps).sqrt()
    assert_near(out, exact * weight.double())


@settings(deadline=None)
@given(rows=st.integers(1, 9), hidden=st.integers(2, 300), seed=SEEDS, dtype=DTYPES)
def test_layer_norm(rows, hidden, seed, dtype):
    x, weight, bias = (
        normal(seed + i, *shape, dtype=dtype) for i, shape in enumerate([(rows, hidden), (hidden,), (hidden,)])
    )
    out = layer_norm(x, weight, bias, 1e-5)
    exact = x.double()
    exact = (exact - exact.mean(-1, keepdim=True)) / (exact.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert out.dtype == dtype
    assert_near(out, exact * weight.double() + bias.double())


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_rms_norm_does_not_depend_on_the_rows_beside(scale):
    x = normal(0, 8, 64) * scale
    weight = normal(1, 64)
    together = rms_norm(x, weight, 1e-6)
    apart = torch.cat([rms_norm(row[None], weight, 1e-6) for row in x])
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-6)
