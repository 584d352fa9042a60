"""The engine on tiny checkpoints: in float32 nothing that it does for others, or for want of room, changes a request's tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden_cases import EVERY, TINY, load_model
from tests.invariants import overwriting, token_ids
from tests.pictures import about, mixed, picture
from vlmfx import LLM, InvalidRequest, SamplingParams
from vlmfx.checkpoint import Model
from vlmfx.compile.buckets import Plan
from vlmfx.compile.executor import EagerExecutor, PlannedExecutor
from vlmfx.compile.layout import BLOCK_SIZE, CacheLayout
from vlmfx.engine import runner
from vlmfx.engine.drain import drain
from vlmfx.engine.engine import Engine
from vlmfx.engine.observer import Observer
from vlmfx.engine.request import RequestOutput
from vlmfx.engine.sequence import Request
from vlmfx.errors import InternalError
from vlmfx.processing.prompt import prepare

NUM_TOKENS = 12


def greedy(n: int = NUM_TOKENS) -> SamplingParams:
    return SamplingParams.greedy(max_tokens=n, ignore_eos=True)


@lru_cache
def alone(family: str) -> list[tuple[int, ...]]:
    model = load_model(EVERY[family])
    return [LLM(model).generate(p, greedy())[0].outputs[0].token_ids for p in mixed(model)]


@lru_cache
def requests(family: str) -> list[Request]:
    model = load_model(EVERY[family])
    return [Request.ready(i, prepare(model.processor, p), greedy(), 0.0) for i, p in enumerate(mixed(model))]


def blocks_for_longest(family: str) -> int:
    return -(-max(r.num_tokens + NUM_TOKENS for r in requests(family)) // BLOCK_SIZE)


def most_patches(family: str) -> int:
    """Of one image."""
    return max(len(i.vision.position_ids) for r in requests(family) for i in r.load().media)


def executor_of(
    model: Model, num_blocks: int, max_blocks: int, planned: Sequence[int] = (), max_patches: int = 0
) -> Any:
    """The functions as they are, or with rungs of tokens behind buckets, which a strict plan refuses to leave."""
    layout = CacheLayout(num_blocks=num_blocks, max_blocks=max_blocks)
    if not planned:
        return EagerExecutor(model.program_set, model.params, layout=layout)
    multiple = model.config.vision.patch_multiple
    patches = -(-max_patches // multiple) * multiple
    plan = Plan(encode=(patches,), prefill=tuple(sorted(set(planned))), decode=(2, 5, 8), max_segments=32, max_seqs=4)
    return PlannedExecutor(model.program_set, model.params, plan=plan, layout=layout, make=overwriting, strict=True)


def is_empty(engine: Engine) -> bool:
    return engine.blocks.num_free == engine.blocks.num_blocks and not engine.features.num_pinned


@settings(deadline=None, max_examples=4)
@given(data=st.data())
@pytest.mark.parametrize("family", EVERY)
def test_order_aborts_preemptions_chunks_buckets_and_caches_do_not_show(family, data):
    model, asked = load_model(EVERY[family]), requests(family)
    need = blocks_for_longest(family)
    engine = Engine(
        model,
        executor_of(
            model,
            need + data.draw(st.integers(0, need)),
            need,
            data.draw(st.lists(st.sampled_from([7, 16, 60, 130]), max_size=3)),
            most_patches(family),
        ),
        max_num_seqs=data.draw(st.integers(1, 8)),
        max_num_batched_tokens=data.draw(st.sampled_from([20, 60, 200])),
        feature_cache_bytes=data.draw(st.sampled_from([0, 1 << 12, 1 << 24])),
        caches_prefixes=data.draw(st.booleans()),
        overlaps=data.draw(st.booleans()),
    )
    order = data.draw(st.permutations(range(len(asked))))
    aborted = data.draw(st.sets(st.sampled_from(range(len(asked))), max_size=2))
    may_be_lost = set(aborted)
    found: dict[int, Any] = {}
    for number in order:
        engine.add(replace(asked[number], priority=data.draw(st.integers(0, 1))))
    for _ in range(2000):
        for event in engine.step():
            if event.output is not None:
                found[event.request.number] = event.output
        if aborted and data.draw(st.booleans()):
            engine.abort(aborted.pop())
        if not engine.has_work:
            break
    assert not engine.has_work
    assert set(order) - may_be_lost <= found.keys()
    for number, output in found.items():
        assert output.error is None
        ids, expected = output.outputs[0].token_ids, alone(family)[number]
        assert ids == expected[: len(ids)]
        assert len(ids) == NUM_TOKENS or output.outputs[0].finish_reason == "abort"
    assert is_empty(engine)
    engine.close()


@pytest.mark.parametrize("family", TINY)
def test_many_questions_about_one_image_encode_it_once(family):
    model = load_model(TINY[family])
    llm = LLM(model, max_num_seqs=8)
    image = picture(60, 50)
    prompts = [about(model, image, text=f"Question {n}?") for n in range(8)]
    expected = [LLM(model).generate(p, greedy())[0].outputs[0].token_ids for p in prompts]
    outputs = llm.generate(prompts, greedy(), use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == expected
    assert llm.engine.counters.num_encoded == 1
    llm.generate(about(model, image, text="Another?"), greedy())
    assert llm.engine.counters.num_encoded == 1
    llm.generate(about(model, picture(50, 60), text="Another?"), greedy())
    assert llm.engine.counters.num_encoded == 2


def test_prompts_that_begin_alike_are_computed_once_until_the_cache_is_reset():
    model = load_model(TINY["qwen2_vl"])
    llm, prompt = LLM(model), about(model, picture(60, 40), text="A question that is long enough to fill a block. " * 3)
    expected = LLM(model, enable_prefix_caching=False).generate(prompt, greedy())[0].outputs[0].token_ids
    length = llm.count_tokens(prompt)
    found = []
    for _ in range(2):
        before = llm.get_metrics()
        assert llm.generate(prompt, greedy())[0].outputs[0].token_ids == expected
        after = llm.get_metrics()
        found.append([after[name] - before[name] for name in ("num_cached", "num_prompt_tokens", "num_encoded")])
    cached = (length - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert found == [[0, length, 1], [cached, length - cached, 0]]
    assert llm.reset_prefix_cache()
    before = llm.get_metrics()
    assert before["feature_bytes"] == 0
    assert llm.generate(prompt, greedy())[0].outputs[0].token_ids == expected
    assert llm.get_metrics()["num_cached"] == before["num_cached"]


def test_an_image_that_cannot_be_encoded_fails_those_who_ask_about_it(monkeypatch):
    model = load_model(TINY["qwen2_vl"])
    good, bad = picture(60, 50), picture(120, 112)
    size = prepare(model.processor, about(model, bad)).media[0].vision.position_ids.shape[0]
    expected = LLM(model).generate(about(model, good), greedy())[0].outputs[0].token_ids
    encode = EagerExecutor.encode

    def fail(self: Any, inputs: Any) -> torch.Tensor:
        if size in inputs.cu_seqlens.diff().tolist():
            raise RuntimeError("out of memory")
        return encode(self, inputs)

    monkeypatch.setattr(EagerExecutor, "encode", fail)
    llm = LLM(model)
    with pytest.warns(UserWarning, match="2 of 4 prompts failed"):
        outputs = llm.generate([about(model, i) for i in (good, bad, good, bad)], greedy(), use_tqdm=False)
    assert [o.error is None for o in outputs] == [True, False, True, False]
    assert [outputs[i].outputs[0].token_ids for i in (0, 2)] == [expected] * 2
    assert is_empty(llm.engine)


def test_a_request_that_the_cache_can_never_hold_is_refused_at_once():
    model = load_model(TINY["llava"])
    engine = Engine(model, executor_of(model, 2, 2), max_num_seqs=2)
    small, large = (
        Request.ready(n, prepare(model.processor, {"prompt_token_ids": [5] * size}), greedy(40), 0.0)
        for n, size in ((0, 20), (1, 32))
    )
    with pytest.raises(
        InvalidRequest, match=r"it is 32 tokens long, but the cache holds 32 in all; shorten it"
    ) as caught:
        engine.add(large)
    assert caught.value.field == "prompt"
    outputs: list[Any] = list(drain(engine, [small, large], lambda number, text: None))
    by_number = {o.request_id: o for o in outputs}
    assert isinstance(by_number["1"].error, InvalidRequest)
    assert len(by_number["0"].outputs[0].token_ids) == 12, "as many as there is room for"
    assert by_number["0"].outputs[0].finish_reason == "length"


def test_a_caller_that_stops_leaves_nothing_behind():
    model = load_model(TINY["llava"])
    llm = LLM(model)

    def stop(number: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Hello"] * 3, greedy(), use_tqdm=False, on_text=stop)
    assert not llm.engine.has_work
    assert is_empty(llm.engine)
    assert token_ids(llm.generate(mixed(model), greedy(), use_tqdm=False)) == [list(ids) for ids in alone("llava")]


def test_a_call_within_a_call_is_refused_and_harms_nothing():
    model = load_model(TINY["llava"])
    llm, nested = LLM(model), []

    def again(number: int, text: str) -> None:
        with pytest.raises(
            InvalidRequest, match="the LLM is answering another call; pass all prompts in one call"
        ) as caught:
            llm.generate("Hello", greedy())
        nested.append(caught.value)

    found = token_ids(llm.generate(mixed(model), greedy(), use_tqdm=False, on_text=again))
    assert found == [list(ids) for ids in alone("llava")]
    assert nested


def test_a_step_that_is_run_again_is_told_of(monkeypatch, caplog):
    model, decode = load_model(TINY["llava"]), runner.decode

    def fail(model: Any, ids: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if len(ids) > 1:
            raise RuntimeError("no such program")
        return decode(model, ids, *args)

    monkeypatch.setattr(runner, "decode", fail)
    with caplog.at_level(logging.WARNING, "vlmfx"):
        LLM(model).generate(["Hello", "There"], greedy(3), use_tqdm=False)
    assert "a step failed for 2 texts (no such program); it is run again for each alone" in caplog.text


def test_more_texts_than_a_plan_lets_begin_at_once_are_refused():
    model = load_model(TINY["llava"])
    executor = executor_of(model, 64, 8, [64], 16)
    engine = Engine(model, executor, max_num_seqs=8)
    made = prepare(model.processor, {"prompt_token_ids": [5] * 4})
    several = SamplingParams(n=executor.plan.max_seqs + 1, temperature=1.0, max_tokens=2)
    with pytest.raises(InvalidRequest, match=r"n: it is 5, but only 4 texts can begin at once"):
        engine.add(Request.ready(0, made, several, 0.0))
    engine.add(Request.ready(0, made, replace(several, n=4), 0.0))
    outputs = [event.output for _ in range(20) for event in engine.step() if event.output is not None]
    assert [len(o.outputs) for o in outputs if isinstance(o, RequestOutput)] == [4]


def test_an_observer_that_fails_fails_the_request_and_leaves_nothing():
    class Faulty(Observer):
        def began(self, request: Request, inputs: Any) -> None:
            raise RuntimeError("a fault")

    llm = LLM(load_model(TINY["llava"]))
    llm.engine.observer = Faulty()
    with pytest.raises(InternalError, match="a fault"):
        llm.generate("Hello", greedy())
    assert not llm.engine.has_work
    llm.engine.observer = Observer()
    assert len(llm.generate("Hello", greedy())[0].outputs[0].token_ids) == NUM_TOKENS


@pytest.mark.parametrize("pools", [False, True])
def test_what_a_strict_plan_has_no_room_for_is_refused_before_it_runs(pools):
    model = load_model(TINY["qwen2_vl"])
    small = prepare(model.processor, about(model, picture(60, 50)))
    patches = len(small.media[0].vision.position_ids)
    plan = Plan(encode=(patches,), prefill=(64,), pool=(150,), decode=(2,), max_segments=4, max_seqs=2)
    layout = CacheLayout.of(2, 256)
    executor = PlannedExecutor(model.program_set, model.params, plan=plan, layout=layout, make=overwriting, strict=True)
    llm = LLM(model)
    engine = Engine(model, executor, max_num_seqs=2)

    def ends(prompt: Any) -> Any:
        made = llm.request(0, prompt, greedy(2))
        engine.add(replace(made, pools=pools))
        while engine.has_work:
            for event in engine.step():
                if event.output is not None:
                    return event.output

    large = ends(about(model, picture(300, 300)))
    assert isinstance(large.error, InvalidRequest)
    assert large.error.field == "multi_modal_data.image"
    assert ends(about(model, picture(60, 50))).error is None
    if pools:
        with pytest.raises(InvalidRequest, match=r"prompt: it is 200 tokens long, but the plan's largest pool"):
            ends({"prompt_token_ids": [5] * 200})
    else:
        assert ends({"prompt_token_ids": [5] * 200}).error is None, "it comes in parts"
