"""activation: kernels equal the reference, and the mathematics, also far from 0."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.kernels import Kernel, Mutant, assert_equal, kernels_of
from tests.ops.rows import WIDTHS, laid_out, leading
from tests.strategies import DTYPES, SCALES, SEEDS, normal
from vlmfx.errors import ShapeError
from vlmfx.ops.activation import ACTIVATIONS, OP, activation, reference

MUTANTS = [
    Mutant("triton/activation.py", "row < num_rows", "row < num_rows - 1"),
    Mutant("triton/activation.py", "(row, INNER, OUTER_STRIDE, INNER_STRIDE)", "(row, INNER, WIDTH * INNER, INNER_STRIDE)"),
    Mutant("triton/activation.py", "(row, INNER, OUTER_STRIDE, INNER_STRIDE)", "(row, INNER, OUTER_STRIDE, 0)"),
    Mutant("triton/activation.py", "t * (-1.593893976e-04", "t * (1.593893976e-04"),
    Mutant("triton/activation.py", "x * x * 0.10294324", "x * x * 0.1048385799"),
    Mutant("triton/activation.py", "x * 2.4554670", "x * 2.45"),
    Mutant("triton/activation.py", "x * 1.4426950", "x"),
    Mutant("triton/activation.py", "x * (root * root)", "x * root"),
    Mutant("mlu/kernels/activation.mlu", "step < mine + 2; ++step", "step < mine + 1; ++step"),
    Mutant("mlu/kernels/activation.mlu", "const int first = (step * taskDim + taskId) * tile;", "const int first = taskId * tile;"),
    Mutant("mlu/kernels/activation.mlu", "  __bang_write_value(input, 2 * tile, (T)0);", ""),
    Mutant("mlu/kernels/activation.mlu", "from_float(output + half_of, values, num)", "from_float(output, values, num)"),
    Mutant("mlu/kernels/activation.mlu", "input + half_of, num);", "input, num);"),
    Mutant("mlu/kernels/activation.h", "-1.702f * LOG2_E", "-1.7f * LOG2_E"),
    Mutant("mlu/kernels/activation.h", "-0.10294324f, -2.3022082f", "-0.1048385799f, -2.3022082f"),
    Mutant("mlu/kernels/activation.h", "square, 0.1048385799f", "square, 0.10294324f"),
    Mutant("mlu/kernels/activation.h", "power, square, -1.593893976e-04f", "power, square, 1.593893976e-04f"),
]  # fmt: skip
KINDS = st.sampled_from(list(ACTIVATIONS))
HALF = settings(max_examples=50)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, ...]:
    """No rows, odd widths, rows that lie apart, several programs, huge and tiny values."""
    width, seed, dtype, scale = draw(WIDTHS), draw(SEEDS), draw(DTYPES), draw(SCALES)
    return draw(laid_out(normal(seed, *draw(leading(width)), width) * scale, dtype)), draw(KINDS)


def check(kernel: Kernel, case: tuple[Any, ...]) -> None:
    """The kernel gives what the reference gives, and its elements side by side."""
    out = kernel(*case)
    assert_equal(OP, out, reference(*case))
    assert out.is_contiguous()


def mlu_case() -> tuple[tuple[Any, ...], dict[str, int]]:
    """512 patches in the MLP of Qwen2-VL's vision tower, and what the kernel's count by hand names."""
    return (normal(0, 512, 5120, dtype=torch.float16), "quick_gelu"), {"count": 512 * 5120, "passes": 5}


@pytest.mark.parametrize("kernel", kernels_of(OP))
@given(case=cases())
def test_kernel_equals_reference(kernel, case):
    check(kernel, case)


DEFINED = {
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_reference_is_the_definition(kind):
    x = torch.linspace(-8, 8, 201, dtype=torch.float64)
    expected = torch.tensor([DEFINED[kind](v) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(reference(x, kind), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("kernel", kernels_of(OP))
def test_it_is_exact_to_float32(kernel, kind):
    """Against float64: a few units in the last place of x, which is what torch's own float32 is good for."""
    x = torch.linspace(-12, 12, 20001)
    error = (kernel(x, kind).double() - ACTIVATIONS[kind](x.double())).abs()
    assert (error / x.abs().clamp(min=1)).max() < 8e-7


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("kernel", kernels_of(OP))
@HALF
@given(seed=SEEDS, scale=SCALES)
def test_what_x_and_minus_x_give_differs_by_x(kernel, kind, seed, scale):
    """x·s(x) + x·s(−x) = x: every kind is x times a function that rises from 0 to 1 and is a half at 0."""
    x = normal(seed, 3, 7) * scale
    torch.testing.assert_close(kernel(x, kind) - kernel(-x, kind), x, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("kernel", kernels_of(OP))
def test_the_ends_of_the_number_line(kernel, kind):
    """But for ∞, of which torch makes NaN in some kinds."""
    x = torch.tensor([0.0, 30.0, 1e3, 1e30, -1e3, -1e30, torch.nan, 1e-38])
    right = torch.tensor([0.0, 30.0, 1e3, 1e30, 0.0, 0.0, torch.nan, 5e-39])
    torch.testing.assert_close(kernel(x, kind), right, atol=1e-37, rtol=0, equal_nan=True)


def test_wrong_inputs_are_named():
    with pytest.raises(ShapeError, match=r"kind has 'relu' but needs one of gelu, gelu_pytorch_tanh, quick_gelu, silu"):
        activation(torch.ones(3), "relu")
    with pytest.raises(ShapeError, match=r"x has torch.int64 but needs a floating-point dtype"):
        activation(torch.ones(3).long(), "silu")
    with pytest.raises(ShapeError, match=r"x has shape \(\) but needs at least one axis"):
        activation(torch.tensor(1.0), "silu")
