"""Server-sent events: chunks as they come, pings while nothing does, an end for whoever does not read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from contextlib import suppress
from typing import Any, Generic, TypeVar

import orjson
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from vlmfx.server.calls import call_of
from vlmfx.server.errors import ClientGone

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"  # a comment: readers of events skip it, and what lies between sees that the connection lives
PING_S = 15.0
STALL_S = 120.0  # a client that reads nothing for so long is gone
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
T = TypeVar("T")


def event(body: Mapping[str, Any]) -> bytes:
    """One chunk as an event."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


async def unless_gone(receive: Receive, work: Awaitable[T], timeout_s: float | None = None) -> T | None:
    """What work gives; None if it takes longer than timeout_s, and it goes on. Where the client goes away before, work is cancelled.

    Raises what work raises, and ClientGone. The request's body has been read."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    is_left = False
    try:
        await asyncio.wait({task, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGone
        is_left = True
        return None
    finally:
        await cancelled(gone, *(() if is_left else (task,)))


async def cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks, and wait until they are done; what they raise is known already, or nobody's."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Begun(Generic[T]):
    """A generator whose first item is waited for before its reader begins. Whoever makes one closes it, also where nothing was read."""

    def __init__(self, items: AsyncGenerator[T, None]) -> None:
        self.first = asyncio.ensure_future(anext(items))
        self._items = items

    async def __aiter__(self) -> AsyncIterator[T]:
        with suppress(StopAsyncIteration):
            yield await self.first
            async for item in self._items:
                yield item

    async def aclose(self) -> None:
        """End the generator."""
        await cancelled(self.first)
        await self._items.aclose()


class EventStream(StreamingResponse):
    """A response of events. The lines and their source are closed when all is sent, when the client goes away, and when it reads nothing
    any more. The lines may never have begun, and then could not close the source."""

    def __init__(self, lines: AsyncGenerator[bytes, None], source: Begun[Any]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers=HEADERS)
        self.lines, self.source = lines, source
        self._turn = asyncio.Lock()  # lines and pings are sent one at a time
        self._sending_since: float | None = None
        self._sent_at = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.ensure_future(self._send_all(send))
        pinger = asyncio.ensure_future(self._ping(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            while not (sender.done() or gone.done() or self._is_stalled):
                await asyncio.wait({sender, gone}, timeout=STALL_S / 10, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
            else:  # the server closes a connection whose response was not ended
                call_of(scope).error = "abort"
        finally:
            await cancelled(sender, pinger, gone)
            await self.lines.aclose()
            await self.source.aclose()

    async def _send_all(self, send: Send) -> None:
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for line in self.lines:
            await self._send(send, {"type": "http.response.body", "body": line, "more_body": True})
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(PING_S / 3)
            if self._sending_since is None and time.monotonic() - self._sent_at > PING_S:
                await self._send(send, {"type": "http.response.body", "body": PING, "more_body": True})

    async def _send(self, send: Send, message: Message) -> None:
        async with self._turn:
            self._sending_since = time.monotonic()
            await send(message)
            self._sending_since, self._sent_at = None, time.monotonic()

    @property
    def _is_stalled(self) -> bool:
        return self._sending_since is not None and time.monotonic() - self._sending_since > STALL_S


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
