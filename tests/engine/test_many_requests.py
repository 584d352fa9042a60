"""Many requests of all kinds at once, some of them bad: good ones are answered right, none is lost, memory stays flat."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch

from tests.engine.workload import Ask, bad, break_programs, good
from tests.golden_cases import TINY, load_model
from vlmfx import LLM, SamplingParams
from vlmfx.compile.layout import BLOCK_SIZE, bytes_per_token
from vlmfx.engine.async_engine import AsyncEngine
from vlmfx.engine.engine import Engine
from vlmfx.engine.events import Event
from vlmfx.engine.request import CompletionOutput, RequestOutput
from vlmfx.engine.sequence import Request
from vlmfx.errors import DeadlineExceeded, EngineFull, VlmfxError

NUM_CLIENTS = 24
NUM_FIRST = 150  # requests before memory is looked at


@dataclass(frozen=True)
class Known:
    """What a good request gets alone: its texts, and its vector."""

    ask: Ask
    output: RequestOutput
    vector: list[float]


@lru_cache
def known(family: str, count: int) -> list[Known]:
    """Good requests, each computed alone."""
    model = load_model(TINY[family])
    llm, embedder = LLM(model, enable_prefix_caching=False), LLM(model, task="embed")
    made = []
    for ask in good(model, count):
        (output,) = llm.generate(ask.prompt, SamplingParams(**ask.params))
        (vector,) = embedder.embed(ask.prompt)
        made.append(Known(ask, output, vector.outputs.embedding))
    return made


def unlucky_token(family: str, asks: list[Known]) -> int:
    """A token that no good request has."""
    seen = {i for one in asks for i in one.output.prompt_token_ids}
    seen |= {i for one in asks for text in one.output.outputs for i in text.token_ids}
    return next(i for i in range(30, len(load_model(TINY[family]).processor.tokenizer)) if i not in seen)


class Recorded(AsyncEngine):
    """Serves texts and vectors, and counts how often each request ends."""

    def __init__(self, llm: LLM) -> None:
        self.ends: Counter[int] = Counter()
        embedder = LLM(llm.model, task="embed")

        def make(number: int, prompt: Any, pools: bool = False, **options: Any) -> Request:
            return (embedder if pools else llm).request(number, prompt, pools=pools, **options)

        super().__init__(llm.engine, make)

    def _deliver(self, events: list[Event]) -> None:
        self.ends.update(event.request.number for event in events if event.output is not None)
        super()._deliver(events)


def engine_of(family: str, asks: list[Known], overlaps: bool) -> Recorded:
    """So small that it cuts prompts into chunks, preempts texts and forgets images."""
    model = load_model(TINY[family])
    longest = max(len(one.output.prompt_token_ids) + one.ask.params["max_tokens"] for one in asks)
    block_bytes = bytes_per_token(model.config.text, model.dtype) * BLOCK_SIZE
    llm = LLM(
        model,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=(-(-longest // BLOCK_SIZE) + 1) * block_bytes,
        mm_feature_cache_bytes=1 << 13,
        async_scheduling=overlaps,
    )
    return Recorded(llm)


@dataclass
class Service:
    """Clients that each ask one request after another; a request's number decides all that is random in it. bad, by number, are those
    that fail; engines take turns."""

    engines: list[Recorded]
    good: list[Known]
    bad: dict[int, Ask]
    seen: Counter[str] = field(default_factory=Counter)

    async def serve(self, numbers: range) -> None:
        rest = iter(numbers)
        await asyncio.gather(*(self._client(rest) for _ in range(NUM_CLIENTS)))
        for engine in self.engines:
            await settled(engine, self.good[0])

    async def _client(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            rng, engine = Random(number), self.engines[number % len(self.engines)]
            if number in self.bad:
                await fails(engine, self.bad[number])
                self.seen["fails"] += 1
            else:
                (way,) = rng.choices([finishes, is_left, is_cancelled, is_late, gets_vector], [84, 5, 4, 3, 4])
                await way(engine, rng.choice(self.good), rng)
                self.seen[way.__name__] += 1

    async def close(self) -> None:
        """While requests run."""
        tasks = [asyncio.create_task(is_shut_down(e, one)) for e in self.engines for one in self.good[:NUM_CLIENTS]]
        await asyncio.sleep(0.05)
        for engine in self.engines:
            await asyncio.to_thread(engine.close)
        await asyncio.gather(*tasks)


async def settled(engine: Recorded, one: Known) -> None:
    """Nothing is left of what was asked before, and nothing has ended twice. Those whose readers left are out once a later one is done."""
    await finishes(engine, one)
    while engine.engine.has_work:
        await asyncio.sleep(0.01)
    assert set(engine.ends.values()) == {1}
    engine.ends.clear()
    assert_empty(engine.engine)


def outputs_of(engine: AsyncEngine, ask: Ask, **options: Any) -> AsyncGenerator[RequestOutput, None]:
    return engine.generate(ask.prompt, SamplingParams(**ask.params), **ask.options, **options)


async def last(engine: AsyncEngine, ask: Ask, **options: Any) -> RequestOutput:
    *_, output = [output async for output in outputs_of(engine, ask, **options)]
    assert output.finished
    return output


async def fails(engine: AsyncEngine, ask: Ask) -> None:
    with pytest.raises(VlmfxError, match=ask.error):
        await last(engine, ask)


async def finishes(engine: AsyncEngine, one: Known, rng: Random | None = None) -> None:
    assert_same(await last(engine, one.ask), one)


async def is_left(engine: AsyncEngine, one: Known, rng: Random) -> None:
    """By a reader that has read enough."""
    wanted = rng.randint(1, 3)
    async with aclosing(outputs_of(engine, one.ask)) as outputs:
        async for output in outputs:
            assert_begins(output, one)
            wanted -= 1
            if not wanted:
                break


async def is_cancelled(engine: AsyncEngine, one: Known, rng: Random) -> None:
    task = asyncio.create_task(last(engine, one.ask))
    await asyncio.sleep(rng.choice([0, 0.02, 0.1]))
    task.cancel()
    with suppress(asyncio.CancelledError):
        assert_same(await task, one)


async def is_late(engine: AsyncEngine, one: Known, rng: Random) -> None:
    """Or done just in time."""
    patience = rng.choice([-1.0, 0.02, 0.1])
    with suppress(DeadlineExceeded):
        output = await last(engine, one.ask, deadline=time.perf_counter() + patience)
        assert patience > 0
        assert_same(output, one)


async def is_shut_down(engine: AsyncEngine, one: Known) -> None:
    """Or done before."""
    with suppress(EngineFull):
        await finishes(engine, one)


async def gets_vector(engine: AsyncEngine, one: Known, rng: Random) -> None:
    output = await engine.embed(one.ask.prompt, **one.ask.options)
    assert output.outputs.embedding == pytest.approx(one.vector, abs=1e-5, nan_ok=True), one.ask.name


def assert_same(output: RequestOutput, one: Known) -> None:
    wanted = one.output
    assert output.prompt_token_ids == wanted.prompt_token_ids, one.ask.name
    assert [exact(text) for text in output.outputs] == [exact(text) for text in wanted.outputs], one.ask.name
    for mine, its in zip(output.outputs, wanted.outputs, strict=True):
        assert_near(mine.logprobs, its.logprobs)
    assert_near(output.prompt_logprobs, wanted.prompt_logprobs)


def exact(text: CompletionOutput) -> tuple[Any, ...]:
    return text.index, text.token_ids, text.text, text.finish_reason, text.stop_reason


def assert_near(mine: Any, wanted: Any) -> None:
    """Log-probabilities: of the same tokens, and near."""
    mine, wanted = ([entry or {} for entry in entries or ()] for entries in (mine, wanted))
    assert [entry.keys() for entry in mine] == [entry.keys() for entry in wanted]
    mine, wanted = ([one.logprob for entry in entries for one in entry.values()] for entries in (mine, wanted))
    assert mine == pytest.approx(wanted, abs=1e-4, nan_ok=True)


def assert_begins(output: RequestOutput, one: Known) -> None:
    """That what has come so far is how the whole begins."""
    for text in output.outputs:
        whole = one.output.outputs[text.index]
        assert whole.token_ids[: len(text.token_ids)] == text.token_ids, one.ask.name
        assert whole.text.startswith(text.text), one.ask.name


def assert_empty(engine: Engine) -> None:
    """That nothing of any request is left."""
    assert not engine.has_work
    assert not engine.scheduler.waiting
    assert not engine.scheduler.running
    assert engine.blocks.num_free == engine.blocks.num_blocks
    assert engine.features.num_pinned == 0


def assert_closed(engines: list[Recorded], others: set[threading.Thread]) -> None:
    """That they have done all that they are here for, and nothing of them is left. others: threads that are not theirs."""
    for engine in engines:
        assert engine.num_requests == 0
        assert_empty(engine.engine)
    counters = [engine.engine.counters for engine in engines]
    assert min(sum(c.num_cached for c in counters), sum(c.num_preempted for c in counters)) > 0
    for thread in set(threading.enumerate()) - others:
        thread.join(60)
        assert not thread.is_alive(), thread.name


class Memory(NamedTuple):
    """In bytes: pages of the process that are in memory, what C has allocated, and the objects that the garbage collector knows."""

    resident: int
    allocated: int
    objects: int

    @classmethod
    def now(cls) -> Memory:
        gc.collect()
        statm = Path("/proc/self/statm")  # Linux alone has it
        pages = int(statm.read_text().split()[1]) if statm.exists() else 0
        objects = sum(map(sys.getsizeof, gc.get_objects()))
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), allocated_bytes(), objects)


class Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2; uordblks are bytes in its heaps, hblkhd those with pages of their own."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def allocated_bytes() -> int:
    """0 where there is no glibc 2.33."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = Mallinfo
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


