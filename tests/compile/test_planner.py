"""The plan of a trace: sound, never worse than the default one where it has its graphs, and no graph more than is asked for."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmfx.compile.choose import choices, padding_share
from vlmfx.compile.ladders import default_plan
from vlmfx.compile.planner import COMPILE_S, plan_trace
from vlmfx.compile.trace import TraceRequest, steps
from vlmfx.errors import InvalidRequest, PlanError

REQUESTS = st.lists(
    st.builds(
        TraceRequest,
        num_tokens=st.integers(1, 3000),
        num_patches=st.integers(0, 3000),
        max_tokens=st.sampled_from([None, 0, 16]),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=50)
@given(requests=REQUESTS, max_graphs=st.integers(20, 60))
def test_the_plan_covers_the_trace_and_its_limits(requests, max_graphs):
    comparison = plan_trace(requests, max_graphs=max_graphs, max_num_batched_tokens=2048, max_patches=2000)
    plan = comparison.plan
    for program, sizes in steps(requests, 2048).items():
        assert all(plan.bucket(program, size) >= size for size in sizes)
    assert plan.num_graphs <= plan.max_graphs == max_graphs
    assert all(rung % 4 == 0 for rung in plan.encode)
    assert all(rung % 16 == 0 for rung in (*plan.prefill, *plan.pool))
    assert not plan.prefill or plan.prefill[-1] >= 2048
    assert not plan.encode or plan.encode[-1] >= 2000
    assert [row.program for row in comparison.rows] == [p for p in COMPILE_S if plan.rungs(p)]


def requests(number: int = 500) -> list[TraceRequest]:
    """Questions about images of a few usual sizes, and questions without."""
    draw = random.Random(0)
    patches = [draw.choice([0, 576, 1024, 2304, 4 * draw.randint(100, 900)]) for _ in range(number)]
    return [TraceRequest(num_tokens=n // 4 + draw.randint(10, 200), num_patches=n) for n in patches]


def test_it_wastes_less_than_the_default_plan():
    comparison = plan_trace(requests())
    for row in comparison.rows:
        if row.share is not None and row.default_share is not None:
            assert row.share < row.default_share / 2
    assert comparison.plan.decode == default_plan().decode


def test_a_dear_program_gets_more_graphs():
    cheap = plan_trace(requests(), weights={"encode": 0.01, "prefill": 1}).plan
    dear = plan_trace(requests(), weights={"encode": 100, "prefill": 1}).plan
    assert len(cheap.encode) < len(dear.encode)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_max_padding_takes_as_few_graphs_as_do(share):
    comparison = plan_trace(requests(), max_padding=share)
    for row in comparison.rows:
        if row.share is not None:
            assert row.share <= share
            sizes = steps(requests(), 8192)[row.program]
            most = comparison.plan.rungs(row.program)[-1]
            multiple = 4 if row.program == "encode" else 16
            rounded = [-(-size // multiple) * multiple for size in sizes]
            assert padding_share(choices(rounded, row.num_graphs - 1, most=most)[-1], sizes) > share


def test_a_share_out_of_reach_is_told_with_the_one_that_is_not():
    with pytest.raises(InvalidRequest) as caught:
        plan_trace(requests(), max_padding=0.001)
    assert caught.value.message == (
        f"0.001 is not reached with 37 graphs for encode and prefill, {caught.value.expected} is; "
        "use that or raise max_graphs."
    )
    reached = plan_trace(requests(), max_padding=caught.value.expected)
    assert reached.plan.num_graphs <= 48
    with pytest.raises(InvalidRequest, match="is not reached"):
        plan_trace(requests(), max_padding=caught.value.expected - 0.001)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_what_is_no_share_is_told(share):
    with pytest.raises(InvalidRequest, match="expected a share from 0 to 1"):
        plan_trace(requests(), max_padding=share)


def test_limits_that_are_wrong_are_told():
    with pytest.raises(PlanError, match="max_graphs is 5, but the coarsest ladders have 9"):
        plan_trace(requests(), max_graphs=5)
    with pytest.raises(PlanError, match="patch_multiple is 0"):
        plan_trace(requests(), patch_multiple=0)


def test_a_trace_without_images_is_told_that_its_plan_has_none():
    comparison = plan_trace([TraceRequest(num_tokens=20)])
    assert comparison.plan.encode == ()
    assert "no bucket for any" in str(comparison)
    assert "no bucket for any" not in str(plan_trace(requests(9)))


def test_the_table():
    trace = [TraceRequest(num_tokens=30, num_patches=96)] * 3 + [TraceRequest(num_tokens=20)]
    compile_s = {"encode": 5.0, "prefill": 4.0, "decode": 2.0}
    comparison = plan_trace(trace, max_num_seqs=4, max_num_batched_tokens=64, max_patches=128, compile_s=compile_s)
    assert str(comparison) == TABLE


TABLE = """\
program   requests    graphs (default)   padding (default)   compile
encode           3         2         3      0.0%     25.0%      10 s
prefill          4         2         4     14.1%     14.1%       8 s
decode           4         3         3         –         –       6 s
all                        7        10                          24 s

encode, patches: 96 128

prefill, tokens: 32 64

decode, sequences: 1 2 4

Padding is the share of what runs, each request in steps of its own; compile is time on one core, summed over graphs.
A trace does not tell how many sequences decode together: decode has the default ladder, up to 4 (--max-num-seqs)."""
