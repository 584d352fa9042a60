"""Connections: how many may be open, and how long one may be that asks for nothing or takes no answer."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import h11
import orjson
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from vlmfx.errors import EngineFull
from vlmfx.server.errors import told

GOODBYE_S = 5.0  # for a refusal to be read: TLS would wait far longer for the client to end its side, too
SPARE_FILES = 512  # what a process has open beside its connections: the model's files, those of media that are fetched


class Connection(H11Protocol):
    """One client's connection. h11's, wherever it runs: httptools takes headers of any size.

    One more than max_connections is answered 503 and closed. Within header_timeout_s seconds, 0 for no limit, the headers of a request
    must come, and some of an answer that is whole must be read, also where another request came behind it: what lies still for so long
    is cut. Bodies have a limit of their own (`Bodies`), and so have streams (`EventStream`)."""

    def __init__(self, *args: Any, max_connections: int, header_timeout_s: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self.max_connections, self.header_timeout_s = max_connections, header_timeout_s
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as H11Protocol's
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self.connections.discard(self)
            self._refuse()
        elif self.header_timeout_s:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self, before: tuple[Any, int] | None = None) -> None:
        """Look at the connection every header_timeout_s. before: what the last look found, its last request and how many bytes were to be
        sent; None where a request was being served. A request that follows unread answers is not, until some of them are read."""
        is_served = self.cycle is not None and not self.cycle.response_complete and not self.transport.is_closing()
        if is_served and self.flow.write_paused and not self.cycle.response_started:
            is_served = False
        now = None if is_served else (self.cycle, self.transport.get_write_buffer_size())
        if now is not None and now == before:
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(self.header_timeout_s, self._watch, now)

    def _refuse(self) -> None:
        message = f"{self.max_connections} connections are open, which is as many as may; come again in a while."
        status, body, headers = told(EngineFull(message), "-")
        text = orjson.dumps(body)
        headers = {
            **headers,
            "Content-Type": "application/json",
            "Content-Length": str(len(text)),
            "Connection": "close",
        }
        start = h11.Response(status_code=status, headers=list(headers.items()), reason=STATUS_PHRASES[status])
        for event in (start, h11.Data(data=text), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._timer = self.loop.call_later(GOODBYE_S, self.transport.abort)


def allow_files(num_connections: int) -> None:
    """Raise this process's limit of open files, where it is too low for so many connections and may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + SPARE_FILES
    if resource.RLIM_INFINITY != soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
