"""The chosen rungs and their division over programs are those that trying everything finds."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmfx.compile.choose import choices, choose, divide, fewest, least_share, padding_share, rows_run

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=9)
# Costs of a program with 1, 2, ... graphs: any numbers, as `divide` does not ask that they fall.
COSTS = st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=5), min_size=1, max_size=3)


def padded(rungs, sizes):
    return sum(min(rung for rung in rungs if rung >= size) for size in sizes)


@given(sizes=SIZES, num_rungs=st.integers(1, 7))
def test_rungs_are_those_of_all_subsets_that_waste_least(sizes, num_rungs):
    rungs = choose(sizes, num_rungs)
    distinct = sorted(set(sizes))
    assert len(rungs) == min(num_rungs, len(distinct))
    assert set(rungs) <= set(sizes)
    assert list(rungs) == sorted(rungs)
    assert rungs[-1] == max(sizes)
    subsets = (
        (*some, distinct[-1])
        for number in range(num_rungs)
        for some in itertools.combinations(distinct[:-1], min(number, len(distinct) - 1))
    )
    assert padded(rungs, sizes) == rows_run(rungs, sizes) == min(padded(subset, sizes) for subset in subsets)


@given(sizes=SIZES, most=st.integers(1, 60), max_rungs=st.integers(1, 7))
def test_what_no_step_has_is_covered_too(sizes, most, max_rungs):
    found = choices(sizes, max_rungs, most=most)
    assert [len(rungs) for rungs in found] == list(range(1, len(found) + 1))
    assert len(found) == min(max_rungs, len({*sizes, max(most, *sizes)}))
    for rungs in found:
        subsets = itertools.combinations(sorted({*sizes, max(most, *sizes)}), len(rungs))
        assert rungs[-1] == max(most, *sizes)
        assert padded(rungs, sizes) == min(padded(s, sizes) for s in subsets if s[-1] == rungs[-1])


@given(sizes=SIZES, seed=st.randoms())
def test_the_order_of_steps_does_not_matter_and_more_rungs_never_waste_more(sizes, seed):
    shuffled = [*sizes]
    seed.shuffle(shuffled)
    assert choices(sizes, 9) == choices(shuffled, 9)
    shares = [padding_share(rungs, sizes) for rungs in choices(sizes, 9)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == 0
    assert all(0 <= share < 1 for share in shares)


def test_numbers_of_a_long_trace_do_not_overflow():
    assert choose([1, 2**31 - 1] * 10**5, 1) == (2**31 - 1,)
    assert choose([1, 2**31 - 1] * 10**5, 48) == (1, 2**31 - 1)


@given(costs=COSTS, num_graphs=st.integers(3, 12))
def test_the_division_is_the_cheapest_of_all(costs, num_graphs):
    def cost(division):
        return sum(row[k - 1] for row, k in zip(costs, division, strict=True))

    every = [d for d in itertools.product(*(range(1, len(row) + 1) for row in costs)) if sum(d) <= num_graphs]
    division = divide(costs, num_graphs)
    assert division in every
    assert (cost(division), sum(division)) == min((cost(d), sum(d)) for d in every)


SHARES = st.lists(
    st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9]), min_size=1, max_size=5).map(lambda s: sorted(s, reverse=True)),
    min_size=1,
    max_size=3,
)


@given(shares=SHARES, max_share=st.sampled_from([0.0, 0.1, 0.3, 1.0]))
def test_fewest_is_the_smallest_that_stays_below(shares, max_share):
    every = [
        d
        for d in itertools.product(*(range(1, len(row) + 1) for row in shares))
        if all(row[k - 1] <= max_share for row, k in zip(shares, d, strict=True))
    ]
    assert fewest(shares, max_share) == (min(every, key=sum) if every else None)


@given(shares=SHARES, num_graphs=st.integers(3, 12))
def test_least_share_is_that_of_the_best_division(shares, num_graphs):
    every = [d for d in itertools.product(*(range(1, len(row) + 1) for row in shares)) if sum(d) <= num_graphs]
    best = min(max(row[k - 1] for row, k in zip(shares, d, strict=True)) for d in every)
    assert least_share(shares, num_graphs) == pytest.approx(best)
