"""add_rms_norm: kernels equal the reference; what else is in the batch never shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.kernels import IS_INTERPRETED, Kernel, Mutant, assert_equal, kernels_of
from tests.ops.rows import WIDTHS, laid_out, leading
from tests.strategies import DTYPES, SCALES, SEEDS, normal
from vlmfx.errors import ShapeError
from vlmfx.ops import rms_norm
from vlmfx.ops.add_rms_norm import OP, add_rms_norm, reference

MUTANTS = [
    Mutant("triton/add_rms_norm.py", "& (col < HIDDEN)", "& (col < HIDDEN - 1)"),
    Mutant("triton/add_rms_norm.py", "(row < num_rows)", "(row < num_rows - 1)"),
    Mutant("triton/add_rms_norm.py", "(row, X_INNER, X_OUTER, X_STRIDE)", "(row, X_INNER, HIDDEN * X_INNER, X_STRIDE)"),
    Mutant("triton/add_rms_norm.py", "(row, R_INNER, R_OUTER, R_STRIDE)", "(row, R_INNER, R_OUTER, 0)"),
    Mutant("triton/add_rms_norm.py", "v32 = added.to", "v32 = a.to"),
    Mutant("triton/add_rms_norm.py", "/ HIDDEN + eps", "/ BLOCK + eps"),
    Mutant("mlu/kernels/rms_norm.mlu", "added + half_of, input + half_of", "input + half_of, input + half_of"),
    Mutant(
        "mlu/kernels/rms_norm.mlu", "sum + half_of, row_bytes, NRAM2GDRAM", "added + half_of, row_bytes, NRAM2GDRAM"
    ),
]
HALF = settings(max_examples=50)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, ...]:
    """As rms_norm's; x and the residual lie each in its own way."""
    hidden, seed, dtype, scale = draw(WIDTHS), draw(SEEDS), draw(DTYPES), draw(SCALES)
    shape = (*draw(leading(hidden)), hidden)
    x, residual = (draw(laid_out(normal(seed + i, *shape) * scale, dtype)) for i in range(2))
    return x, residual, normal(seed + 2, hidden, dtype=dtype), draw(st.sampled_from([1e-6, 1e-5, 1e-2]))


def check(kernel: Kernel, case: tuple[Any, ...]) -> None:
    """The kernel gives what the reference gives: the sum, to the bit, and its norm; elements side by side."""
    x, _, weight, eps = case
    normed, total = kernel(*case)
    _, right = reference(*case)
    assert_equal(OP, (normed, total), (rms_norm.reference(total, weight, eps), right))
    if not (IS_INTERPRETED and x.dtype == torch.bfloat16):  # which the interpreter rounds towards 0
        assert torch.equal(total, right)
    assert normed.is_contiguous()
    assert total.is_contiguous()


def mlu_case() -> tuple[tuple[Any, ...], dict[str, int]]:
    """A prefill of 512 tokens of Qwen2-VL-7B, and what the kernel's count by hand names."""
    x, residual = (normal(i, 512, 3584, dtype=torch.float16) for i in range(2))
    return (x, residual, normal(2, 3584, dtype=torch.float16), 1e-6), {"rows": 512, "hidden": 3584, "residual": 1}


@pytest.mark.parametrize("kernel", kernels_of(OP))
@given(case=cases())
def test_kernel_equals_reference(kernel, case):
    check(kernel, case)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@HALF
@given(case=cases(), pad=st.integers(0, 7))
def test_padding_never_shows(kernel, case, pad):
    x, residual, weight, eps = case
    nan = x.new_full((pad, *x.shape[1:]), torch.nan)
    padded = kernel(torch.cat([x, nan]), torch.cat([residual, nan]), weight, eps)
    for mine, right in zip(padded, kernel(x, residual, weight, eps), strict=True):
        assert torch.equal(mine[: len(x)], right)


def test_wrong_inputs_are_named():
    x, weight = torch.ones(3, 8), torch.ones(8)
    with pytest.raises(ShapeError, match=r"residual has shape \(2, 8\) but needs shape \(3, 8\)"):
        add_rms_norm(x, x[:2], weight, 1e-6)
    with pytest.raises(ShapeError, match=r"residual has torch.float16 but needs torch.float32"):
        add_rms_norm(x, x.half(), weight, 1e-6)
    with pytest.raises(ShapeError, match=r"weight has shape \(7,\) but needs shape \(8,\)"):
        add_rms_norm(x, x, weight[:7], 1e-6)
    with pytest.raises(ShapeError, match=r"weight has torch.float16 but needs torch.float32"):
        add_rms_norm(x, x, weight.half(), 1e-6)
