"""layer_norm: kernels equal the reference; the rows' mean, what else is in the batch, never show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.kernels import Kernel, Mutant, assert_equal, kernels_of
from tests.ops.rows import WIDTHS, laid_out, leading
from tests.strategies import DTYPES, SCALES, SEEDS, normal
from vlmfx.errors import ShapeError
from vlmfx.ops.layer_norm import OP, layer_norm, reference

MUTANTS = [
    Mutant("triton/layer_norm.py", "& (col < HIDDEN)", "& (col < HIDDEN - 1)"),
    Mutant("triton/layer_norm.py", "(row < num_rows)", "(row < num_rows - 1)"),
    Mutant("triton/layer_norm.py", "(row, INNER, OUTER_STRIDE, INNER_STRIDE)", "(row, INNER, OUTER_STRIDE, 0)"),
    Mutant("triton/layer_norm.py", "tl.where(col < HIDDEN, v32 - mean, 0.0)", "v32 - mean"),
    Mutant("triton/layer_norm.py", "/ HIDDEN + eps", "/ HIDDEN"),
    Mutant("triton/layer_norm.py", "mean = tl.sum(v32, axis=1, keep_dims=True) / HIDDEN", "mean = 0.0"),
    Mutant("triton/layer_norm.py", "+ b.to(tl.float32)", "- b.to(tl.float32)"),
    Mutant("mlu/kernels/layer_norm.mlu", "    if (step < mine) {", "    if (step < mine - 1) {"),
    Mutant("mlu/kernels/layer_norm.mlu", "i = hidden - last; i < HALVES", "i = hidden - last + 1; i < HALVES"),
    Mutant("mlu/kernels/layer_norm.mlu", "        if (padded > hidden) __bang_mul(values + last, values + last, mask, HALVES);\n", ""),
    Mutant("mlu/kernels/layer_norm.mlu", "padded) / hidden, padded);", "padded) / padded, padded);"),
    Mutant("mlu/kernels/layer_norm.mlu", "sqrtf(variance + eps)", "sqrtf(variance)"),
    Mutant("mlu/kernels/layer_norm.mlu", "to_float(biases, input + tile, padded)", "to_float(biases, input, padded)"),
    Mutant("mlu/kernels/layer_norm.mlu", "weights, biases, num * padded, padded)", "weights, biases, padded, padded)"),
]  # fmt: skip
HALF = settings(max_examples=50)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, ...]:
    """No rows, odd widths, rows that lie apart, huge and tiny values, a mean that is not 0."""
    # Of one number, and of two that are nearly alike, the norm is what rounding left of the mean, divided by the root of eps.
    hidden, seed, dtype, scale = draw(WIDTHS.filter(lambda n: n > 2)), draw(SEEDS), draw(DTYPES), draw(SCALES)
    values = normal(seed, *draw(leading(hidden)), hidden) + draw(st.sampled_from([0.0, 2.0]))
    weight, bias = (normal(seed + i, hidden, dtype=dtype) for i in (1, 2))
    return draw(laid_out(values * scale, dtype)), weight, bias, draw(st.sampled_from([1e-6, 1e-5, 1e-2]))


def check(kernel: Kernel, case: tuple[Any, ...]) -> None:
    """The kernel gives what the reference gives, and its elements side by side."""
    out = kernel(*case)
    assert_equal(OP, out, reference(*case))
    assert out.is_contiguous()


def mlu_case() -> tuple[tuple[Any, ...], dict[str, int]]:
    """1024 patches in Qwen2-VL's vision tower, and what the kernel's count by hand names."""
    x, weight, bias = (normal(i, *shape, 1280, dtype=torch.float16) for i, shape in enumerate([(1024,), (), ()]))
    return (x, weight, bias, 1e-6), {"rows": 1024, "hidden": 1280}


@pytest.mark.parametrize("kernel", kernels_of(OP))
@given(case=cases())
def test_kernel_equals_reference(kernel, case):
    check(kernel, case)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@HALF
@given(case=cases(), pad=st.integers(0, 7))
def test_padding_never_shows(kernel, case, pad):
    x, weight, bias, eps = case
    padded = torch.cat([x, x.new_full((pad, *x.shape[1:]), torch.nan)])
    assert torch.equal(kernel(padded, weight, bias, eps)[: len(x)], kernel(x, weight, bias, eps))


@pytest.mark.parametrize("kernel", kernels_of(OP))
@HALF
@given(rows=st.integers(1, 5), hidden=st.integers(2, 300), seed=SEEDS, shift=st.integers(-1000, 1000))
def test_the_mean_never_shows(kernel, rows, hidden, seed, shift):
    """Of whole numbers, whose shift is exact: a variance from the mean of squares would cancel."""
    x = torch.randint(-9, 10, (rows, hidden), generator=torch.Generator().manual_seed(seed)).float()
    weight, bias = normal(seed + 1, hidden), normal(seed + 2, hidden)
    torch.testing.assert_close(
        kernel(x + shift, weight, bias, 1e-2), kernel(x, weight, bias, 1e-2), atol=5e-3, rtol=1e-3
    )


def test_wrong_inputs_are_named():
    x, weight, bias = torch.ones(3, 8), torch.ones(8), torch.ones(8)
    with pytest.raises(ShapeError, match=r"weight has shape \(7,\) but needs shape \(8,\)"):
        layer_norm(x, weight[:7], bias, 1e-6)
    with pytest.raises(ShapeError, match=r"bias has shape \(7,\) but needs shape \(8,\)"):
        layer_norm(x, weight, bias[:7], 1e-6)
    with pytest.raises(ShapeError, match=r"bias has torch.float16 but needs torch.float32"):
        layer_norm(x, weight, bias.half(), 1e-6)
