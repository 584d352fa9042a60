"""rms_norm: kernels equal the reference; what else is in the batch never shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.kernels import Kernel, Mutant, assert_equal, kernels_of
from tests.ops.rows import WIDTHS, laid_out, leading
from tests.strategies import DTYPES, SCALES, SEEDS, normal
from vlmfx.errors import ShapeError
from vlmfx.ops.rms_norm import OP, reference, rms_norm

MUTANTS = [
    Mutant("triton/rms_norm.py", "inside = (row < num_rows) & (col < HIDDEN)", "inside = (row < num_rows) & (col < HIDDEN - 1)"),
    Mutant("triton/rms_norm.py", "inside = (row < num_rows)", "inside = (row < num_rows - 1)"),
    Mutant("triton/rms_norm.py", "(row, INNER, OUTER_STRIDE, INNER_STRIDE)", "(row, INNER, HIDDEN * INNER, INNER_STRIDE)"),
    Mutant("triton/rms_norm.py", "(row, INNER, OUTER_STRIDE, INNER_STRIDE)", "(row, INNER, OUTER_STRIDE, 0)"),
    Mutant("triton/rms_norm.py", "/ HIDDEN + eps", "/ HIDDEN"),
    Mutant("triton/rms_norm.py", "/ HIDDEN + eps", "/ BLOCK + eps"),
    Mutant("mlu/kernels/rms_norm.mlu", "padded) / hidden;", "padded) / padded;"),
    Mutant("mlu/kernels/rms_norm.mlu", "sqrtf(mean + eps)", "sqrtf(mean)"),
    Mutant("mlu/kernels/rms_norm.mlu", "  __bang_write_value(input, 2 * tile, (T)0);", ""),
    Mutant("mlu/kernels/rms_norm.mlu", "step < mine + 2; ++step", "step < mine + 1; ++step"),
    Mutant("mlu/kernels/rms_norm.mlu", "first = (step * taskDim + taskId) * tile_rows", "first = (step * taskDim) * tile_rows"),
]  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, ...]:
    """No rows, odd widths, rows that lie apart, huge and tiny values: where masks and tails go wrong."""
    hidden, seed, dtype, scale = draw(WIDTHS), draw(SEEDS), draw(DTYPES), draw(SCALES)
    x = draw(laid_out(normal(seed, *draw(leading(hidden)), hidden) * scale, dtype))
    return x, normal(seed + 1, hidden, dtype=dtype), draw(st.sampled_from([1e-6, 1e-5, 1e-2]))


def check(kernel: Kernel, case: tuple[Any, ...]) -> None:
    """The kernel gives what the reference gives, and its elements side by side."""
    out = kernel(*case)
    assert_equal(OP, out, reference(*case))
    assert out.is_contiguous()


def mlu_case() -> tuple[tuple[Any, ...], dict[str, int]]:
    """A prefill of 512 tokens of Qwen2-VL-7B, and what the kernel's count by hand names."""
    x, weight = normal(0, 512, 3584, dtype=torch.float16), normal(1, 3584, dtype=torch.float16)
    return (x, weight, 1e-6), {"rows": 512, "hidden": 3584, "residual": 0}


@pytest.mark.parametrize("kernel", kernels_of(OP))
@given(case=cases())
def test_kernel_equals_reference(kernel, case):
    check(kernel, case)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@given(case=cases(), pad=st.integers(0, 7))
def test_padding_never_shows(kernel, case, pad):
    x, weight, eps = case
    padded = torch.cat([x, x.new_full((pad, *x.shape[1:]), torch.nan)])
    assert torch.equal(kernel(padded, weight, eps)[: len(x)], kernel(x, weight, eps))


@pytest.mark.parametrize("kernel", kernels_of(OP))
def test_rows_beyond_2_to_31_elements_are_found(kernel):
    pages = torch.from_numpy(np.zeros(2**31 + 8, np.int16)).view(
        torch.bfloat16
    )  # which no one touches, so they cost nothing
    x = pages.as_strided((3, 8), (2**30, 1))
    x.copy_(normal(0, 3, 8))
    check(kernel, (x, normal(1, 8, dtype=x.dtype), 1e-6))


def test_wrong_inputs_are_named():
    x = torch.ones(3, 8)
    with pytest.raises(ShapeError, match=r"weight has shape \(7,\) but needs shape \(8,\)"):
        rms_norm(x, torch.ones(7), 1e-6)
    with pytest.raises(ShapeError, match=r"weight has torch.float16 but needs torch.float32"):
        rms_norm(x, torch.ones(8).half(), 1e-6)
    with pytest.raises(ShapeError, match=r"weight is on meta but x is on cpu"):
        rms_norm(x, torch.ones(8, device="meta"), 1e-6)
