"""On a CUDA GPU the families give the reference's tokens too, alone and in a batch; run where there is one."""

from __future__ import annotations

import importlib.util
import random
import time
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from PIL import Image

import vlmfx
from tests import golden_cases
from tests.golden_cases import COMMITTED, SHARED, Case
from vlmfx.compile.buckets import Plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")

CASES = [pytest.param(case, id=case.name) for case in [*golden_cases.find(COMMITTED), *golden_cases.find(SHARED)]]
PICTURE = Path(vlmfx.__file__).parent / "assets" / "demo.png"
HAS_GRAMMARS = importlib.util.find_spec("llguidance") is not None
FORM = vlmfx.StructuredOutputsParams(regex="(red|green|blue) [0-9]{3}") if HAS_GRAMMARS else None
QUESTIONS = ["What colour is the star?", "How many objects are there?", "Describe the picture."]


@pytest.mark.parametrize("case", CASES)
def test_greedy(case: Case):
    llm = vlmfx.LLM(str(case.model_folder), device="cuda", dtype="float32")
    prompts = case.prompts()
    params = [vlmfx.SamplingParams.greedy(max_tokens=len(p.greedy_ids), ignore_eos=True) for p in prompts]
    together = llm.generate([p.request() for p in prompts], params, use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in together] == [p.greedy_ids for p in prompts]
    for prompt, param in zip(prompts, params, strict=True):
        (alone,) = llm.generate(prompt.request(), param)
        assert list(alone.outputs[0].token_ids) == prompt.greedy_ids


@pytest.mark.parametrize("case", CASES)
def test_captured_programs_give_what_the_functions_give(case: Case):
    """The log-probabilities too, with sampled tokens, in a batch that shrinks; a second round finds prompts in the cache."""
    options: dict[str, Any] = {"device": "cuda", "dtype": "float32"}
    eager = vlmfx.LLM(str(case.model_folder), enforce_eager=True, **options)
    captured = vlmfx.LLM(str(case.model_folder), **options)
    requests = [p.request() for p in case.prompts()] * 2
    params = [vlmfx.SamplingParams(seed=i, max_tokens=4 + i, ignore_eos=True, logprobs=1) for i in range(len(requests))]
    expected = [o.outputs[0].token_ids for o in eager.generate(requests, params, use_tqdm=False)]
    for _ in range(2):
        outputs = captured.generate(requests, params, use_tqdm=False)
        assert [o.outputs[0].token_ids for o in outputs] == expected
    assert captured.executor.memory().num_programs > 0


