"""gated_activation: kernels equal the reference; they are the activation of the gate, times up."""

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
from vlmfx.ops import activation
from vlmfx.ops.gated_activation import OP, gated_activation, reference

MUTANTS = [
    Mutant("triton/gated_activation.py", "row < num_rows", "row < num_rows - 1"),
    Mutant("triton/gated_activation.py", "(row, INNER, OUTER_STRIDE, INNER_STRIDE)", "(row, INNER, 2 * WIDTH * INNER, INNER_STRIDE)"),
    Mutant("triton/gated_activation.py", "(row, INNER, OUTER_STRIDE, INNER_STRIDE)", "(row, INNER, OUTER_STRIDE, 0)"),
    Mutant("triton/gated_activation.py", "gate_at + WIDTH", "gate_at"),
    Mutant("triton/gated_activation.py", "activate(gate.to(tl.float32), KIND)", "activate(up.to(tl.float32), KIND)"),
    Mutant("mlu/kernels/gated_activation.mlu", "row = number / pieces * tile_rows", "row = number / pieces"),
    Mutant("mlu/kernels/gated_activation.mlu", "MIN(tile_rows, rows - row)", "tile_rows"),
    Mutant("mlu/kernels/gated_activation.mlu", "source + width, bytes", "source, bytes"),
    Mutant("mlu/kernels/gated_activation.mlu", "  __bang_write_value(up, 2 * padded, (T)0);\n", ""),
    Mutant("mlu/kernels/gated_activation.mlu", "(step - 2) * taskDim + taskId, rows", "(step - 2) * taskDim, rows"),
    Mutant("mlu/kernels/gated_activation.mlu", "      __bang_mul(output + half_of, output + half_of, up + half_of, num);\n", ""),
    Mutant("mlu/kernels/activation.h", "power, x, -LOG2_E, n", "power, x, -1.f, n"),
    Mutant("mlu/kernels/activation.h", "  __bang_add_scalar(power, power, 1.f, n);\n", ""),
]  # fmt: skip
HALF = settings(max_examples=50)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, ...]:
    """As activation's. The gate alone may be huge: the tolerance is for products of the size of one of its factors."""
    width, seed, dtype, scale = draw(WIDTHS), draw(SEEDS), draw(DTYPES), draw(SCALES)
    shape = (*draw(leading(width)), width)
    gate_up = torch.cat([normal(seed, *shape) * scale, normal(seed + 1, *shape)], -1)
    return draw(laid_out(gate_up, dtype)), draw(st.sampled_from(list(activation.ACTIVATIONS)))


def check(kernel: Kernel, case: tuple[Any, ...]) -> None:
    """The kernel gives what the reference gives, and its elements side by side."""
    out = kernel(*case)
    assert_equal(OP, out, reference(*case))
    assert out.is_contiguous()


def mlu_case() -> tuple[tuple[Any, ...], dict[str, int]]:
    """A prefill of 128 tokens of Qwen2-VL-7B, and what the kernel's count by hand names."""
    return (normal(0, 128, 2 * 18944, dtype=torch.float16), "silu"), {"rows": 128, "width": 18944, "passes": 5}


@pytest.mark.parametrize("kernel", kernels_of(OP))
@given(case=cases())
def test_kernel_equals_reference(kernel, case):
    check(kernel, case)


@pytest.mark.parametrize("name", [p.id for p in kernels_of(OP)])
@HALF
@given(case=cases())
def test_it_is_the_activation_times_up(name, case):
    (fused,) = (p.values[0] for p in kernels_of(OP) if p.id == name)
    (apart,) = (p.values[0] for p in kernels_of(activation.OP) if p.id == name)
    gate_up, kind = case
    gate, up = gate_up.chunk(2, -1)
    assert_equal(OP, fused(gate_up, kind), apart(gate, kind) * up)


def test_silu_is_the_default():
    x = normal(0, 3, 8)
    assert torch.equal(gated_activation(x), gated_activation(x, "silu"))


def test_wrong_inputs_are_named():
    with pytest.raises(ShapeError, match=r"kind has 'relu' but needs one of gelu, gelu_pytorch_tanh, quick_gelu, silu"):
        gated_activation(torch.ones(3, 8), "relu")
    with pytest.raises(ShapeError, match=r"gate_up has shape \(3, 7\) but needs a last axis of even size"):
        gated_activation(torch.ones(3, 7))
    with pytest.raises(ShapeError, match=r"gate_up has torch.int64 but needs a floating-point dtype"):
        gated_activation(torch.ones(3, 8).long())
