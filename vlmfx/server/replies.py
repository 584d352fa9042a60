"""Replies: bodies as JSON, and every error of a handler as one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any

import orjson
from fastapi import Request, Response

from vlmfx.server.calls import call_of
from vlmfx.server.errors import ClientGone, error_kind, error_reply
from vlmfx.server.metrics import Metrics

Handler = Callable[[Request], Awaitable[Response]]


def json_reply(body: Any, status: int = 200) -> Response:
    """A body as JSON."""
    return Response(orjson.dumps(body), status, media_type="application/json")


async def reply(body: Callable[[], Any], pool: Executor | None) -> Response:
    """What body gives, as JSON; made in a thread of pool where there is one."""
    if pool is None:
        return json_reply(body())
    return await asyncio.get_running_loop().run_in_executor(pool, lambda: json_reply(body()))


def guarded(path: str, handler: Handler, metrics: Metrics) -> Handler:
    """The handler of a route's path, whose errors are responses."""

    async def handle(request: Request) -> Response:
        call = call_of(request.scope)
        call.route = path
        try:
            return await handler(request)
        except ClientGone as error:
            call.error = error_kind(error)
            metrics.failed(call.error, 499)
            return Response(status_code=499)  # nobody reads it; the log shows it
        except Exception as error:
            response = error_reply(error, call.id)
            call.error = error_kind(error)
            metrics.failed(call.error, response.status_code)
            return response

    return handle