def assert_flat(marks: list[Memory]) -> None:
    """Over the second half. Of 10,000 requests it took 0.3 KB of objects, 0.3 MB that C had allocated (as of 150 after the first), and 9 MB
    of pages: those of freed memory, 0 to 4 MB a thousand, which stayed below 361 MB in all."""
    half, end = marks[len(marks) // 2 - 1], marks[-1]
    assert end.objects - half.objects < 32 << 10
    assert end.allocated - half.allocated < 4 << 20
    assert end.resident - half.resident < 24 << 20


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On tensors as small as these, torch's threads would do little but wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("family", "count", "num_bad"),
    [("llava", 150, 30), ("qwen2_vl", 150, 30), pytest.param("qwen2_vl", 10_000, 500, marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("one_thread")
def test_good_ones_are_answered_right_none_is_lost_and_memory_is_flat(family, count, num_bad, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL, "vlmfx")  # what is logged is kept, with the tensors of its traceback
    model, asks = load_model(TINY[family]), known(family, min(220, count // 4))
    token, others = unlucky_token(family, asks), set(threading.enumerate())
    engines = [engine_of(family, asks, overlaps) for overlaps in (False, True)]
    kinds = cycle(bad(model, engines[0].engine.capacity, token))
    service = Service(engines, asks, dict(zip(Random(0).sample(range(count), num_bad), kinds, strict=False)))
    break_programs(monkeypatch, token)
    marks = []

    async def serve() -> None:
        await asyncio.wait_for(service.serve(range(NUM_FIRST)), 600)  # makes what is made once
        for start in range(0, count, count // 10):
            await asyncio.wait_for(service.serve(range(start, start + count // 10)), 600)  # a lost one would never end
            marks.append(Memory.now())
        await asyncio.wait_for(service.close(), 600)

    asyncio.run(serve())
    assert service.seen.total() == NUM_FIRST + count
    assert service.seen["fails"] == sum(number < NUM_FIRST for number in service.bad) + num_bad
    assert_closed(engines, others)
    assert_flat(marks)
