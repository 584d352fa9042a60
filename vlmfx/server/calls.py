"""Calls: what is known of each HTTP request from its first byte to its last: its id, how long it took, what became of it; one log line."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from threading import Lock
from typing import Any
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("vlmfx.access")
ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")  # what may go into headers, logs and the ids of answers as it is
KEY = "vlmfx.call"  # in a scope


@dataclass(kw_only=True, eq=False)
class Call:
    """route: the path that is served, of which there are few, where `path` may be anything. status 499, nginx's number, says that the
    client went away; error names what went wrong, which a stream's status does not tell. owner: a digest of its API key, empty where
    there are none. fetches: whether something that it names may have to be fetched from elsewhere."""

    id: str
    method: str
    path: str
    client: str
    route: str = "other"
    start: float = field(default_factory=time.perf_counter)
    status: int = 499
    num_body_bytes: int = 0
    num_fetched_bytes: int = 0
    num_prompt: int = 0
    num_answer: int = 0
    error: str | None = None
    owner: bytes = b""
    fetches: bool = False
    is_over: bool = False
    _at_end: list[Callable[[Call], None]] = field(default_factory=list)
    _num_working: int = 0
    _lock: Lock = field(default_factory=Lock)

    @property
    def seconds(self) -> float:
        """Since it came."""
        return time.perf_counter() - self.start

    def pool(self, pool: Executor) -> CallPool:
        """A pool's threads, for work of this call."""
        return CallPool(pool, self)

    def on_end(self, do: Callable[[Call], None]) -> None:
        """Have something done once it is over and no thread works for it any more; now, if that is so."""
        with self._lock:
            self._at_end.append(do)
        self._settle()

    def end(self) -> None:
        """It is over: its answer is sent, or its client gone."""
        with self._lock:
            self.is_over = True
        self._settle()

    def work_until(self, done: Future[Any]) -> None:
        """Count a thread's work as done for it, until that is done or dropped."""
        with self._lock:
            self._num_working += 1
        done.add_done_callback(self._work_done)

    def _work_done(self, _: Future[Any]) -> None:
        with self._lock:
            self._num_working -= 1
        self._settle()

    def _settle(self) -> None:
        with self._lock:
            if not self.is_over or self._num_working:
                return
            ready, self._at_end = self._at_end, []
        for do in ready:
            do(self)

    def line(self, as_json: bool) -> str:
        """What is logged of it: no word of prompts or answers."""
        shown: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "request_id": self.id, "client": self.client,
            "method": self.method, "path": self.path, "status": self.status, "seconds": round(self.seconds, 4),
            "body_bytes": self.num_body_bytes, "prompt_tokens": self.num_prompt, "completion_tokens": self.num_answer,
            "error": self.error,
        }  # fmt: skip
        if as_json:
            return json.dumps(shown)
        # json.dumps: a path may hold line breaks
        tail = f" {self.error}" if self.error else ""
        return (
            f"{shown['time']} {self.client} {self.id} {self.method} {json.dumps(self.path)} {self.status} "
            f"{self.seconds:.3f}s in={self.num_prompt} out={self.num_answer}{tail}"
        )


class CallPool(Executor):
    """A pool as one call uses it: what the call holds counts as held until its work there is done or dropped, which may be long after
    its client has left."""

    def __init__(self, pool: Executor, call: Call) -> None:
        self._pool, self._call = pool, call

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = self._pool.submit(fn, *args, **kwargs)
        self._call.work_until(future)
        return future


def call_of(scope: Scope) -> Call:
    """The call that a scope belongs to."""
    call: Call = scope[KEY]
    return call


class Calls:
    """Gives each request an id, its own x-request-id where that is a plain one, which goes back with the answer; logs it at its end, when
    at_end(call) is called, too. running: those that have not ended, kept up to date."""

    def __init__(
        self,
        app: ASGIApp,
        as_json: bool = False,
        at_end: Callable[[Call], None] = lambda call: None,
        running: set[Call] | None = None,
    ) -> None:
        self.app, self.as_json, self.at_end = app, as_json, at_end
        self.running = set() if running is None else running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        call = Call(
            id=given if ID.fullmatch(given) else uuid4().hex,
            method=scope["method"],
            path=scope["path"][:200],
            client=(scope.get("client") or ("-",))[0],
        )
        scope[KEY] = call
        self.running.add(call)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", call.id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            self.running.discard(call)
            call.end()
            self.at_end(call)
            log.info(call.line(self.as_json))
