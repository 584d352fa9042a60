"""bucket_inputs: what programs are lowered for is what the runner gives them, for every family: trees, shapes, dtypes and strides."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from tests.golden_cases import EVERY, load_model
from tests.pictures import about, picture
from vlmfx.compile.abstract import as_meta
from vlmfx.compile.argument import Argument, TensorSpec
from vlmfx.compile.buckets import Plan
from vlmfx.compile.executor import PlannedExecutor
from vlmfx.compile.inputs import bucket_inputs
from vlmfx.compile.layout import CacheLayout
from vlmfx.engine.drain import drain, run
from vlmfx.engine.engine import Engine
from vlmfx.engine.request import SamplingParams
from vlmfx.engine.sequence import Request
from vlmfx.processing.prompt import prepare

LENGTH = 2000


def on_meta(leaf: Any) -> Any:
    """A leaf's spec, of a tensor elsewhere."""
    return replace(leaf, device=torch.device("meta")) if isinstance(leaf, TensorSpec) else leaf


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("task", ["generate", "embed"])
def test_they_are_what_the_runner_gives(family, task):
    model = load_model(EVERY[family])
    multiple = model.config.vision.patch_multiple
    plan = Plan(
        encode=(-(-6144 // multiple) * multiple,), prefill=(4096,), decode=(4,), pool=(4096,), max_segments=64, max_seqs=4
    )  # fmt: skip
    layout = CacheLayout.of(4, LENGTH)
    prompts = [about(model, picture(70, 40), picture(40, 70)), "Some words", about(model, picture(30, 30))]
    requests = [prepare(model.processor, prompt) for prompt in prompts]
    example = requests[2].vision
    assert example is not None
    seen = []

    def make(name: str, size: int, fn: Any, bound: Any, inputs: Any) -> Any:
        seen.append(name)
        made = bucket_inputs(model.program_set, name, size, plan=plan, layout=layout, example=example)
        expected = Argument.of("inputs", made)
        found = Argument.of("inputs", inputs)
        assert found == expected
        assert Argument.of("inputs", as_meta(made)).leaves == tuple(map(on_meta, expected.leaves))
        return partial(fn, *bound)

    executor = PlannedExecutor(
        model.program_set, model.params, plan=plan, layout=layout, make=make, strict=True, chains_sampling=True
    )
    if task == "embed":
        made = Engine(model, executor, max_num_seqs=4)
        asked = [
            replace(Request.ready(i, r, SamplingParams.greedy(), 0.0), pools=True) for i, r in enumerate(requests * 2)
        ]
        outputs = list(drain(made, asked, lambda number, text: None))  # two passes
        assert [o.error for o in outputs] == [None] * 6
        assert seen == ["encode", "pool"]
        return
    params = [SamplingParams.greedy(max_tokens=3), SamplingParams(max_tokens=2), SamplingParams.greedy(max_tokens=2)]
    batch = [Request.ready(i, r, p, 0.0) for i, (r, p) in enumerate(zip(requests, params, strict=True))]
    outputs = list(run(model, batch, max_num_seqs=4, executor=executor))
    assert [o.error for o in outputs] == [None] * 3
    assert seen == ["encode", "prefill", "decode"]
    assert torch.is_grad_enabled()
