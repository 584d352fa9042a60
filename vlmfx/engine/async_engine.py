"""AsyncEngine: an engine stepped by a thread of its own, for coroutines that each wait for one request.

A request is prepared (its text tokenized, its URLs fetched) by other threads. Nothing that goes wrong in a step ends the thread: the
requests that were in it fail, and the next ones are served."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from threading import Condition, Thread
from typing import Any

from vlmfx.engine.deadline import in_time
from vlmfx.engine.embedding import EmbeddingRequestOutput
from vlmfx.engine.engine import Engine
from vlmfx.engine.events import Event
from vlmfx.engine.options import NUM_MAKERS
from vlmfx.engine.partial import Partial
from vlmfx.engine.request import RequestOutput
from vlmfx.engine.sequence import Request
from vlmfx.errors import EngineFull, InvalidRequest, as_vlmfx_error

log = logging.getLogger("vlmfx")
MAX_WAITING = 1024  # requests that have not begun
PATIENCE = 0.05  # seconds between looks for new requests while pixels are loaded


@dataclass(eq=False)
class Mailbox:
    """What came for some requests and was not read yet; `loop` is that of its reader, who may want outputs alone."""

    loop: asyncio.AbstractEventLoop
    wants_all: bool = True
    events: deque[Event] = field(default_factory=deque)
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    async def take(self) -> list[Event]:
        """All that has come, once there is something; it may be empty."""
        await self.ready.wait()
        self.ready.clear()
        return [self.events.popleft() for _ in range(len(self.events))]


class AsyncEngine:
    """make(number, prompt, **options) → Request, as `LLM.request`, runs in a thread. max_waiting: more requests than that are refused."""

    def __init__(self, engine: Engine, make: Callable[..., Request], *, max_waiting: int = MAX_WAITING) -> None:
        self.engine, self.make, self.max_waiting = engine, make, max_waiting
        self._numbers = count()
        self._mailboxes: dict[int, Mailbox] = {}
        self._inbox: list[Callable[[], None]] = []  # what the engine's thread is to do between two steps
        self._changed = Condition()
        self._is_draining = self._is_closed = self._has_ended = False
        self._makers = ThreadPoolExecutor(NUM_MAKERS, thread_name_prefix="vlmfx-prepare")
        self._thread = Thread(target=self._work, name="vlmfx-engine", daemon=True)
        self._thread.start()

    @property
    def num_requests(self) -> int:
        """Requests that are in it, waiting or running."""
        return len(self._mailboxes)

    @property
    def is_alive(self) -> bool:
        """Whether requests are served."""
        return self._thread.is_alive() and not self._is_closed

    @property
    def is_draining(self) -> bool:
        """Whether no more requests are taken."""
        return self._is_draining

    async def events(
        self,
        make: Callable[[list[int]], list[Request]],
        num: int = 1,
        pool: Executor | None = None,
        *,
        deadline: float | None = None,
        wants_all: bool = True,
    ) -> AsyncGenerator[list[Event], None]:
        """What is new in `num` requests: each time that there is more all of it, until the last of them is done; with wants_all=False
        only the events that have an output.

        make(numbers) gives the requests of these numbers; it runs in a thread of pool, or of the engine's own, and must be done by
        deadline (by time.perf_counter), as requests by theirs. Where one of them fails or the reader stops, all of them are ended.
        Raises EngineFull at once, DeadlineExceeded, what `make` raises, and what a request fails by."""
        if self._is_draining:
            raise _closed()
        most = self.max_waiting + self.engine.limits.max_num_seqs
        if num > most:
            message = f"{num} prompts are asked for at once, of which {most} may be; send them in several requests."
            raise InvalidRequest("prompt", message, found=num, expected=most)
        if len(self._mailboxes) + num > most:
            raise EngineFull(
                f"{self.max_waiting} requests wait already, which is as many as may; send it again in a while."
            )
        numbers = [next(self._numbers) for _ in range(num)]
        mailbox = Mailbox(asyncio.get_running_loop(), wants_all)
        is_open = set(numbers)
        self._mailboxes.update(dict.fromkeys(numbers, mailbox))
        try:
            making = mailbox.loop.run_in_executor(pool or self._makers, self._made, make, numbers)
            for request in await in_time(making, deadline):
                if not self._tell(partial(self._add, request)):
                    raise _closed()
            while is_open:
                events = await mailbox.take()
                is_open -= {event.request.number for event in events if event.output is not None}
                errors = [e.output.error for e in events if e.output is not None and e.output.error is not None]
                good = [event for event in events if event.output is None or event.output.error is None]
                if good:
                    yield good
                if errors:
                    raise errors[0]
        finally:
            for number in numbers:
                self._mailboxes.pop(number, None)
            for number in is_open:
                self._tell(partial(self.engine.abort, number))

    async def generate(self, prompt: Any, params: Any = None, **options: Any) -> AsyncGenerator[RequestOutput, None]:
        """All there is of a request each time that there is more, and at last the finished output. Each output holds all that came before
        it again; `events` does not. The request is ended where the reader stops. Raises as `events` does."""
        so_far = Partial()
        make = self._one(prompt, params=params, **options)
        async with aclosing(self.events(make)) as stream:
            async for events in stream:
                *new, last = events
                for event in new if last.output is not None else events:
                    so_far.add(event)
                yield last.output if isinstance(last.output, RequestOutput) else so_far.output()

    async def embed(self, prompt: Any, **options: Any) -> EmbeddingRequestOutput:
        """The vector of a prompt. Raises as `events` does."""
        async with aclosing(self.events(self._one(prompt, pools=True, **options), wants_all=False)) as stream:
            async for (event,) in stream:
                assert isinstance(event.output, EmbeddingRequestOutput)
                return event.output
        raise AssertionError("a request ended without an output")

    async def reset_prefix_cache(self) -> bool:
        """As `Engine.reset_prefix_cache`, between two steps. Raises EngineFull where the engine is closed."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[bool] = loop.create_future()

        def reset() -> None:
            loop.call_soon_threadsafe(done.set_result, self.engine.reset_prefix_cache())

        if not self._tell(reset):
            raise _closed()
        return await done

    async def drain(self, timeout: float | None = None) -> None:
        """Take no more requests, and wait for those that are in it; those that are left after timeout seconds are ended."""
        self._is_draining = True
        end = None if timeout is None else time.monotonic() + timeout
        while self._mailboxes and (end is None or time.monotonic() < end):
            await asyncio.sleep(PATIENCE)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End all requests and the thread."""
        with self._changed:
            self._is_draining = self._is_closed = True
            self._changed.notify()
        self._thread.join()
        self._makers.shutdown(wait=False)  # those that come to `_made` later end by themselves

    def _one(self, prompt: Any, **options: Any) -> Callable[[list[int]], list[Request]]:
        return lambda numbers: [self.make(numbers[0], prompt, **options)]

    def _made(self, make: Callable[[list[int]], list[Request]], numbers: list[int]) -> list[Request]:
        if self._is_closed:
            raise _closed()
        return make(numbers)

    def _tell(self, message: Callable[[], None]) -> bool:
        """Have the engine's thread do something; False where it does nothing any more."""
        with self._changed:
            if self._has_ended:
                return False
            self._inbox.append(message)
            self._changed.notify()
            return True

    def _work(self) -> None:
        while not self._is_closed:
            with self._changed:
                while not (self._inbox or self.engine.has_work or self._is_closed):
                    self._changed.wait()
                messages, self._inbox = self._inbox, []
            self._do(messages)
            if not self._is_closed:
                self._deliver(self.engine.step_or_fail(PATIENCE))
        with self._changed:
            self._has_ended = True
        self._do(self._inbox)
        self._deliver(self.engine.fail_all(_closed()))
        self.engine.close()

    def _do(self, messages: list[Callable[[], None]]) -> None:
        for message in messages:
            try:
                message()
            except Exception:
                log.exception("a message to the engine failed")

    def _add(self, request: Request) -> None:
        try:
            self.engine.add(request)
        except Exception as error:
            failed = request.failed(as_vlmfx_error(error, "the request could not be taken"))
            self._deliver([Event(request=request, output=failed)])

    def _deliver(self, events: list[Event]) -> None:
        """Put events into mailboxes and wake the readers of those, a loop once: each waking is a call of the system's."""
        woken: dict[asyncio.AbstractEventLoop, dict[int, Mailbox]] = {}
        for event in events:
            number = event.request.number
            mailbox = self._mailboxes.get(number)
            if mailbox is not None and (mailbox.wants_all or event.output is not None):
                mailbox.events.append(event)
                woken.setdefault(mailbox.loop, {})[number] = mailbox
        for loop, mailboxes in woken.items():
            try:
                loop.call_soon_threadsafe(_wake, list(mailboxes.values()))
            except RuntimeError:  # it is closed: nobody reads there any more
                for number in mailboxes:
                    self._mailboxes.pop(number, None)
                    self._tell(partial(self.engine.abort, number))


def _wake(mailboxes: list[Mailbox]) -> None:
    for mailbox in mailboxes:
        mailbox.ready.set()


def _closed() -> EngineFull:
    return EngineFull("the engine is shut down, before the request was done; send it to another.")
