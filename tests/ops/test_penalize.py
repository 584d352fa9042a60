"""penalize: kernels equal the reference, the reference the definition; penalties that are off change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.kernels import Kernel, Mutant, assert_equal, kernels_of
from tests.strategies import SEEDS, normal, strided
from vlmfx.errors import ShapeError
from vlmfx.ops.penalize import OP, penalize, reference

MUTANTS = [
    Mutant("triton/penalize.py", "inside = ids < VOCAB", "inside = ids < VOCAB - 1"),
    Mutant("triton/penalize.py", "(prompt != 0) | (count > 0)", "(prompt != 0)"),
    Mutant("triton/penalize.py", "tl.where(x > 0, smaller, x * repeated)", "smaller"),
    Mutant("triton/penalize.py", "row * prompt_stride", "row * logits_stride"),
    Mutant("triton/penalize.py", "* (count > 0).to(tl.float32)", "* count.to(tl.float32)"),
]

Args = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@st.composite
def cases(draw: st.DrawFn) -> Args:
    """No rows, no tokens, a block of 64 and a token more, several; -inf, which a grammar leaves; penalties below 0 and below 1."""
    rows, vocab, seed = draw(st.integers(0, 4)), draw(st.sampled_from([0, 1, 7, 63, 64, 65, 200])), draw(SEEDS)
    g = torch.Generator().manual_seed(seed)
    x = (normal(seed, rows, vocab) * 4).masked_fill(torch.rand(rows, vocab, generator=g) < 0.1, -math.inf)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    counts = torch.randint(0, 4, (rows, vocab + 3), generator=g, dtype=torch.int32).clamp_(max=draw(st.integers(0, 3)))
    in_prompt = torch.rand(rows, vocab + 5, generator=g) < 0.3

    def column(low: float, high: float) -> Tensor:
        return torch.rand(rows, generator=g) * (high - low) + low

    penalties = column(0.5, 2.0), column(-1.0, 2.0), column(-1.0, 2.0)
    return draw(strided(x, dtype)), counts[:, 3:], in_prompt[:, :vocab], *penalties


def check(kernel: Kernel, case: Args) -> None:
    """The kernel gives what the reference gives, in new memory."""
    before = [a.clone() for a in case]
    assert_equal(OP, kernel(*case), reference(*case))
    for mine, theirs in zip(case, before, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@given(case=cases())
def test_kernel_equals_reference(kernel, case):
    check(kernel, case)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=20)
@given(case=cases())
def test_penalties_that_are_off_change_nothing(kernel, case):
    x, counts, in_prompt, repetition, presence, frequency = case
    off = torch.ones_like(repetition), torch.zeros_like(presence), torch.zeros_like(frequency)
    assert torch.equal(kernel(x, counts, in_prompt, *off), x)
    nothing = torch.zeros_like(counts), torch.zeros_like(in_prompt)
    assert torch.equal(kernel(x, *nothing, repetition, presence, frequency), x)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=20)
@given(case=cases(), pad=st.integers(0, 3))
def test_padding_rows_never_show(kernel, case, pad):
    padded = [torch.cat([a, a.new_ones(pad, *a.shape[1:])]) for a in case]
    assert torch.equal(kernel(*padded)[: len(case[0])], kernel(*case))


def test_by_definition():
    """Tokens nowhere, in the prompt, once and three times in the output, twice and in the prompt; positive and negative."""
    counts = torch.tensor([[0, 0, 1, 3, 2] * 2], dtype=torch.int32)
    in_prompt = torch.tensor([[False, True, False, False, True] * 2])
    logits = torch.tensor([[6.0] * 5 + [-6.0] * 5])
    got = reference(logits, counts, in_prompt, *(torch.tensor([v]) for v in (1.5, 0.25, 0.125)))
    after = [0, 0, 0.125 + 0.25, 0.375 + 0.25, 0.25 + 0.25]
    assert got.tolist() == [[6.0 - after[0], *(4.0 - a for a in after[1:]), -6.0, *(-9.0 - a for a in after[1:])]]


@pytest.mark.parametrize(
    ("index", "wrong", "said"),
    [
        (0, torch.zeros(3), r"logits has shape \(3,\) but needs shape \(rows, vocab\)"),
        (0, torch.zeros(2, 3, dtype=torch.int32), r"logits has torch.int32 but needs a float dtype"),
        (1, torch.zeros(2, 4, dtype=torch.int32), r"counts has shape \(2, 4\) but needs shape \(2, 3\)"),
        (1, torch.zeros(2, 3), r"counts has torch.float32 but needs torch.int32"),
        (2, torch.zeros(2, 3), r"in_prompt has torch.float32 but needs torch.bool"),
        (4, torch.zeros(3), r"presence has shape \(3,\) but needs shape \(2,\)"),
    ],
)
def test_wrong_inputs_are_named(index, wrong, said):
    both = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.bool)
    args = [torch.zeros(2, 3), *both, torch.ones(2), torch.zeros(2), torch.zeros(2)]
    args[index] = wrong
    with pytest.raises(ShapeError, match=said):
        penalize(*args)
