"""sample: kernels equal the reference, the reference the definition; nothing but a row's own arguments moves its draw."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops import emulated
from tests.ops.kernels import Kernel, Mutant, kernels_of
from tests.strategies import SEEDS, normal, strided
from vlmfx.errors import ShapeError
from vlmfx.ops.sample import MAX_VOCAB, OP, kept, philox4x32, reference, sample, uniform

MUTANTS = [
    Mutant("triton/sample.py", "tl.min(tl.where(key == best, ids, VOCAB))", "tl.max(tl.where(key == best, ids, 0))"),
    Mutant("triton/sample.py", "x != x, 0x7FFFFFFF, key", "x != x, -0x7FFFFFFF, key"),
    Mutant("triton/sample.py", "total - (tl.sum(least) - least_so_far)", "total - (tl.sum(most) - least_so_far)"),
    Mutant("triton/sample.py", "tl.where(bucket < first, _weight", "tl.where(bucket <= first, _weight"),
    Mutant("triton/sample.py", "            seen = before\n", "            seen = seen\n"),
    Mutant("triton/sample.py", "tl.where(pivot == high, weigh, 0)", "tl.where(pivot >= high, weigh, 0)"),
    Mutant("triton/sample.py", "place <= last_kept", "place < last_kept"),
    Mutant("triton/sample.py", "tl.where(at < chunk, equal, 0)", "tl.where(at < chunk - 1, equal, 0)"),
    Mutant("triton/sample.py", "    index = (sample_index &", "    index = (position &"),
    Mutant("mlu/kernels/sample.mlu", "if (most[t] > best)", "if (most[t] >= best)"),
    Mutant("mlu/kernels/sample.mlu", "id = first + first_equal", "id = first_equal"),
    Mutant("mlu/kernels/sample.mlu", "left = limit - cut.above;", "left = limit;"),
    Mutant("mlu/kernels/sample.mlu", "(left + step - 1) * cut.weight", "(left + step) * cut.weight"),
    Mutant("mlu/kernels/sample.mlu", "    row.left[t] = left;", "    row.left[t] = 0;"),
    Mutant("mlu/kernels/sample.mlu", "      row.kept[i] = 1.f;", ""),
    Mutant("mlu/kernels/sample.mlu", "number << 11", "number << 10"),
    Mutant("mlu/kernels/sample.mlu", "key + 4, key[2]", "key + 4, key[4]"),
    Mutant("mlu/kernels/logits.h", "__bang_argmax(buf, x, n)", "__bang_argmax(buf, x, FLOATS)"),
    Mutant("mlu/kernels/weights.h", "number * 2048 + (int32_t)", "number + (int32_t)"),
    Mutant("mlu/kernels/weights.h", "is_cold ? 0.f : LOG2_E", "is_cold ? 0.f : 1.f"),
    Mutant("mlu/kernels/weights.h", "if (min_p > 0.f) {", "if (min_p > 1.f) {"),
    Mutant("mlu/kernels/weights.h", "  __bang_mul(hi, hi, kept, n);\n", ""),
    Mutant("mlu/kernels/weights.h", "x.bits < 0 ? -(x.bits & 0x7FFFFFFF) : x.bits", "x.bits"),
    Mutant("mlu/kernels/philox.h", "round < 10", "round < 9"),
    Mutant("mlu/kernels/philox.h", "p_high ^ d ^ k1", "p_high ^ k1"),
    Mutant("mlu/kernels/philox.h", "    k0 += 0x9E3779B9u;\n", ""),
    Mutant("mlu/kernels/philox.h", "c = sample_index, d = 0", "c = 0, d = 0"),
    Mutant("mlu/kernels/philox.h", "(uint64_t)a1 * b1 + (middle >> 32)", "(middle >> 32)"),
]

Args = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
FEW = settings(max_examples=12)  # in the interpreter a draw takes tenths of a second
# Hot rows are nearly uniform, so that one token too many or too few moves half of the draws.
TEMPERATURES = st.sampled_from([1.0, 0.5, 3.0, 30.0, 30.0, 1e30, 0.0, 1e-38])
TOP_KS = st.sampled_from([0, 0, 0, 1, 2, 40, 63, 64, 100, 1000])
TOP_PS = st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.99, 1e-9, 0.0]) | st.floats(0, 1, width=32)


@st.composite
def logits_of(draw: st.DrawFn, rows: int) -> Tensor:
    """One token, one chunk of 64, a token more, several; ties on two grids; rows of NaN, of infinities and of nothing."""
    vocab = draw(st.sampled_from([1, 2, 7, 64, 65, 130, 200, 200]))
    x = normal(draw(SEEDS), rows, vocab) * draw(st.sampled_from([1.0, 3.0, 0.01, 12.0]))
    grid = draw(st.sampled_from([None, 0.5, 2.0]))
    if grid is not None:
        x = (x / grid).round() * grid
    for row in range(rows):
        spoilt = draw(st.sampled_from([None] * 9 + [math.nan, math.inf, -math.inf]))
        if spoilt is not None:
            x[row, draw(st.integers(0, vocab - 1))] = spoilt
        if draw(st.integers(0, 15)) == 15:
            x[row] = -math.inf
    return draw(strided(x, draw(FLOATS)))


@st.composite
def cases(draw: st.DrawFn) -> Args:
    rows = draw(st.sampled_from([0, 1, 2, 2, 3]))
    logits = draw(logits_of(rows))

    def column(values: st.SearchStrategy[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor([draw(values) for _ in range(rows)], dtype=dtype)

    words = st.integers(-(2**63), 2**63 - 1)
    return (
        logits,
        column(TEMPERATURES, torch.float32),
        column(TOP_KS, torch.int32),
        column(TOP_PS, torch.float32),
        column(st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]), torch.float32),
        column(words, torch.int64),
        column(st.lists(words, min_size=2, max_size=2), torch.int64).view(rows, 2),
    )


@st.composite
def hot_cases(draw: st.DrawFn) -> Args:
    """Hot rows of several chunks with ties, of which a filter cuts a part: where one token too many moves the draw. Or greedy ones."""
    x = normal(draw(SEEDS), 2, draw(st.sampled_from([130, 200])))
    grid = draw(st.sampled_from([None, 0.5, 2.0]))
    logits = x if grid is None else (x / grid).round() * grid
    filters = [(0, 0.9, 0.0), (0, 0.5, 0.0), (100, 1.0, 0.0), (100, 0.7, 0.0), (70, 1.0, 0.0), (0, 1.0, 0.93)]
    top_k, top_p, min_p = draw(st.sampled_from(filters))
    degrees = draw(st.sampled_from([30.0, 30.0, 30.0, 0.0]))
    seed = torch.tensor([draw(SEEDS), draw(SEEDS)])
    floats = (torch.full((2,), value) for value in (degrees, top_p, min_p))
    temperature, share, least = floats
    limit = torch.full((2,), top_k, dtype=torch.int32)
    index = draw(st.integers(0, 1))
    return logits, temperature, limit, share, least, seed, torch.tensor([[index, 5], [index, 6]])


def telling_cases() -> st.SearchStrategy[Args]:
    """Hot and greedy rows, and now and then any, for what only one without a distribution tells."""
    return st.integers(0, 3).flatmap(lambda i: hot_cases() if i else cases())


def row_of(
    row: list[float] | Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Args:
    """The arguments for one row, to be keyed by `keyed`."""
    state = [torch.tensor([v]) for v in (temperature, top_p, min_p)]
    seed, position = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)
    logits = torch.as_tensor(row)[None]
    return logits, state[0], torch.tensor([top_k], dtype=torch.int32), state[1], state[2], seed, position


def keyed(args: Args, num: int) -> Args:
    """A row num times, at positions 0, 1, ... of one sequence."""
    many = [a.expand(num, *a.shape[1:]) for a in args[:-1]]
    position = torch.stack([torch.zeros(num, dtype=torch.int64), torch.arange(num)], 1)
    return (*many, position)  # type: ignore[return-value]


def mlu_case() -> tuple[Args, dict[str, int]]:
    """32 greedy rows of Qwen2-VL-7B's vocabulary: of those that draw, the cycles hang on their logits."""
    args = keyed(row_of(normal(0, 152_064).half(), temperature=0.0), 32)
    return args, {"rows": 32, "vocab": 152_064}


