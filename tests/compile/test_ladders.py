"""Ladders grow evenly between their ends, and the default plan always fits its graphs."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmfx.compile.buckets import UNITS
from vlmfx.compile.ladders import EMBED, GENERATE, SQRT2, decode_ladder, default_plan, ladder
from vlmfx.errors import PlanError

SIZES = st.one_of(st.integers(1, 300), st.integers(1, 2**31 - 1))


@given(ends=st.tuples(SIZES, SIZES).map(sorted), ratio=st.floats(1.05, 9), multiple=st.integers(1, 700))
def test_rungs_increase_by_the_ratio_from_end_to_end(ends, ratio, multiple):
    least, most = ends
    rungs = ladder(least, most, ratio=ratio, multiple=multiple)
    assert all(rung % multiple == 0 for rung in rungs)
    assert all(low < high < low * ratio * (1 + 1e-9) + multiple for low, high in pairwise(rungs))
    assert (rungs[0], rungs[-1]) == (-(-least // multiple) * multiple, -(-most // multiple) * multiple)


def test_powers_of_two_stay_what_they_are():
    assert ladder(16, 128) == (16, 23, 32, 46, 64, 91, 128)
    assert ladder(64, 256, multiple=4) == (64, 92, 128, 184, 256)
    assert decode_ladder(128) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
    assert [decode_ladder(most) for most in (1, 2, 5, 8, 9)] == [
        (1,),
        (1, 2),
        (1, 2, 4, 5),
        (1, 2, 4, 8),
        (1, 2, 4, 8, 16),
    ]


@pytest.mark.parametrize(
    ("least", "most", "options", "says"),
    [
        (2, 1, {}, "from 2 to 1"),
        (1, 2, {"ratio": 1.0}, "a ratio above 1"),
        (1, 2, {"ratio": float("nan")}, "a ratio above 1"),
        (0, 2, {}, "least is 0"),
        (1, 2, {"multiple": 0}, "multiple is 0"),
    ],
)
def test_what_is_no_ladder_is_told(least, most, options, says):
    with pytest.raises(PlanError, match=says):
        ladder(least, most, **options)


@given(
    max_num_seqs=st.integers(1, 2000),
    max_num_batched_tokens=st.integers(1, 10**6),
    max_patches=st.integers(1, 10**6),
    patch_multiple=st.integers(1, 600),
    max_graphs=st.integers(20, 60),
    programs=st.lists(st.sampled_from(list(UNITS)), unique=True),
)
def test_the_default_plan_covers_its_limits_with_graphs_to_spare(programs, max_graphs, **limits):
    plan = default_plan(**limits, max_graphs=max_graphs, programs=programs)
    assert plan.num_graphs <= max_graphs
    most = {
        "encode": limits["max_patches"],
        "prefill": limits["max_num_batched_tokens"],
        "decode": limits["max_num_seqs"],
        "pool": limits["max_num_batched_tokens"],
    }
    assert all(plan.bucket(program, most[program]) == plan.rungs(program)[-1] for program in programs)
    assert all(plan.rungs(program) == () for program in UNITS.keys() - set(programs))
    assert all(rung % limits["patch_multiple"] == 0 for rung in plan.encode)


def test_with_room_the_default_ladders_grow_by_the_root_of_two():
    for programs in (GENERATE, EMBED):
        plan = default_plan(programs=programs)
        assert plan.encode == ladder(64, 16384, ratio=SQRT2, multiple=4)
        assert plan.num_graphs <= 48
    assert len(default_plan(programs=tuple(UNITS)).encode) < len(plan.encode)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_graphs": 8}, "max_graphs is 8, but the coarsest ladders have 9 rungs"),
        ({"max_graphs": "8"}, "max_graphs is '8'"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_batched_tokens": 10**400}, "max_num_batched_tokens is 1000"),
        ({"max_segments": 0}, "max_segments is 0"),
        ({"programs": ["sample"]}, "no program 'sample'"),
    ],
)
def test_limits_that_are_wrong_are_told(options, says):
    with pytest.raises(PlanError, match=says):
        default_plan(**options)
