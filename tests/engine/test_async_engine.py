"""AsyncEngine: what coroutines get of it, and what they cannot do to each other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from tests.golden_cases import TINY, load_model
from tests.invariants import token_ids
from tests.pictures import mixed
from vlmfx import LLM, InvalidRequest, SamplingParams
from vlmfx.engine.async_engine import AsyncEngine
from vlmfx.engine.request import RequestOutput
from vlmfx.errors import DeadlineExceeded, EngineFull, InternalError

GREEDY = SamplingParams.greedy(max_tokens=12, ignore_eos=True)
LONG = SamplingParams.greedy(max_tokens=150, ignore_eos=True)


@asynccontextmanager
async def engine_of(family: str = "qwen2_vl", max_waiting: int = 1024, **options: Any) -> AsyncIterator[AsyncEngine]:
    llm = LLM(load_model(TINY[family]), **options)
    engine = AsyncEngine(llm.engine, llm.request, max_waiting=max_waiting)
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.close)
        assert llm.engine.blocks.num_free == llm.engine.blocks.num_blocks
        assert llm.engine.features.num_pinned == 0


async def last(engine: AsyncEngine, prompt: Any, params: SamplingParams, **options: Any) -> Any:
    output = None
    async for output in engine.generate(prompt, params, **options):  # noqa: B007
        pass
    assert output is not None
    assert output.finished
    return output


def run(test: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("overlaps", [False, True])
def test_requests_that_come_at_any_time_get_the_tokens_that_they_get_alone(family, overlaps):
    model = load_model(TINY[family])
    prompts = mixed(model)
    alone = [token_ids(LLM(model).generate(p, GREEDY))[0] for p in prompts]

    async def test() -> None:
        async with engine_of(family, max_num_seqs=3, async_scheduling=overlaps) as engine:

            async def later(i: int) -> Any:
                await asyncio.sleep(0.01 * (i * 7 % 5))
                return await last(engine, prompts[i], GREEDY)

            outputs = await asyncio.gather(*map(later, range(len(prompts))))
            assert token_ids(outputs) == alone
            assert engine.num_requests == 0

    run(test)


def test_what_comes_grows_to_the_whole():
    async def test() -> None:
        async with engine_of() as engine:
            seen = [output async for output in engine.generate("Hello", GREEDY)]
            texts = [o.outputs[0].text for o in seen]
            assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
            assert [o.finished for o in seen] == [False] * (len(seen) - 1) + [True]
            assert len(seen) > 2
            ids = [o.outputs[0].token_ids for o in seen]
            assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(ids))

    run(test)


def test_a_reader_that_stops_ends_its_request():
    async def test() -> None:
        async with engine_of(max_num_seqs=1) as engine:
            async for _ in engine.generate("Hello", LONG):
                break
            await last(engine, "Hello", SamplingParams.greedy(max_tokens=1))
            task = asyncio.create_task(last(engine, "Hello", LONG))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await last(engine, "Hello", SamplingParams.greedy(max_tokens=1))
            assert engine.num_requests == 0
            assert not engine.engine.scheduler.running
            num_drawn = engine.engine.counters.num_drawn
            await asyncio.sleep(0.05)
            assert engine.engine.counters.num_drawn == num_drawn < 250, "of 302 if both went to their ends"

    run(test)


def test_events_hold_what_is_new_and_say_when_a_text_ends():
    drawn = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=20, logprobs=1)

    async def test() -> None:
        async with engine_of() as engine:
            stream = engine.events(lambda numbers: [engine.make(numbers[0], "Hello", drawn)])
            events = [event async for some in stream for event in some]
            output = events[-1].output
            assert isinstance(output, RequestOutput)
            for text in output.outputs:
                mine = [event for event in events if event.index == text.index]
                assert "".join(event.text for event in mine) == text.text
                assert sum((event.token_ids for event in mine), ()) == text.token_ids
                assert [entry for event in mine for entry in event.logprobs] == text.logprobs
                assert [event.finish_reason for event in mine] == [None] * (len(mine) - 1) + [text.finish_reason]
            assert [event.output is None for event in events] == [True] * (len(events) - 1) + [False]
            *_, before, last = [output async for output in engine.generate("Hello", drawn)]
            assert [len(o.logprobs or ()) for o in before.outputs] == [len(o.token_ids) for o in before.outputs]
            for earlier, later in zip(before.outputs, last.outputs, strict=True):
                assert earlier.token_ids == later.token_ids[: len(earlier.token_ids)]
                assert later.text.startswith(earlier.text)

    run(test)


def test_several_requests_of_one_reader_end_together_where_one_fails():
    async def test() -> None:
        async with engine_of() as engine:

            def make(numbers: list[int]) -> Any:
                return [engine.make(number, "Hello", LONG) for number in numbers]

            def make_with_one_bad(numbers: list[int]) -> Any:
                bad = replace(make(numbers[2:])[0], num_tokens=10**9)
                return [*make(numbers[:2]), bad]

            outputs = [
                event.output async for some in engine.events(make, 3, wants_all=False) for event in some
            ]  # fmt: skip
            assert sorted(o.request_id for o in outputs if o is not None) == ["0", "1", "2"]
            with pytest.raises(InvalidRequest, match="the cache holds"):
                async for _ in engine.events(make_with_one_bad, 3):
                    pass
            await last(engine, "Hello", SamplingParams.greedy(max_tokens=1))
            assert engine.num_requests == 0
            assert not engine.engine.scheduler.running

    run(test)


def test_bad_requests_fail_alone_and_at_once():
    async def test() -> None:
        async with engine_of() as engine:
            good = asyncio.create_task(last(engine, "Hello", GREEDY))
            bad: Any
            for bad in ("", {"prompt": "x", "images": 1}, {"prompt_token_ids": [10**9]}, 7):
                with pytest.raises(InvalidRequest):
                    await last(engine, bad, GREEDY)
            assert len((await good).outputs[0].token_ids) == 12

    run(test)


def test_a_queue_that_is_full_refuses():
    async def test() -> None:
        async with engine_of(max_num_seqs=1, max_waiting=2) as engine:
            tasks = [asyncio.create_task(last(engine, "Hello", GREEDY)) for _ in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(EngineFull, match="2 requests wait already, which is as many as may; send it again"):
                await last(engine, "Hello", GREEDY)
            with pytest.raises(InvalidRequest, match="4 prompts are asked for at once, of which 3 may be"):
                await anext(engine.events(lambda numbers: [], 4))
            assert len({o.outputs[0].token_ids for o in await asyncio.gather(*tasks)}) == 1
            await last(engine, "Hello", GREEDY)

    run(test)


def test_a_deadline_ends_a_request_that_runs_and_one_that_waits():
    async def test() -> None:
        async with engine_of(max_num_seqs=1) as engine:
            soon = time.perf_counter() + 0.05
            tasks = [asyncio.create_task(last(engine, "Hello", LONG, deadline=soon)) for _ in range(2)]
            free = asyncio.create_task(last(engine, "Hello", GREEDY))
            for task in tasks:
                with pytest.raises(DeadlineExceeded, match="took longer than it may; ask for less, or allow more time"):
                    await task
            assert len((await free).outputs[0].token_ids) == 12

    run(test)


def test_a_step_that_fails_fails_its_requests_and_no_later_ones(monkeypatch):
    async def test() -> None:
        async with engine_of() as engine:
            expected = (await last(engine, "Hello", GREEDY)).outputs[0].token_ids
            schedule = engine.engine.scheduler.schedule

            def fail() -> Any:
                schedule()
                raise RuntimeError("a fault")

            with monkeypatch.context() as patch:
                patch.setattr(engine.engine.scheduler, "schedule", fail)
                for error in await asyncio.gather(
                    *(last(engine, "Hello", GREEDY) for _ in range(3)), return_exceptions=True
                ):
                    assert isinstance(error, InternalError)
                    assert "a fault" in str(error)
            assert (await last(engine, "Hello", GREEDY)).outputs[0].token_ids == expected

    run(test)


def test_draining_finishes_what_is_there_and_takes_no_more():
    async def test() -> None:
        async with engine_of() as engine:
            task = asyncio.create_task(last(engine, "Hello", GREEDY))
            await asyncio.sleep(0.01)
            drain = asyncio.create_task(engine.drain())
            await asyncio.sleep(0)
            with pytest.raises(EngineFull, match="is shut down, before the request was done; send it to another"):
                await last(engine, "Hello", GREEDY)
            assert len((await task).outputs[0].token_ids) == 12
            await drain

    run(test)


def test_draining_ends_what_takes_too_long():
    async def test() -> None:
        async with engine_of() as engine:
            task = asyncio.create_task(last(engine, "Hello", LONG))
            await asyncio.sleep(0.05)
            await engine.drain(timeout=0.01)
            with pytest.raises(EngineFull, match="is shut down, before the request was done; send it to another"):
                await task

    run(test)


@pytest.mark.parametrize("num_requests", [1, 20])
def test_closing_answers_those_that_are_still_being_prepared(num_requests):
    async def test() -> None:
        async with engine_of() as engine:
            make = engine.make

            def slow(*args: Any, **options: Any) -> Any:
                time.sleep(0.2)
                return make(*args, **options)

            engine.make = slow
            tasks = [asyncio.create_task(last(engine, "Hello", GREEDY)) for _ in range(num_requests)]
            await asyncio.sleep(0.05)
            await engine.drain(timeout=0.01)
            for error in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(error, EngineFull)
            assert not engine.is_alive

    run(test)


def test_requests_that_come_as_it_closes_are_answered():
    async def test() -> None:
        for _ in range(20):
            async with engine_of() as engine:
                tasks = [asyncio.create_task(last(engine, "Hello", GREEDY)) for _ in range(4)]
                await asyncio.sleep(0.002)
                await asyncio.to_thread(engine.close)
                for result in await asyncio.gather(*tasks, return_exceptions=True):
                    assert isinstance(result, EngineFull)

    run(test)


def test_a_reader_whose_loop_is_closed_harms_no_other():
    llm = LLM(load_model(TINY["qwen2_vl"]))
    engine = AsyncEngine(llm.engine, llm.request)

    async def begin() -> None:
        events = engine.events(lambda numbers: [engine.make(numbers[0], "Hello", LONG)])
        await anext(events)
        left.append(events)

    left: list[Any] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.close()
    for _ in range(2):
        assert len(asyncio.run(last(engine, "Hello", GREEDY)).outputs[0].token_ids) == 12
    assert engine.is_alive
    assert engine.num_requests == 0
    engine.close()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"deadline": "soon"}, "deadline"),
        ({"deadline": float("nan")}, "deadline"),
        ({"priority": "high"}, "priority"),
        ({"salt": 7}, "salt"),
        ({"salt": "\ud800"}, "salt"),
        ({"pools": True}, "task"),
        ({"dimensions": 10**9}, "dimensions"),
        ({"taps": ["nothing"]}, "taps"),
        ({"params": 7}, "sampling_params"),
    ],
)
def test_wrong_options_are_their_own_request_s(options, field):
    async def test() -> None:
        async with engine_of() as engine:
            good = asyncio.create_task(last(engine, "Hello", GREEDY))
            with pytest.raises(InvalidRequest) as caught:
                await last(engine, "Hello", **{"params": GREEDY, **options})
            assert caught.value.field == field
            assert len((await good).outputs[0].token_ids) == 12

    run(test)


def test_the_caches_are_reset_between_steps():
    async def test() -> None:
        async with engine_of() as engine:
            prompt = "A question that fills some blocks. " * 4
            await last(engine, prompt, GREEDY)
            await last(engine, prompt, GREEDY)
            found = engine.engine.counters.num_cached
            assert found
            assert await engine.reset_prefix_cache()
            await last(engine, prompt, GREEDY)
            assert engine.engine.counters.num_cached == found
        with pytest.raises(EngineFull):
            await engine.reset_prefix_cache()

    run(test)


def test_vectors_come_one_by_one():
    model = load_model(TINY["qwen2_vl"])
    expected = LLM(model, task="embed").embed("Hello").pop().outputs.embedding

    async def test() -> None:
        llm = LLM(model, task="embed")
        engine = AsyncEngine(llm.engine, llm.request)
        found = await asyncio.gather(*(engine.embed("Hello", dimensions=n) for n in (None, 3)))
        assert found[0].outputs.embedding == pytest.approx(expected, abs=1e-6)
        assert len(found[1].outputs.embedding) == 3
        await asyncio.to_thread(engine.close)

    run(test)