def check(kernel: Kernel, case: Args) -> None:
    """The kernel draws what the reference draws, and leaves its arguments alone."""
    before = case[0].clone()
    assert torch.equal(kernel(*case), reference(*case))
    torch.testing.assert_close(case[0], before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=40)
@given(case=cases())
def test_kernel_equals_reference(kernel, case):
    check(kernel, case)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@pytest.mark.parametrize(
    ("dtype", "top_k", "top_p"),
    [(torch.bfloat16, 0, 0.9), (torch.float32, 0, 0.95), (torch.float16, 300, 1.0), (torch.float32, 1500, 0.7)],
)
def test_many_chunks_and_many_candidates(kernel, dtype, top_k, top_p):
    x = normal(top_k, 2600).to(dtype)
    check(kernel, keyed(row_of(x, temperature=2.0, top_k=top_k, top_p=top_p, min_p=1e-4), 1))


@pytest.mark.skipif(not emulated.HAS_EMULATOR, reason=emulated.WHY_NO_EMULATOR)
@pytest.mark.parametrize("factor", [0.6, 1.3])
def test_a_rough_mass_decides_nothing(factor, tmp_path):
    """On mlu top_p is first sought by exponentials of which nobody knows how exact the chip's are, and then put right."""
    kernel = Mutant("mlu/kernels/sample.mlu", "top_p * rough, true", f"{factor}f * top_p * rough, true").load(
        tmp_path, OP
    )

    @settings(max_examples=40)
    @given(case=hot_cases())
    def run(case: Args) -> None:
        check(kernel, case)

    run()


