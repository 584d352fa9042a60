"""Plans: a size runs in the smallest bucket that covers it, and what is not sound is said in a sentence."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmfx.compile.buckets import MAX_SIZE, UNITS, Plan
from vlmfx.errors import PlanError

RUNGS = st.lists(st.integers(1, 10_000), unique=True, max_size=12).map(lambda sizes: tuple(sorted(sizes)))
PLANS = st.builds(
    Plan,
    **dict.fromkeys(UNITS, RUNGS),
    max_segments=st.integers(1, 999),
    max_seqs=st.integers(1, 999),
    max_graphs=st.integers(48, 99),
)
SOUND = {"encode": [64, 128], "prefill": [16], "max_segments": 8, "max_seqs": 4, "max_graphs": 48}


@given(plan=PLANS, program=st.sampled_from(list(UNITS)), data=st.data())
def test_every_size_in_range_has_the_smallest_bucket_that_covers_it(plan, program, data):
    rungs = plan.rungs(program)
    if rungs:
        size = data.draw(st.integers(1, rungs[-1]))
        assert plan.bucket(program, size) == min(rung for rung in rungs if rung >= size)


@given(plan=PLANS, program=st.sampled_from(list(UNITS)), beyond=st.integers(1, 10**9))
def test_a_size_outside_the_plan_is_an_error(plan, program, beyond):
    for size in (max(plan.rungs(program), default=0) + beyond, 1 - beyond):
        with pytest.raises(PlanError, match=f"^{program}: "):
            plan.bucket(program, size)


def test_the_error_names_program_size_and_largest_rung():
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(SOUND).bucket("encode", 129)
    assert str(caught.value) == (
        "encode: a step of 129 patches has no bucket, as the plan goes from 1 to 128; "
        "change the step or use a plan that covers it."
    )


@given(plan=PLANS)
def test_json_gives_the_plan_back(plan):
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


def test_what_is_left_out_has_no_rungs():
    plan = Plan.from_dict(SOUND)
    assert (plan.decode, plan.pool, plan.num_graphs) == ((), (), 3)
    assert Plan.from_dict({"max_segments": 1, "max_seqs": 1}).max_graphs == 48


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prefil": [1]}, "no field 'prefil'"),
        ({"encode": [64, 64]}, "encode has 64 after 64, expected increasing rungs"),
        ({"encode": [128, 64]}, "encode has 64 after 128, expected increasing rungs"),
        ({"encode": [0, 64]}, f"a rung of encode is 0, expected a whole number from 1 to {MAX_SIZE}"),
        ({"encode": [MAX_SIZE + 1]}, "a rung of encode is 2147483648, expected"),
        ({"encode": [64.0]}, "a rung of encode is 64.0, expected"),
        ({"encode": [True]}, "a rung of encode is True, expected"),
        ({"encode": 64}, "encode is 64, expected a list of sizes"),
        ({"encode": None}, "encode is None, expected a list of sizes"),
        ({"max_seqs": 0}, "max_seqs is 0, expected"),
        ({"max_segments": "8"}, "max_segments is '8', expected"),
        ({"max_graphs": -1}, "max_graphs is -1, expected"),
        ({"max_graphs": 2}, "3 rungs in all, expected at most 2"),
        ({"decode": list(range(1, 47))}, "49 rungs in all, expected at most 48"),
    ],
)
def test_a_plan_that_is_not_sound_is_told(change, says):
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(SOUND | change)
    assert says in str(caught.value)
    assert str(caught.value).count(". ") == 0


@pytest.mark.parametrize("missing", ["max_segments", "max_seqs"])
def test_a_missing_maximum_is_told(missing):
    with pytest.raises(PlanError, match=f"{missing} is missing"):
        Plan.from_dict({name: value for name, value in SOUND.items() if name != missing})


@pytest.mark.parametrize(
    ("text", "says"), [("{", "it is not JSON"), ("[1]", "expected an object"), ("[" * 10**5, "it is not JSON")]
)
def test_what_is_no_plan_is_told(text, says):
    with pytest.raises(PlanError, match=says):
        Plan.from_json(text)


def test_an_unknown_program_is_told():
    with pytest.raises(PlanError, match="no program 'sample'; use one of encode, prefill, decode, pool"):
        Plan.from_dict(SOUND).bucket("sample", 1)
