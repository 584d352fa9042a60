"""Service: what all handlers share: the engine, the names it is served under, and what was done so far."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import fastapi

from vlmfx.engine.async_engine import AsyncEngine
from vlmfx.engine.deadline import in_time
from vlmfx.engine.embedding import EmbeddingRequestOutput
from vlmfx.engine.events import Event, Output
from vlmfx.engine.request import RequestOutput, SamplingParams
from vlmfx.engine.sequence import Request
from vlmfx.errors import InvalidRequest, shown
from vlmfx.openai.fields import check_model
from vlmfx.openai.requests import request_options
from vlmfx.processing.prompt import Processor
from vlmfx.server.body import Bodies, parsed
from vlmfx.server.calls import Call, call_of
from vlmfx.server.charges import charged_to
from vlmfx.server.errors import ClientGone, HttpError
from vlmfx.server.image_parts import with_images
from vlmfx.server.image_store import ImageStore, StoredImage
from vlmfx.server.metrics import Metrics
from vlmfx.server.options import ServerOptions
from vlmfx.server.stream import unless_gone
from vlmfx.server.workers import Workers

PATIENCE_S = 0.05  # between looks for calls that have ended
GRACE_S = 5.0  # for bodies that are being read when the engine takes nothing more
SHUT_DOWN = "the server is shut down, before the request was done; send it to another."
SMALL = 32 * 1024  # bytes of a body that are parsed at once: another thread would cost more than it saves
NUM_WORKING = 8
NUM_ASIDE = 2
NUM_FETCHING = 64  # they wait for hosts most of the time
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Service:
    """A loaded model behind an AsyncEngine. task: "generate" or "embed"."""

    engine: AsyncEngine
    processor: Processor  # that of the engine's prompts
    task: str
    options: ServerOptions
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    bodies: Bodies = field(init=False)
    images: ImageStore = field(init=False)
    working: Workers = field(init=False)  # bodies, prompts, answers
    # Neither pictures to keep and texts to count, nor hosts that answer slowly, may keep prompts waiting.
    aside: Workers = field(init=False)
    fetching: Workers = field(init=False)
    calls: set[Call] = field(default_factory=set)  # those that have not ended

    def __post_init__(self) -> None:
        options = self.options
        bodies = Bodies(options.max_body_bytes, options.max_held_bytes, options.body_timeout_s)
        object.__setattr__(self, "bodies", bodies)
        object.__setattr__(self, "images", ImageStore(options.max_image_store_bytes, options.image_ttl_s))
        most_made = options.max_waiting + self.engine.engine.limits.max_num_seqs  # the engine takes no more prompts
        object.__setattr__(self, "working", Workers(NUM_WORKING, "vlmfx-serve", most_made + NUM_WORKING))
        object.__setattr__(self, "aside", Workers(NUM_ASIDE, "vlmfx-aside", options.max_waiting))
        object.__setattr__(self, "fetching", Workers(NUM_FETCHING, "vlmfx-fetch", options.max_waiting))
        self.metrics.watch(self.images)

    @property
    def name(self) -> str:
        """What answers call the model."""
        return self.options.names[0]

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest prompt, and with its answer where there is one."""
        most = self.processor.max_model_len
        return most if self.task == "embed" else min(most, self.engine.engine.capacity)

    async def read_json(self, request: fastapi.Request, read: Callable[[Any], T]) -> T:
        """read(what the body of a request says). Raises as `Bodies.read` and `parsed` do."""
        return await self.parsed(request, await self.bodies.read(request), read)

    async def parsed(self, request: fastapi.Request, text: bytes, read: Callable[[Any], T]) -> T:
        """read(what a JSON text says), in a thread where it is not small. Raises as read and `wanted` do, and InvalidRequest."""
        if len(text) <= SMALL:
            return read(parsed(text))
        pool = call_of(request.scope).pool(self.working)
        work = asyncio.get_running_loop().run_in_executor(pool, lambda: read(parsed(text)))
        return await self.wanted(request, work)

    async def wanted(self, request: fastapi.Request, work: Awaitable[T]) -> T:
        """What work for a request gives, whose body has been read; it is dropped where the client goes away and where the request's time
        is over. Raises what work raises, ClientGone and DeadlineExceeded."""
        found = await unless_gone(request.receive, in_time(work, self.deadline(call_of(request.scope))))
        assert found is not None
        return found

    def check(self, body: Any, path: str, task: str | None) -> None:
        """Raise for a body that is for another model, another task, or brings a template where none is taken."""
        if task is not None and task != self.task:
            message = (
                f'{path} needs the task "{task}", but this server does "{self.task}"; start one with --task {task}.'
            )
            raise HttpError(404, message, code="task_not_served")
        check_model(body, *self.options.names)
        brings_template = isinstance(body, dict) and body.get("chat_template") is not None
        if brings_template and not self.options.trust_request_chat_template:
            message = "templates of requests are not taken; leave it out, or start the server with --trust-request-chat-template."
            raise InvalidRequest("chat_template", message)

    def maker(
        self,
        call: Call,
        body: dict[str, Any],
        prompts: Sequence[dict[str, Any]],
        params: SamplingParams | None = None,
        **more: Any,
    ) -> Callable[[list[int]], list[Request]]:
        """What makes the engine's requests of a body's prompts. Raises InvalidRequest for what stands beside them, and later, in its
        thread, for the prompts."""
        options = {**request_options(body), **more}
        if len(self.options.api_keys) > 1:
            _keep_apart(options, call)
        options["deadline"] = self.deadline(call)
        explicit = next((n for n in ("max_completion_tokens", "max_tokens") if body.get(n) is not None), None)

        def make(numbers: list[int]) -> list[Request]:
            start = time.perf_counter()
            made: list[Request] = []
            with self.charged_to(call):
                given = [self.with_images(call, prompt) for prompt in prompts]
                for number, prompt in zip(numbers, given, strict=True):
                    if call.is_over:
                        raise ClientGone
                    made.append(self.engine.make(number, prompt, params, **options))
            for request in made:
                if explicit is not None:
                    self._check_room(explicit, request)
            self.metrics.prepared(time.perf_counter() - start, fetches=call.fetches)
            return made

        return make

    def deadline(self, call: Call) -> float | None:
        """When a call's time is over, by time.perf_counter; its body and its prompt take of it, too."""
        seconds = self.options.request_timeout_s
        return None if seconds is None else call.start + seconds

    def charged_to(self, call: Call) -> AbstractContextManager[None]:
        """Inside, what is fetched counts among what requests hold, until the call ends."""
        return charged_to(partial(self.bodies.hold, call))

    def with_images(self, call: Call, prompt: dict[str, Any]) -> dict[str, Any]:
        """A prompt with the stored images that it names, which are kept until the call ends. Raises InvalidRequest."""

        def reading(image: StoredImage) -> None:
            call.on_end(lambda _: self.images.release(image))

        return with_images(prompt, call.owner, self.images, self.processor, reading)

    def events(
        self,
        make: Callable[[list[int]], list[Request]],
        prompts: Sequence[dict[str, Any]],
        call: Call,
        wants_all: bool = True,
    ) -> AsyncGenerator[list[Event], None]:
        """As `AsyncEngine.events`."""
        pool = call.pool(self.fetching if call.fetches else self.working)
        return self.engine.events(make, len(prompts), pool, deadline=self.deadline(call), wants_all=wants_all)

    def pool_aside(self, call: Call) -> Executor:
        """The threads for what needs no engine, by whether it may fetch from elsewhere."""
        return call.pool(self.fetching if call.fetches else self.aside)

    async def outputs(
        self, make: Callable[[list[int]], list[Request]], prompts: Sequence[dict[str, Any]], call: Call
    ) -> list[Any]:
        """The output of each prompt, in order."""
        found: dict[int, Output] = {}
        async with aclosing(self.events(make, prompts, call, wants_all=False)) as stream:
            async for events in stream:
                for event in events:
                    if event.output is not None:
                        found[event.request.number] = event.output
                        self.count(event.output, call)
        return [found[number] for number in sorted(found)]

    def count(self, output: Output, call: Call) -> None:
        """Take an output into the metrics and the call's log line."""
        call.num_prompt += len(output.prompt_token_ids)
        if isinstance(output, RequestOutput):
            call.num_answer += sum(len(one.token_ids) for one in output.outputs)
        assert isinstance(output, (RequestOutput, EmbeddingRequestOutput))
        self.metrics.finished(output, call.seconds)

    async def drain(self, seconds: float) -> None:
        """Take nothing more into the engine, and wait for all calls to end; those that have not after so many seconds fail, and sooner
        those whose bodies do not come."""
        end = time.monotonic() + seconds
        asyncio.get_running_loop().call_later(min(GRACE_S, seconds), self.bodies.end, SHUT_DOWN)
        await self.engine.drain(seconds)
        while self.calls and time.monotonic() < end:
            await asyncio.sleep(PATIENCE_S)
        if self.calls:
            self.close()

    def close(self) -> None:
        """End the threads, and give up what is not read or done; the engine is to be closed before."""
        self.bodies.end(SHUT_DOWN)
        for workers in (self.working, self.aside, self.fetching):
            workers.end(SHUT_DOWN)

    def join(self, seconds: float) -> bool:
        """Whether all threads have ended, which is waited for as long; after `close`."""
        until = time.monotonic() + seconds
        return all(workers.join(until) for workers in (self.working, self.aside, self.fetching))

    def _check_room(self, field: str, request: Request) -> None:
        limit, left = request.params.max_tokens, self.max_model_len - request.num_tokens
        if limit is not None and limit > left > 0:
            message = (
                f"it is {shown(limit)}, but a prompt of {request.num_tokens} tokens leaves {left} of the maximum context length of "
                f"{self.max_model_len} tokens; ask for fewer, or leave it out."
            )
            raise InvalidRequest(field, message, found=limit, expected=left)


def _keep_apart(options: dict[str, Any], call: Call) -> None:
    """Give the holders of several keys caches of their own, as the time of an answer tells what is in one, and no way past each other.
    Raises InvalidRequest."""
    priority = options.get("priority", 0)
    if priority < 0:
        message = f"it is {priority}, which would go before the requests of others; use 0, or more to go behind."
        raise InvalidRequest("priority", message, found=priority, expected=0)
    options["salt"] = f"{call.owner.hex()} {options.get('salt', '')}"