@pytest.mark.parametrize("case", CASES)
def test_what_is_warm_captures_no_more(case: Case):
    prompts = case.prompts()
    multiple = vlmfx.load(str(case.model_folder), device="cpu").config.vision.patch_multiple
    patches = -(-4096 // multiple) * multiple
    plan = Plan(encode=(patches,), prefill=(32, 2048), decode=(1, 4), max_segments=64, max_seqs=4)
    llm = vlmfx.LLM(str(case.model_folder), device="cuda", dtype="float32", plan=plan, max_num_seqs=4)
    llm.warm_up(use_tqdm=False)
    made = llm.executor.memory().num_programs
    params = [vlmfx.SamplingParams.greedy(max_tokens=len(p.greedy_ids), ignore_eos=True) for p in prompts]
    outputs = llm.generate([p.request() for p in prompts], params, use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [p.greedy_ids for p in prompts]
    assert llm.executor.memory().num_programs == made == 5


def test_more_requests_than_rows_give_what_the_functions_give():
    """Requests of unequal length leave and enter while the other row runs, so that ids outlive the step that made them."""
    prompts = ["Name a colour.", "How many stars are there in the sky at night?", "One.", "Say a word.", "Two things."]
    params = [vlmfx.SamplingParams.greedy(max_tokens=n, ignore_eos=True) for n in (3, 17, 8, 1, 12)]
    answers = [
        vlmfx.LLM("scenes", device="cuda", dtype="float32", max_num_seqs=2, enforce_eager=is_eager).generate(
            prompts, params, use_tqdm=False
        )
        for is_eager in (True, False)
    ]
    eager, captured = ([o.outputs[0].token_ids for o in outputs] for outputs in answers)
    assert captured == eager
    assert [len(ids) for ids in captured] == [3, 17, 8, 1, 12]


def test_scenes_answers_as_on_the_cpu():
    image = Image.open(PICTURE)
    prompts = [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": q}]}]}
        for q in QUESTIONS
    ]
    on_cpu = vlmfx.generate("scenes", prompts, device="cpu", dtype="float32")
    on_gpu = vlmfx.generate("scenes", prompts, device="cuda", dtype="float32")
    assert [o.outputs[0].token_ids for o in on_gpu] == [o.outputs[0].token_ids for o in on_cpu]


def test_the_same_seed_gives_the_same_tokens_in_any_batch():
    llm = vlmfx.LLM("scenes", device="cuda", dtype="float32")
    params = vlmfx.SamplingParams(temperature=1.0, top_p=0.9, max_tokens=24, seed=7)
    other = replace(params, seed=8)
    (alone,) = llm.generate("Name a colour.", params)
    batch = llm.generate(["One.", "Name a colour.", "Two things."], [other, params, other], use_tqdm=False)
    assert batch[1].outputs[0].token_ids == alone.outputs[0].token_ids


def test_all_that_a_request_may_ask_for_at_once_is_what_the_functions_give():
    """Captured and overlapping, in small steps, with texts that share blocks, penalties, masks and forms, beside plain ones."""
    image = Image.open(PICTURE)
    asked = [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": q}]}]}
        for q in QUESTIONS
    ] * 2
    drawn = vlmfx.SamplingParams(temperature=1.0, seed=5, max_tokens=20, ignore_eos=True)
    params = [
        replace(drawn, n=3),
        vlmfx.SamplingParams.greedy(max_tokens=20, ignore_eos=True),
        replace(drawn, repetition_penalty=1.4, presence_penalty=0.5, min_tokens=9, ignore_eos=False),
        replace(drawn, structured_outputs=FORM),
        replace(drawn, logit_bias={40: 3.0}, bad_words=["the", "a star"], n=2),
        replace(drawn, top_k=20, top_p=0.9, logprobs=3),
    ]
    found = []
    for options in ({"enforce_eager": True, "async_scheduling": False}, {"max_num_batched_tokens": 96}):
        llm = vlmfx.LLM("scenes", device="cuda", dtype="float32", max_num_seqs=8, **options)
        outputs = llm.generate(asked, params, use_tqdm=False)
        assert [o.error for o in outputs] == [None] * len(asked)
        found.append([[text.token_ids for text in o.outputs] for o in outputs])
        assert llm.engine.blocks.num_free == llm.engine.blocks.num_blocks
        assert llm.engine.counters.num_encoded == 1
        assert 0 < llm.engine.counters.encoder_seconds < 10
    assert found[0] == found[1]


@pytest.mark.parametrize("case", CASES)
def test_vectors_are_those_of_the_functions(case: Case):
    requests = [p.request() for p in case.prompts()]
    options: dict[str, Any] = {"dtype": "float32", "device": "cuda", "use_tqdm": False}
    eager = vlmfx.embed(str(case.model_folder), requests, enforce_eager=True, **options)
    torch.testing.assert_close(vlmfx.embed(str(case.model_folder), requests, **options), eager, atol=1e-5, rtol=0)


def test_what_other_threads_do_on_the_device_spoils_no_capture():
    is_done = Event()

    def disturb() -> None:
        held: list[torch.Tensor] = []
        while not is_done.is_set():
            held = [*held[-5:], torch.empty(random.randint(1, 1 << 22), pin_memory=True)]
            held[-1].to("cuda", non_blocking=True)
            time.sleep(1e-4)

    others = [Thread(target=disturb, daemon=True) for _ in range(2)]
    for other in others:
        other.start()
    try:
        plan = Plan(encode=(64,), prefill=(16, 64), decode=(1, 2, 4), max_segments=4, max_seqs=4)
        vlmfx.LLM("scenes", device="cuda", plan=plan).warm_up(use_tqdm=False)
    finally:
        is_done.set()
        for other in others:
            other.join()
