"""adjust_logits: kernels equal the reference, the reference the definition; rows that nothing changes stay as they are, to the bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.kernels import Kernel, Mutant, assert_equal, kernels_of
from tests.strategies import SEEDS, normal, strided
from vlmfx.errors import ShapeError
from vlmfx.ops.adjust_logits import OP, adjust_logits, reference

FILE = "triton/adjust_logits.py"
MLU = "mlu/kernels/adjust_logits.mlu"
MUTANTS = [
    Mutant(FILE, "inside = ids < VOCAB\n", "inside = ids < VOCAB - 1\n"),
    Mutant(FILE, "row * ((VOCAB + 31) // 32)", "row * (VOCAB // 32)"),
    Mutant(FILE, "(word >> (ids % 32)) & 1", "(word >> (ids % 31)) & 1"),
    Mutant(
        FILE, "triton.cdiv(max(num_biases, length + has_history), TILE)", "triton.cdiv(max(num_biases, length), TILE)"
    ),
    Mutant(FILE, "tl.where(at == length, tl.load(newest + row), ids)", "ids"),
    Mutant(FILE, "return ids, (ids >= 0) & (ids < VOCAB)", "return ids, (ids > 0) & (ids < VOCAB)"),
    Mutant(FILE, "is_off & (tl.load(repetition + row) == 1)", "is_off"),
    Mutant(FILE, "(at >= tl.load(prompt_lens + row)) | (at == length)", "at >= 0"),
    Mutant(FILE, "is_first = inside & (count != TAKEN)", "is_first = inside"),
    Mutant(FILE, "tl.where(x > 0, smaller, x * repeated)", "smaller"),
    Mutant(FILE, "tl.where(count > 0, less, x)", "less"),
    Mutant(FILE, "x + added.to(x.dtype)", "added.to(x.dtype)"),
    Mutant(MLU, "mask_words = (vocab + 31) / 32", "mask_words = vocab / 32"),
    Mutant(MLU, "__bang_bor((int8_t *)x, (int8_t *)x, (int8_t *)planes, bytes);", ""),
    Mutant(MLU, "if (count == TAKEN) continue;", ""),
    Mutant(MLU, "at + i >= first_answer ?", "at + i > first_answer ?"),
    Mutant(MLU, "MIN(PIECE, num - at + 1)", "MIN(PIECE, num - at)"),
    Mutant(MLU, "t ? tokens.ends[t - 1] : 0", "0"),
    Mutant(MLU, "count > 0 ? value - frequency", "true ? value - frequency"),
    Mutant("mlu/kernels/logits.h", "int tile = HALVES;", "int tile = HALVES / 2;"),
]

Args = tuple[Any, ...]  # as the op's schema


@st.composite
def cases(draw: st.DrawFn) -> Args:
    """Each part with and without; no rows, no tokens; a token once, often, in prompt, answer or both; ids that are none; over a tile."""
    rows, vocab, seed = draw(st.integers(0, 4)), draw(st.sampled_from([0, 1, 7, 31, 32, 33, 64, 65, 200])), draw(SEEDS)
    g = torch.Generator().manual_seed(seed)
    x = (normal(seed, rows, vocab) * 4).masked_fill(torch.rand(rows, vocab, generator=g) < 0.1, -math.inf)
    logits = draw(strided(x, draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))))

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g, dtype=torch.int64)

    mask = bias_ids = bias = None
    if draw(st.booleans()):
        mask = integers(-(2**31), 2**31, rows, -(-vocab // 32)).int()
    if draw(st.booleans()):
        # The ids of a row differ, in any order, with padding and ids beyond the vocabulary between them.
        num = draw(st.sampled_from([0, 1, 5, 600]))
        ids = torch.rand(rows, vocab + num, generator=g).argsort(dim=1)[:, :num]
        bias_ids = ids.int()
        bias_ids = bias_ids.masked_fill(torch.rand(bias_ids.shape, generator=g) < 0.3, -1)
        bias = torch.rand(rows, num, generator=g) * 4 - 2
    if not draw(st.booleans()):
        return logits, mask, bias_ids, bias, None, None, None, None, None, None
    length = draw(st.sampled_from([0, 1, 6, 511, 512, 600]))
    history = integers(-1, min(vocab, draw(st.sampled_from([3, 300]))) + 2, rows, length).int()
    prompt_lens = integers(0, length + 2, rows).int()
    newest = integers(-1, vocab + 1, rows)

    def column(low: float, high: float, off: float) -> Tensor:
        return (torch.rand(rows, generator=g) * (high - low) + low).masked_fill(
            torch.rand(rows, generator=g) < 0.3, off
        )

    penalties = column(-2.0, 2.0, 0.0), column(-2.0, 2.0, 0.0), column(0.5, 2.0, 1.0)
    return logits, mask, bias_ids, bias, history, prompt_lens, newest, *penalties


def check(kernel: Kernel, case: Args) -> None:
    """The kernel gives what the reference gives, in new memory."""
    before = [a if a is None else a.clone() for a in case]
    assert_equal(OP, kernel(*case), reference(*case))
    for mine, theirs in zip(case, before, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def mlu_case() -> tuple[Args, dict[str, int]]:
    """16 rows of Qwen2-VL-7B's vocabulary with all there is: a mask, 300 biases, and penalties for 1,500 tokens."""
    rows, vocab, g = 16, 152_064, torch.Generator().manual_seed(0)
    mask = torch.randint(-(2**31), 2**31, (rows, vocab // 32), generator=g).int()
    bias_ids, bias = torch.arange(300, dtype=torch.int32).repeat(rows, 1) * 500, torch.ones(rows, 300)
    history = torch.randint(0, vocab, (rows, 1500), generator=g).int()
    state = history, torch.full((rows,), 1000, dtype=torch.int32), torch.full((rows,), 7)
    penalties = (torch.full((rows,), value) for value in (0.5, 0.25, 1.25))
    args = (normal(0, rows, vocab, dtype=torch.float16), mask, bias_ids, bias, *state, *penalties)
    return args, {"rows": rows, "vocab": vocab, "mask": 1}


def by_definition(case: Args) -> list[list[float]]:
    """One row and one token at a time, in Python's floats."""
    lists: list[Any] = [a if a is None else a.tolist() for a in case]
    logits, mask, bias_ids, bias, history, prompt_lens, newest, presence, frequency, repetition = lists
    out = []
    for r, row in enumerate(logits):
        x = list(row)
        for i in range(len(x)):
            if mask is not None and not mask[r][i // 32] >> i % 32 & 1:
                x[i] = -math.inf
            if bias_ids is not None and i in bias_ids[r]:
                x[i] += bias[r][bias_ids[r].index(i)]
            if history is None:
                continue
            prompt, answer = history[r][: prompt_lens[r]], [*history[r][prompt_lens[r] :], newest[r]]
            if i in prompt or i in answer:
                x[i] = x[i] / repetition[r] if x[i] > 0 else x[i] * repetition[r]
            if i in answer:
                x[i] -= frequency[r] * answer.count(i) + presence[r]
        out.append(x)
    return out


@given(case=cases())
def test_reference_is_the_definition(case):
    got = reference(*case)
    assert got.dtype == (torch.float64 if case[0].dtype == torch.float64 else torch.float32)
    expected = torch.tensor(by_definition(case), dtype=torch.float64).reshape(case[0].shape)
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@given(case=cases())
def test_kernel_equals_reference(kernel, case):
    check(kernel, case)


@pytest.mark.parametrize("kernel", [*kernels_of(OP), pytest.param(reference, id="reference")])
@settings(max_examples=30)
@given(case=cases())
def test_what_is_off_changes_no_bit(kernel, case):
    logits, mask, bias_ids, bias, history, *state = case
    everything = None if mask is None else torch.full_like(mask, -1)
    nothing = None if bias_ids is None else torch.full_like(bias_ids, -1)
    if history is not None:
        state[2:] = torch.zeros_like(state[2]), torch.zeros_like(state[3]), torch.ones_like(state[4])
    zeros = logits.masked_fill(torch.arange(logits.shape[1]) % 3 == 0, -0.0)
    got = kernel(zeros, everything, nothing, bias, history, *state)
    assert torch.equal(got, zeros.to(got.dtype))
    assert torch.equal(got.signbit(), zeros.signbit())
    if history is not None:
        state = [state[0], torch.full_like(state[1], -1), *case[7:]]
        assert torch.equal(kernel(logits, None, None, None, torch.full_like(history, -1), *state), logits.to(got.dtype))


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=30)
@given(case=cases(), pad=st.integers(0, 3), longer=st.integers(0, 600))
def test_padding_never_shows(kernel, case, pad, longer):
    """Of rows; and of ids, with which the newest token moves to another place."""
    padded: list[Any] = [a if a is None else torch.cat([a, a.new_ones(pad, *a.shape[1:])]) for a in case]
    for i, fill in ((2, -1), (3, 7), (4, -1)):
        if padded[i] is not None:
            padded[i] = torch.nn.functional.pad(padded[i], (0, longer), value=fill)
    assert torch.equal(kernel(*padded)[: len(case[0])], kernel(*case))


@pytest.mark.parametrize("kernel", [*kernels_of(OP), pytest.param(reference, id="reference")])
@settings(max_examples=30)
@given(case=cases(), seed=SEEDS)
def test_the_newest_token_is_one_of_the_answer(kernel, case, seed):
    """Whether the host knows it already or not; nor does the order of the answer matter."""
    logits, mask, bias_ids, bias, history, prompt_lens, newest, *penalties = case
    if history is None:
        return
    prompt_lens = prompt_lens.clamp(max=history.shape[1])
    known = torch.cat([history, newest[:, None].int()], dim=1)
    for row, start in zip(known, prompt_lens.tolist(), strict=True):
        row[start:] = row[start:][torch.randperm(len(row) - start, generator=torch.Generator().manual_seed(seed))]
    got = kernel(logits, mask, bias_ids, bias, known, prompt_lens, torch.full_like(newest, -1), *penalties)
    assert torch.equal(got, kernel(logits, mask, bias_ids, bias, history, prompt_lens, newest, *penalties))


def test_by_hand():
    """Tokens nowhere, in the prompt, once and three times in the answer (once as the newest), twice and in the prompt; all of them
    positive and negative; a bias on two, and one masked."""

    def ints(*values: int) -> Tensor:
        return torch.tensor([values], dtype=torch.int32)

    logits, mask = torch.tensor([[6.0] * 5 + [-6.0] * 5]), ints(0b1111011111)
    bias_ids, bias = ints(0, 1), torch.tensor([[-1.0, 3.0]])
    history, prompt_lens, newest = ints(1, 6, 4, 9, 2, 7, 3, 3, 8, 8, 8, 4, 4, 9, 9), ints(4)[0], torch.tensor([3])
    penalties = [torch.tensor([v]) for v in (0.25, 0.125, 1.5)]
    said = history, prompt_lens, newest, *penalties
    once, thrice, twice = 0.125 + 0.25, 0.375 + 0.25, 0.25 + 0.25
    positive = [5.0, 9.0 / 1.5, 4.0 - once, 4.0 - thrice, 4.0 - twice]
    negative = [-6.0, -9.0, -9.0 - once, -9.0 - thrice, -9.0 - twice]
    assert adjust_logits(logits, None, bias_ids, bias, *said).tolist() == [positive + negative]
    assert adjust_logits(logits, mask, bias_ids, bias, *said).tolist() == [[*positive, -math.inf, *negative[1:]]]


def test_sixteen_bits_do_not_hide_a_small_bias():
    logits = torch.tensor([[20.0, 20.0]], dtype=torch.bfloat16)
    bias_ids, bias = torch.tensor([[1]], dtype=torch.int32), torch.tensor([[0.05]])
    got = adjust_logits(logits, None, bias_ids, bias, None, None, None, None, None, None)
    assert got.argmax() == 1


@pytest.mark.parametrize(
    ("index", "wrong", "said"),
    [
        (0, torch.zeros(3), r"logits has shape \(3,\) but needs shape \(rows, vocab\)"),
        (0, torch.zeros(2, 33, dtype=torch.int32), r"logits has torch.int32 but needs a float dtype"),
        (1, torch.zeros(2, 1, dtype=torch.int32), r"mask has shape \(2, 1\) but needs shape \(2, 2\)"),
        (1, torch.zeros(2, 2, dtype=torch.int64), r"mask has torch.int64 but needs torch.int32"),
        (2, None, r"bias has a tensor but needs to go with bias_ids"),
        (3, None, r"bias has none but needs to go with bias_ids"),
        (3, torch.zeros(2, 4), r"bias has shape \(2, 4\) but needs shape \(2, 3\)"),
        (4, None, r"prompt_lens has a tensor but needs to go with history"),
        (6, None, r"newest has none but needs to go with history"),
        (6, torch.zeros(2, dtype=torch.int32), r"newest has torch.int32 but needs torch.int64"),
        (9, torch.zeros(3), r"repetition has shape \(3,\) but needs shape \(2,\)"),
    ],
)
def test_wrong_inputs_are_named(index, wrong, said):
    def ints(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    args: list[Any] = [torch.zeros(2, 33), ints(2, 2), ints(2, 3), torch.zeros(2, 3), ints(2, 5), ints(2)]
    args += [torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.zeros(2), torch.ones(2)]
    adjust_logits(*args)
    args[index] = wrong
    with pytest.raises(ShapeError, match=said):
        adjust_logits(*args)