# ---- the random numbers


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, answer):
    """Random123's kat_vectors."""
    assert " ".join(f"{word:08x}" for word in philox4x32(counter, key)) == answer


@given(seed=st.integers(-(2**63), 2**64 - 1), index=st.integers(0, 2**32 - 1), position=st.integers(0, 2**64 - 1))
def test_uniform_is_in_the_unit_interval(seed, index, position):
    u = uniform(seed, index, position)
    assert 0 <= u < 1
    assert u * 2**53 == int(u * 2**53)


def test_every_part_of_the_key_matters():
    keys = [(s, i, p) for s in (0, 1, 2**32, 2**63) for i in (0, 1) for p in (0, 1, 2**32)]
    assert len({uniform(*k) for k in keys}) == len(keys)


# ---- the definition


def kept_by_definition(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """{id: mass} of the tokens that stay, one at a time in float64."""
    top = row.max().item()
    mass = [math.exp((v - top) / temperature) for v in row.double().tolist()]
    order = sorted(range(len(mass)), key=lambda i: (-row[i].item(), i))[: top_k or None]
    total, running = sum(mass[i] for i in order), 0.0
    found: dict[int, float] = {}
    for i in order:
        if found and running >= top_p * total:
            break
        running += mass[i]
        if mass[i] >= min_p:
            found[i] = mass[i]
    return found


@settings(max_examples=300)
@given(
    steps=st.lists(st.integers(-40, 40), min_size=1, max_size=20),
    top_k=st.integers(0, 22),
    top_p=st.floats(0.015625, 1, width=16),
    min_p=st.floats(0, 1, width=16),
    position=st.integers(0, 2**40),
)
def test_the_reference_draws_as_defined(steps, top_k, top_p, min_p, position):
    """The id of the running sum, in floats: away from the edges, where rounding decides."""
    row = torch.tensor(steps) / 8
    found = kept_by_definition(row, 1.3, top_k, top_p, min_p)
    assume(found == kept_by_definition(row, 1.3, top_k, min(1, top_p + 1e-6), max(0, min_p - 1e-6)))
    case = row_of(row, 1.3, top_k, top_p, min_p)
    target = uniform(0, 7, position) * sum(found.values())
    running, right = 0.0, -1
    for i in sorted(found):
        assume(abs(running - target) > 1e-6)
        right = i if running <= target else right
        running += found[i]
    case[-1][0] = torch.tensor([7, position])
    assert reference(*case).item() == right


@settings(max_examples=300)
@given(steps=st.lists(st.none() | st.integers(-80, 80), min_size=1, max_size=40), data=st.data())
def test_top_k_top_p_keep_the_smallest_set(steps, data):
    """The CPU's filters against a sort, in exact integers; weights to the id, so that every tie is seen."""
    assume(any(s is not None for s in steps))
    row = torch.tensor([-math.inf if s is None else s / 8 for s in steps])
    top_k, top_p = data.draw(st.integers(0, 45)), data.draw(st.floats(1e-12, 1))
    weight = ((row.double() - row.max()).exp() * 2.0**44).round().long()
    order = sorted(range(len(row)), key=lambda i: (-row[i].item(), i))[: top_k or None]
    total = sum(int(weight[i]) for i in order)
    want: set[int] = set()
    running = 0
    for i in order:
        if want and float(running) >= top_p * float(total):
            break
        running += int(weight[i])
        want.add(i)
    keep = kept(row[None], weight[None], torch.tensor([top_k]), torch.tensor([top_p], dtype=torch.float64))[0]
    got = {i for i in keep.nonzero()[:, 0].tolist() if weight[i]}  # whether those of no weight stay shows nowhere
    assert got == {i for i in want if weight[i]}


@pytest.mark.parametrize("kernel", kernels_of(OP))
@pytest.mark.parametrize("filters", [(1.0, 0, 1.0, 0.0), (1.5, 5, 0.95, 0.05)], ids=["plain", "all"])
def test_frequencies_are_the_softmax(kernel, filters):
    """By chi-square, five standard deviations above what to expect of it; the keys are fixed, so it passes always or never.

    In the interpreter a row takes up to 0.4 s, and 20 rows say little: that the kernel's frequencies are the softmax follows there
    from its draws being the reference's, to the id, which test_kernel_equals_reference sees."""
    num = 20 if kernel.name == "triton-interpreted" else 20_000
    row = normal(5, 7) * 1.5
    mass = kept_by_definition(row, *filters)
    counts = kernel(*keyed(row_of(row, *filters), num)).bincount(minlength=7).tolist()
    assert sum(counts[i] for i in mass) == num, "an id that the filters take out was drawn"
    expected = {i: num * m / sum(mass.values()) for i, m in mass.items()}
    chi_square = sum((counts[i] - e) ** 2 / e for i, e in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@FEW
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    index=st.integers(0, 2**32 - 1),
    position=st.integers(0, 2**63 - 1),
)
def test_of_equal_logits_the_id_is_the_random_number(kernel, seed, index, position):
    """8 bits of Philox; its known answers are tested where it is written in Python."""
    *args, _, _ = row_of(torch.zeros(256))
    ids = kernel(*args, torch.tensor([seed]), torch.tensor([[index, position]]))
    assert ids.item() == int(uniform(seed, index, position) * 256)


# ---- what must not move a draw


@pytest.mark.parametrize("kernel", kernels_of(OP))
@FEW
@given(case=cases(), data=st.data())
def test_batch_mates_row_order_and_padding_never_show(kernel, case, data):
    rows = len(case[0])
    order = torch.tensor(data.draw(st.permutations(range(rows))), dtype=torch.int64)
    padding = data.draw(st.integers(0, 2))
    garbage = (math.nan, 1.0, 0, 0.5, 0.0, 3, 3)
    shuffled = [
        torch.cat([a[order], a.new_full((padding, *a.shape[1:]), g)]) for a, g in zip(case, garbage, strict=True)
    ]
    assert torch.equal(kernel(*shuffled)[:rows], kernel(*case)[order])


@pytest.mark.parametrize("kernel", kernels_of(OP))
@FEW
@given(case=cases(), pad=st.sampled_from([1, 64, 100]))
def test_padding_of_the_vocabulary_never_shows(kernel, case, pad):
    logits, *state = case
    padded = torch.cat([logits, logits.new_full((len(logits), pad), -math.inf)], dim=1)
    assert torch.equal(kernel(padded, *state), kernel(logits, *state))


@pytest.mark.parametrize("kernel", kernels_of(OP))
@FEW
@given(case=cases(), only=st.sampled_from([(1, 1.0), (0, 0.0), (0, 1e-30), (1, 0.5)]))
def test_one_candidate_is_greedy(kernel, case, only):
    logits, temperature, top_k, top_p, *rest = case
    top_k, top_p = torch.full_like(top_k, only[0]), torch.full_like(top_p, only[1])
    assert torch.equal(kernel(logits, temperature, top_k, top_p, *rest), logits.argmax(dim=1))


@pytest.mark.parametrize("kernel", kernels_of(OP))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_k_of_one_tells_apart_what_softmax_cannot(kernel, dtype):
    assert kernel(*row_of(torch.tensor([0.0, 1e-20], dtype=dtype), top_k=1)).item() == 1


@pytest.mark.parametrize("kernel", kernels_of(OP))
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.5, "min_p": 0.1}], ids=["plain", "top_k", "top_p"])
@pytest.mark.parametrize(
    "bad", [[math.nan, 1.0, 2.0], [1.0, math.inf, 2.0], [-math.inf] * 3, [1.0, math.inf, math.nan]]
)
def test_a_row_without_a_distribution_is_an_argmax_and_harms_no_other(kernel, bad, filters):
    good = row_of([0.5, 1.0, 0.0], **filters)
    both = [torch.cat(pair) for pair in zip(row_of(bad, **filters), good, strict=True)]
    assert kernel(*both).tolist() == [torch.tensor(bad).argmax().item(), reference(*good).item()]


