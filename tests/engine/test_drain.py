"""drain: requests that other threads make join as they are ready, in order, and none is lost where one of them is wrong."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest

from tests.golden_cases import TINY, load_model
from tests.invariants import token_ids
from tests.pictures import mixed
from vlmfx import LLM, SamplingParams
from vlmfx.engine.drain import drain
from vlmfx.engine.request import RequestOutput
from vlmfx.errors import InvalidRequest

GREEDY = SamplingParams.greedy(max_tokens=8, ignore_eos=True)


def silent(number: int, text: str) -> None:
    """No streaming."""


def test_a_request_is_answered_while_the_next_is_being_made():
    llm, may_go_on = LLM(load_model(TINY["llava"])), Event()

    def second() -> Any:
        may_go_on.wait(60)
        return llm.request(1, "Hello", GREEDY)

    with ThreadPoolExecutor() as threads:
        outputs = drain(llm.engine, [threads.submit(llm.request, 0, "Hello", GREEDY), threads.submit(second)], silent)
        first = next(outputs)
        assert first.request_id == "0"
        assert not may_go_on.is_set()
        may_go_on.set()
        assert [output.request_id for output in outputs] == ["1"]


def test_what_cannot_be_made_is_an_output_among_the_others():
    model = load_model(TINY["qwen2_vl"])
    prompts = mixed(model)
    alone = [token_ids(LLM(model).generate(prompt, GREEDY))[0] for prompt in prompts]
    llm = LLM(model)
    futures: list[Any] = []
    for number, prompt in enumerate(prompts):
        future: Future[Any] = Future()
        future.set_result(llm.request(number, prompt, GREEDY))
        futures.append(future)
    bad: Future[Any] = Future()
    bad.set_result(RequestOutput.failed("99", InvalidRequest("prompt", "it is bad.")))
    futures[3:3] = [
        bad,
        llm.request(98, "Hello", SamplingParams(n=llm.engine.limits.max_num_seqs + 1, temperature=1.0)),
    ]
    found: dict[str, Any] = {output.request_id: output for output in drain(llm.engine, futures, silent)}
    assert token_ids([found[str(number)] for number in range(len(prompts))]) == alone
    assert [found[name].error.field for name in ("99", "98")] == ["prompt", "n"]


def test_a_caller_that_stops_cancels_what_is_not_made():
    llm = LLM(load_model(TINY["llava"]))
    later: Future[Any] = Future()
    outputs = drain(llm.engine, [llm.request(0, "Hello", GREEDY), llm.request(1, "Hello", GREEDY), later], silent)
    next(outputs)
    outputs.close()  # type: ignore[attr-defined]
    assert later.cancelled()
    assert not llm.engine.has_work


def test_an_exception_of_a_future_is_the_caller_s():
    llm = LLM(load_model(TINY["llava"]))
    broken: Future[Any] = Future()
    broken.set_exception(KeyError("a fault"))
    with pytest.raises(KeyError):
        list(drain(llm.engine, [llm.request(0, "Hello", GREEDY), broken], silent))
    assert not llm.engine.has_work
