"""warm_up: the programs that requests will use, and nothing of it shows."""

from __future__ import annotations

from typing import Any

import pytest

from tests.golden_cases import EVERY, load_model
from tests.invariants import overwriting
from tests.pictures import about, picture
from vlmfx import LLM, SamplingParams
from vlmfx.compile.buckets import Plan
from vlmfx.compile.executor import PlannedExecutor
from vlmfx.compile.layout import CacheLayout
from vlmfx.engine.drain import drain
from vlmfx.engine.engine import Engine
from vlmfx.engine.sequence import Request
from vlmfx.engine.warm_up import warm_up
from vlmfx.processing.prompt import prepare


@pytest.mark.parametrize("family", EVERY)
def test_what_is_made_is_what_requests_use(family):
    model = load_model(EVERY[family])
    multiple = model.config.vision.patch_multiple
    patches = -(-1200 // multiple) * multiple
    plan = Plan(encode=(patches,), prefill=(16, 600), decode=(1, 2), max_segments=16, max_seqs=2)
    made: list[Any] = []

    def make(name: str, size: int, fn: Any, bound: Any, inputs: Any) -> Any:
        made.append((name, size))
        return overwriting(name, size, fn, bound, inputs)

    layout = CacheLayout.of(2, 800)
    executor = PlannedExecutor(model.program_set, model.params, plan=plan, layout=layout, make=make)
    warm_up(model, executor, use_tqdm=False)
    assert sorted(made) == sorted((name, size) for name in plan.programs for size in plan.rungs(name))
    params = SamplingParams.greedy(max_tokens=4, ignore_eos=True)
    prompt = about(model, picture(30, 30))
    expected = LLM(model).generate(prompt, params)[0].outputs[0].token_ids
    engine = Engine(model, executor, max_num_seqs=2)
    request = Request.ready(0, prepare(model.processor, prompt), params, 0.0)
    (output,) = list(drain(engine, [request], lambda number, text: None))
    assert output.outputs[0].token_ids == expected  # type: ignore[index]
    assert len(made) == 5
