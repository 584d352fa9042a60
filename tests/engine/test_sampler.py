"""sampler: the right distribution, and nothing but a row's own logits, parameters, seed and position moves its draw."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vlmfx.engine.request import SamplingParams
from vlmfx.engine.sampler import logprobs, state
from vlmfx.errors import ShapeError
from vlmfx.ops import sample as op
from vlmfx.ops.sample import uniform

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
N = 20_000
SEEDS = st.integers(-(2**63), 2**64 - 1)
POSITIONS = st.integers(0, 2**40)


@st.composite
def rows(draw, max_vocab=40):
    """One row of logits on a grid of 1/8, so that ties are common, with some of -inf but not all."""
    vocab = draw(st.integers(1, max_vocab))
    steps = draw(st.lists(st.none() | st.integers(-80, 80), min_size=vocab, max_size=vocab))
    assume(any(s is not None for s in steps))
    return torch.tensor([-math.inf if s is None else s / 8 for s in steps])


any_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 5e-324, 1e-30, 0.3, 1.0, 1.7, 1e30]),
    top_p=st.just(1.0) | st.floats(1e-12, 1),
    top_k=st.sampled_from([0, 1, 2, 5, 1000]),
    min_p=st.just(0.0) | st.floats(0, 1),
)
requests = st.tuples(any_params, SEEDS, POSITIONS)


def sample(logits, params, seeds, positions):
    """The next ids, as a step draws them."""
    draw = state(params, seeds, positions, logits.device)
    return logits.argmax(-1) if draw is None else op.sample(logits, *vars(draw).values())


def one(row, p, seed=0, position=0):
    return sample(row[None], [p], [seed], [position]).item()


def draws(row, p, seed=1, num=N):
    """Draws at positions 0, 1, ... of one sequence."""
    return sample(row.expand(num, -1), [p] * num, [seed] * num, range(num))


def kept_by_definition(row, p):
    """{id: mass} after temperature, top_k, top_p and min_p, one token at a time in float64."""
    top = row.max().item()
    mass = [math.exp((v - top) / p.temperature) for v in row.double().tolist()]
    order = sorted(range(len(mass)), key=lambda i: (-row[i].item(), i))[: p.top_k or None]
    total, running = sum(mass[i] for i in order), 0.0
    kept: dict[int, float] = {}
    for i in order:
        if kept and running >= p.top_p * total:
            break
        running += mass[i]
        if mass[i] >= p.min_p and mass[i] > 0:
            kept[i] = mass[i]
    return kept


# ---- the distribution


@pytest.mark.parametrize(
    "p",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=3.0, top_k=7),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.05),
        SamplingParams(temperature=1.3, top_k=12, top_p=0.9, min_p=0.02),
    ],
    ids=["plain", "cold", "top_k", "top_p", "min_p", "all"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_frequencies_are_the_softmax(p, dtype):
    row = (torch.randn(24, generator=torch.Generator().manual_seed(5)) * 1.5).to(dtype)
    kept = kept_by_definition(row, p)
    counts = draws(row, p).bincount(minlength=len(row)).tolist()
    assert sum(counts[i] for i in kept) == N, "an id that the filters take out was drawn"
    expected = {i: N * m / sum(kept.values()) for i, m in kept.items()}
    chi_square = sum((counts[i] - e) ** 2 / e for i, e in expected.items() if e >= 5)
    freedom = max(1, sum(e >= 5 for e in expected.values()) - 1)
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_successive_draws_are_independent():
    """Pairs of neighbours, over a uniform distribution of 8: 64 cells."""
    ids = draws(torch.zeros(8), SamplingParams())
    pairs = (ids[:-1] * 8 + ids[1:]).bincount(minlength=64).double()
    e = (N - 1) / 64
    assert ((pairs - e) ** 2 / e).sum() < 63 + 4 * math.sqrt(2 * 63)


@settings(deadline=None, max_examples=300)
@given(row=rows(), request=requests)
def test_filtered_out_ids_are_never_drawn(row, request):
    p, seed, position = request
    if p.temperature < 1e-9:
        assert row[one(row, p, seed, position)] == row.max()
        return
    # 1e-9 of slack: the definition adds its floats in another order, and a sum may just reach top_p
    widened = SamplingParams(
        temperature=p.temperature, top_k=p.top_k, top_p=min(1, p.top_p + 1e-9), min_p=max(0, p.min_p - 1e-9)
    )
    assert one(row, p, seed, position) in kept_by_definition(row, widened)


@settings(deadline=None)
@given(row=rows(), temperature=st.floats(5e-324, 1e300), seed=SEEDS, position=POSITIONS)
def test_one_candidate_is_greedy(row, temperature, seed, position):
    greedy = one(row, SamplingParams.greedy(), seed, position)
    assert greedy == row.argmax()
    for only in ({"top_k": 1}, {"top_p": 1e-300}, {"top_k": 1, "top_p": 0.5, "min_p": 1.0}):
        assert one(row, SamplingParams(temperature=temperature, **only), seed, position) == greedy


def test_top_k_of_one_tells_apart_what_softmax_cannot():
    assert one(torch.tensor([0.0, 1e-20]), SamplingParams(top_k=1)) == 1


def test_many_equal_logits_keep_the_lowest_ids():
    row = torch.zeros(1000)
    assert set(draws(row, SamplingParams(top_k=3), num=100).tolist()) == {0, 1, 2}
    assert set(draws(row, SamplingParams(top_p=0.0025), num=100).tolist()) == {0, 1, 2}


def test_a_real_vocabulary():
    """150,000 ids: integer sums lose no token, whether or not they are sorted first."""
    row = torch.zeros(150_000)
    ids = sample(row.expand(64, -1), [SamplingParams()] * 64, [3] * 64, range(64))
    want = [int(uniform(3, 0, i) * 150_000) for i in range(64)]
    assert ids.tolist() == want


# ---- what must not move a draw


@settings(deadline=None, max_examples=200)
@given(data=st.data(), seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES))
def test_batch_mates_and_row_order_never_show(data, seed, dtype):
    batch = data.draw(st.lists(requests, min_size=1, max_size=8))
    vocab = data.draw(st.integers(1, 70))
    logits = (torch.randn(len(batch), vocab, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)
    order = data.draw(st.permutations(range(len(batch))))
    alone = [one(logits[i], *batch[i]) for i in order]
    p, seeds, positions = zip(*(batch[i] for i in order), strict=True)
    before = logits.clone()
    ids = sample(logits[order], p, seeds, positions)
    assert ids.tolist() == alone
    assert ids.dtype == torch.int64
    sample(logits, [r[0] for r in batch], [r[1] for r in batch], [r[2] for r in batch])
    assert torch.equal(logits, before)


@settings(deadline=None, max_examples=200)
@given(row=rows(), request=requests, pad=st.integers(1, 100))
def test_padding_of_the_vocabulary_never_shows(row, request, pad):
    padded = torch.cat([row, row.new_full((pad,), -math.inf)])
    assert one(padded, *request) == one(row, *request)


@settings(deadline=None, max_examples=200)
@given(row=rows(), request=requests, constant=st.integers(-(2**12), 2**12))
def test_a_constant_added_to_the_logits_never_shows(row, request, constant):
    """On the grid of 1/8, where the sum is exact."""
    assert one(row + constant, *request) == one(row, *request)


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf], [math.inf, math.nan]])
@pytest.mark.parametrize("p", [SamplingParams(), SamplingParams(top_k=1, top_p=0.5, min_p=0.1)], ids=["plain", "cut"])
def test_a_row_without_a_distribution_harms_no_other(bad, p):
    good = torch.tensor([0.5, 1.0])
    logits = torch.stack([torch.tensor(bad), good])
    ids = sample(logits, [p, p], [1, 2], [3, 4])
    assert ids[0] == torch.tensor(bad).argmax()
    assert ids[1] == one(good, p, 2, 4)


@settings(deadline=None)
@given(temperature=st.sampled_from([5e-324, 1e-300, 1e-38, 1e-7]), scale=st.sampled_from([1.0, 1e30, 3e38]))
def test_the_smallest_temperatures_do_not_overflow(temperature, scale):
    row = torch.tensor([-1.0, 1.0, 0.0]) * scale
    assert one(row, SamplingParams(temperature=temperature)) == 1


def test_greedy_is_one_argmax_and_nothing_else():
    logits = torch.zeros(3, 9, dtype=torch.bfloat16)
    logits[1, 4:] = 1
    with torch.profiler.profile() as profile:
        ids = sample(logits, [SamplingParams.greedy()] * 3, [0] * 3, [0] * 3)
    assert ids.tolist() == [0, 4, 0]
    top_level = [e.name for e in profile.events() if e.cpu_parent is None and e.name.startswith("aten::")]
    assert top_level == ["aten::argmax"]


def test_answers_of_one_request_draw_apart():
    """One seed, n sample indices: the draws of a sequence of its own each, and those of index 0 where none are given."""
    row, n = torch.zeros(1000), 128
    p = [SamplingParams()] * n
    draw = state(p, [7] * n, [5] * n, row.device, range(n))
    assert draw is not None
    assert draw.position.tolist() == [[i, 5] for i in range(n)]
    ids = op.sample(row.expand(n, -1), *vars(draw).values()).tolist()
    assert ids == [int(uniform(7, i, 5) * 1000) for i in range(n)]
    assert len(set(ids)) > 100
    assert ids[0] == one(row, p[0], 7, 5)


def test_no_rows():
    assert sample(torch.zeros(0, 5), [], [], []).shape == (0,)
    assert logprobs(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), []) == []


@pytest.mark.parametrize("shape", [(2, 4), (4,), (1, 1, 4)])
def test_rows_must_agree(shape):
    with pytest.raises(ShapeError, match="one of each a row"):
        logprobs(torch.zeros(shape), torch.zeros(1, dtype=torch.int64), [1])


# ---- log-probabilities


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_logprobs_by_definition(data):
    row = data.draw(rows())
    chosen, num = data.draw(st.integers(0, len(row) - 1)), data.draw(st.integers(0, 20))
    order = sorted(range(len(row)), key=lambda i: (-row[i].item(), i))
    want = row.log_softmax(-1)
    # a batch mate that asks for more, and one that asks for nothing, change nothing
    (got, mate, none) = logprobs(row.expand(3, -1), torch.tensor([chosen, 0, 0]), [num, 20, None])
    assert none is None
    assert got is not None
    assert list(got) == list(dict.fromkeys([chosen, *order[:num]]))
    assert all(rank == order.index(i) + 1 for i, (_, rank) in got.items())
    for i, (value, _) in got.items():
        assert value == pytest.approx(want[i].item(), abs=1e-5)
    assert mate is not None
    assert got.items() <= mate.items() | {(chosen, got[chosen])}


def test_logprobs_are_float32_of_the_logits_as_given():
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    (got,) = logprobs(logits, torch.tensor([0]), [1])
    assert got is not None
    want = torch.tensor([1.0, 2.0, 3.0]).log_softmax(-1).tolist()
    assert got == {0: (pytest.approx(want[0], abs=1e-6), 3), 2: (pytest.approx(want[2], abs=1e-6), 1)}


def test_logprobs_of_a_row_of_nan_harm_no_other():
    logits = torch.tensor([[math.nan, 1.0, 2.0], [0.0, 1.0, 2.0]])
    bad, good = logprobs(logits, torch.tensor([0, 2]), [2, 2])
    assert bad is not None
    assert good is not None
    assert math.isnan(bad[0][0])
    assert [rank for _, rank in good.values()] == [1, 2]


def test_the_greedy_token_has_rank_one():
    logits = torch.zeros(1, 6)
    (got,) = logprobs(logits, sample(logits, [SamplingParams.greedy()], [0], [0]), [0])
    assert got == {0: (pytest.approx(-math.log(6)), 1)}
