"""Executors: which sizes are padded, which run as they are and which are refused; one cache, programs made once."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests import rows
from tests.golden_cases import TINY, load_model
from tests.invariants import is_one_sentence
from vlmfx.compile.buckets import Plan
from vlmfx.compile.executor import PlannedExecutor
from vlmfx.compile.layout import CacheLayout
from vlmfx.errors import PlanError
from vlmfx.processing.prompt import prepare
from vlmfx.tree import leaves

PLAN = Plan(encode=(64, 128), prefill=(8, 32), decode=(1, 4), max_segments=3, max_seqs=2)


def executor(made: list[Any], strict: bool) -> PlannedExecutor:
    model = load_model(TINY["qwen2_vl"])

    def make(name: str, size: int, fn: Any, bound: Any, inputs: Any) -> Any:
        made.append((name, size))
        return partial(fn, *bound)

    layout = CacheLayout.of(4, 64)
    return PlannedExecutor(model.program_set, model.params, plan=PLAN, layout=layout, make=make, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_sizes_within_the_plan_have_the_smallest_bucket(strict):
    planned = executor([], strict)
    sizes = {"encode": (1, 64, 65, 128), "prefill": (8, 9), "decode": (1, 2, 4)}
    found = {name: [planned.bucket(name, size) for size in of_program] for name, of_program in sizes.items()}
    assert found == {"encode": [64, 64, 128, 128], "prefill": [8, 32], "decode": [1, 4, 4]}
    assert (planned.bucket("encode", 5, 3), planned.bucket("prefill", 5, 2)) == (64, 8)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            ("encode", 129),
            "encode: a step of 129 patches has no bucket, as the plan goes from 1 to 128; change the step",
        ),
        (("encode", 5, 4), "encode: a step has 4 segments, expected at most 3 by the plan; send fewer."),
        (("prefill", 5, 3), "prefill: a step has 3 sequences, expected at most 2 by the plan; send fewer."),
        (("pool", 5), "pool: the plan has no rungs for it; use a plan with some."),
    ],
)
def test_what_is_beyond_the_plan_is_not_padded_or_is_refused(step, message):
    assert executor([], strict=False).bucket(*step) is None
    with pytest.raises(PlanError) as caught:
        executor([], strict=True).bucket(*step)
    assert str(caught.value).startswith(message)
    assert is_one_sentence(caught.value)


@torch.no_grad()
def test_more_sequences_than_the_plan_has_run_as_they_are_though_their_tokens_fit_a_bucket():
    made: list[Any] = []
    planned, model = executor(made, strict=False), load_model(TINY["qwen2_vl"])
    requests = [prepare(model.processor, {"prompt_token_ids": [5, 6 + i, 7, 8][: 4 - i // 2]}) for i in range(3)]
    requests.append(
        prepare(model.processor, {"prompt_token_ids": [9] * (32 - sum(len(r.token_ids) for r in requests))})
    )
    lens = [64] * 4
    ids, _ = rows.prefill(model, requests, lens, planned)
    expected, _ = rows.prefill(model, requests, lens, rows.paged(model, 4, 64))
    assert made == []
    assert torch.equal(ids, expected)
    two, _ = rows.prefill(model, requests[:2], lens[:2], planned)
    assert made == [("prefill", 8)]
    assert torch.equal(two, expected[:2])


def test_there_is_one_cache_made_when_it_is_asked_for():
    planned = executor([], strict=False)
    assert planned.memory() == (0, 0, 0)
    assert planned.cache is planned.cache
    assert planned.memory().cache == sum(t.nbytes for t in leaves(planned.cache)) > 0