@pytest.mark.parametrize("kernel", kernels_of(OP))
def test_signs_of_zero_are_equal(kernel):
    assert kernel(*row_of([-0.0, 0.0], temperature=0.0)).item() == 0
    assert kernel(*row_of([-1.0, -0.0, 0.0], top_k=1)).item() == 1


@pytest.mark.parametrize(
    ("index", "wrong", "said"),
    [
        (0, torch.zeros(3), r"logits has shape \(3,\) but needs shape \(rows, vocab\)"),
        (0, torch.zeros(1, 0), r"logits has shape \(1, 0\) but needs"),
        (0, torch.zeros(1, MAX_VOCAB + 1), f"with a vocab of 1 to {MAX_VOCAB}"),
        (0, torch.zeros(1, 3, dtype=torch.int64), r"logits has torch.int64 but needs a float dtype"),
        (1, torch.zeros(2), r"temperature has shape \(2,\) but needs shape \(1,\), as logits have 1 rows"),
        (2, torch.zeros(1), r"top_k has torch.float32 but needs torch.int32"),
        (6, torch.zeros(1, dtype=torch.int64), r"position has shape \(1,\) but needs shape \(1, 2\)"),
    ],
)
def test_wrong_inputs_are_named(index, wrong, said):
    args = list(row_of([0.0, 1.0, 2.0]))
    args[index] = wrong
    with pytest.raises(ShapeError, match=said):
        sample(*args)
