"""AsyncEngine: an engine stepped by a thread of its own, for coroutines that each wait for one request.

A request is prepared (its text tokenized, its URLs fetched) by other threads. Nothing that goes wrong in a step ends the thread: the
requests that were in it fail, and the next ones are served."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from itertools import count
from threading import Condition, Thread
from typing import Any

from vlmfx.engine.embedding import EmbeddingRequestOutput
from vlmfx.engine.engine import Engine
from vlmfx.engine.events import Event
from vlmfx.engine.request import CompletionOutput, Logprob, RequestOutput
from vlmfx.engine.sequence import Request
from vlmfx.errors import EngineFull, VlmfxError

MAX_WAITING = 1024  # requests that have not begun
PATIENCE = 0.05  # seconds between looks for new requests while pixels are loaded


@dataclass(eq=False)
class Mailbox:
    """What came for a request and was not read yet; `loop` is that of its reader, who may want outputs alone."""

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
        self._inbox: list[Request | int] = []  # requests to add, numbers to abort
        self._changed = Condition()
        self._is_draining = self._is_closed = False
        self._makers = ThreadPoolExecutor(8, thread_name_prefix="vlmfx-prepare")
        self._thread = Thread(target=self._work, name="vlmfx-engine", daemon=True)
        self._thread.start()

    @property
    def num_requests(self) -> int:
        """Requests that are in it, waiting or running."""
        return len(self._mailboxes)

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def is_draining(self) -> bool:
        """Whether it takes no more requests."""
        return self._is_draining

    async def generate(self, prompt: Any, params: Any = None, **options: Any) -> AsyncIterator[RequestOutput]:
        """All there is of a request each time that there is more, and at last the finished output. The request is ended where the reader
        stops.

        Raises EngineFull at once, what `make` raises, and what the request fails by."""
        async for output in self._outputs(prompt, params=params, **options):
            assert isinstance(output, RequestOutput)
            yield output

    async def embed(self, prompt: Any, **options: Any) -> EmbeddingRequestOutput:
        """The vector of a prompt. Raises as `generate` does."""
        async for output in self._outputs(prompt, pools=True, **options):
            if isinstance(output, EmbeddingRequestOutput):
                return output
        raise AssertionError("a request ended without an output")

    async def events(
        self,
        make: Callable[[list[int]], list[Request]],
        num: int = 1,
        pool: ThreadPoolExecutor | None = None,
        *,
        wants_all: bool = True,
    ) -> AsyncGenerator[list[Event], None]:
        """What is new in `num` requests: each time that there is more all of it, until the last of them is done; with wants_all=False
        only the events that have an output.

        make(numbers) gives the requests of these numbers; it runs in a thread of pool, or of the engine's own. Where one of them fails
        or the reader stops, all of them are ended. Raises as `generate` does."""
        if self._is_draining:
            raise EngineFull("the engine is being shut down and takes no more requests; send it to another.")
        if len(self._mailboxes) - self.engine.limits.max_num_seqs >= self.max_waiting:
            raise EngineFull(
                f"{self.max_waiting} requests wait already, which is as many as may; send it again in a while."
            )
        numbers = [next(self._numbers) for _ in range(num)]
        mailbox = Mailbox(asyncio.get_running_loop(), wants_all)
        is_open = set(numbers)
        self._mailboxes.update(dict.fromkeys(numbers, mailbox))
        try:
            for request in await mailbox.loop.run_in_executor(pool or self._makers, make, numbers):
                self._tell(request)
            if not self.is_alive:  # it was closed meanwhile, and nobody reads what it is told
                raise EngineFull("the engine was shut down before the request was done; send it to another.")
            while is_open:
                events = await mailbox.take()
                for event in events:
                    if event.output is not None:
                        is_open.discard(event.request.number)
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
                self._tell(number)

    async def _outputs(self, prompt: Any, **options: Any) -> AsyncIterator[RequestOutput | EmbeddingRequestOutput]:
        so_far: Partial | None = None
        async with aclosing(self.events(lambda numbers: [self.make(numbers[0], prompt, **options)])) as stream:
            async for events in stream:
                for event in events:
                    if event.output is not None:
                        yield event.output
                        return
                    so_far = so_far or Partial(event.request)
                    so_far.add(event)
                if so_far is not None:
                    yield so_far.output()

    async def drain(self, timeout: float | None = None) -> None:
        """Take no more requests, and wait for those that are in it; those that are left after timeout seconds are ended."""
        self._is_draining = True
        end = None if timeout is None else time.monotonic() + timeout
        while self._mailboxes and (end is None or time.monotonic() < end):
            await asyncio.sleep(PATIENCE)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End all requests and the thread."""
        self._is_draining = True
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        self._makers.shutdown(wait=False, cancel_futures=True)

    def _tell(self, message: Request | int) -> None:
        with self._changed:
            self._inbox.append(message)
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._inbox or self.engine.has_work or self._is_closed):
                    self._changed.wait()
                messages, self._inbox = self._inbox, []
            if self._is_closed:
                break
            for message in messages:
                self._handle(message)
            self._deliver(self.engine.step_or_fail(PATIENCE))
        closing: VlmfxError = EngineFull("the engine was shut down before the request was done; send it to another.")
        self._deliver(self.engine.fail_all(closing))
        self.engine.close()

    def _handle(self, message: Request | int) -> None:
        if isinstance(message, int):
            self.engine.abort(message)
            return
        try:
            self.engine.add(message)
        except VlmfxError as error:
            self._deliver([Event(request=message, output=message.failed(error))])

    def _deliver(self, events: list[Event]) -> None:
        """Put events into mailboxes, and wake the readers of those: a loop once, as each call of it is one of the system."""
        woken: dict[asyncio.AbstractEventLoop, set[Mailbox]] = {}
        for event in events:
            mailbox = self._mailboxes.get(event.request.number)
            if mailbox is not None and (mailbox.wants_all or event.output is not None):
                mailbox.events.append(event)
                woken.setdefault(mailbox.loop, set()).add(mailbox)
        for loop, mailboxes in woken.items():
            with suppress(RuntimeError):  # the loop is closed: nobody waits there
                loop.call_soon_threadsafe(_wake, mailboxes)


def _wake(mailboxes: set[Mailbox]) -> None:
    for mailbox in mailboxes:
        mailbox.ready.set()


class Partial:
    """What a request has given so far."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.texts: dict[int, list[str]] = {}
        self.token_ids: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[dict[int, Logprob]]] = {}

    def add(self, event: Event) -> None:
        self.texts.setdefault(event.index, []).append(event.text)
        self.token_ids.setdefault(event.index, []).extend(event.token_ids)
        self.logprobs.setdefault(event.index, []).extend(event.logprobs)

    def output(self) -> RequestOutput:
        wants_logprobs = self.request.params.logprobs is not None
        outputs = [
            CompletionOutput(
                index=index,
                text="".join(self.texts[index]),
                token_ids=tuple(self.token_ids[index]),
                logprobs=list(self.logprobs[index]) if wants_logprobs else None,
            )
            for index in sorted(self.texts)
        ]
        return RequestOutput(
            request_id=str(self.request.number),
            prompt=self.request.prompt,
            prompt_token_ids=[],
            outputs=outputs,
            finished=False,
        )
