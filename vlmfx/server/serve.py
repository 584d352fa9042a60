"""A server process: bind, load, listen, and at SIGTERM finish what runs."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import uvicorn

from vlmfx.checkpoint import Model
from vlmfx.compile.counter import CompileCounter
from vlmfx.engine.async_engine import AsyncEngine
from vlmfx.engine.engine import Engine
from vlmfx.engine.request import SamplingParams
from vlmfx.engine.sequence import Request
from vlmfx.processing.prompt import with_options
from vlmfx.server.addresses import bind, url_of
from vlmfx.server.app import create_app
from vlmfx.server.charges import charge
from vlmfx.server.connections import Connection, allow_files
from vlmfx.server.metrics import Metrics
from vlmfx.server.options import ServerOptions
from vlmfx.server.service import Service
from vlmfx.server.steps import StepCounter

log = logging.getLogger("vlmfx.server")
MARGIN_S = 5.0  # after the time for draining, for last answers to leave
ENDING_S = 2.0  # for threads whose work nobody waits for any more
BACKLOG = 2048


class Loaded(Protocol):
    """What a server needs of an LLM."""

    model: Model
    engine: Engine

    @property
    def task(self) -> str: ...

    def request(self, number: int, prompt: Any, params: SamplingParams | None = None, **more: Any) -> Request: ...


def serve(load: Callable[[], Loaded], options: ServerOptions) -> int:
    """Serve what load gives until SIGTERM or SIGINT; the exit code: 0 after an orderly end, 130 after SIGINT. Where a thread does not end,
    the process does, at once.

    The address is taken before the model is loaded, so that one that is in use shows at once, but connections are refused until the
    model is there. Raises InvalidRequest for the address, and what load raises."""
    _log_to_stderr()
    allow_files(options.max_connections)
    listeners = bind(options)
    try:
        service = service_of(load(), options)
        code = _served(service, listeners)
    finally:
        for listener in listeners:
            listener.close()
        if options.uds:
            with suppress(OSError):
                os.unlink(options.uds)
    if not service.join(ENDING_S):  # Python's own end would abort the process where a thread is inside torch
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _served(service: Service, listeners: list[socket.socket]) -> int:
    """The exit code, when all that is begun is ended but for threads."""
    try:
        _run(service, listeners)
    except KeyboardInterrupt:
        return 130
    finally:
        service.engine.close()
        service.close()
    return 0


def service_of(llm: Loaded, options: ServerOptions) -> Service:
    """An LLM's engine in a thread of its own, for prompts of clients: paths in them are not read from this machine's disk."""
    counter = CompileCounter()
    steps = StepCounter(llm.engine.observer, llm.engine.executor)
    llm.engine.observer = steps
    metrics = Metrics(
        llm.engine, steps, options.names[0], prefix=options.metrics_prefix, compiles=lambda: counter.total
    )
    media = {
        "allow_paths": False,
        "on_fetch": metrics.fetched,
        "on_bytes": charge,
        "max_image_pixels": options.max_image_pixels,
    }
    llm.model = replace(llm.model, processor=with_options(llm.model.processor, None, media))
    engine = AsyncEngine(llm.engine, llm.request, max_waiting=options.max_waiting)
    return Service(engine=engine, processor=llm.model.processor, task=llm.task, options=options, metrics=metrics)


def _run(service: Service, listeners: list[socket.socket]) -> None:
    options = service.options
    connection = partial(Connection, max_connections=options.max_connections, header_timeout_s=options.header_timeout_s)
    config = uvicorn.Config(
        create_app(service),
        root_path="",  # the application has it
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        http=connection,  # type: ignore[arg-type]  # a class with some arguments given
        backlog=BACKLOG,
        access_log=False,
        log_config=None,
        log_level="warning",
        lifespan="off",
        ws="none",
        proxy_headers=False,  # anybody could write the address that is logged
        server_header=False,
        timeout_graceful_shutdown=int(options.drain_timeout_s + MARGIN_S),
    )
    if not (options.api_keys or options.is_local):
        log.warning("no API key is set: whoever reaches this address can use the model; see --api-key and --host.")
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it once more when it is done
    try:
        urls = [url_of(options, listener) for listener in listeners]
        _Server(config, service, urls).run(sockets=listeners)
    finally:
        signal.signal(signal.SIGTERM, before)


class _Server(uvicorn.Server):
    """Uvicorn's server, which drains the engine while it waits for its connections to end."""

    def __init__(self, config: uvicorn.Config, service: Service, urls: list[str]) -> None:
        super().__init__(config)
        self.service, self.urls = service, urls

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        log.info("serving %s at %s", ", ".join(self.service.options.names), " and ".join(self.urls))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        seconds = self.service.options.drain_timeout_s
        log.info("ending: %d requests have %g s to finish", len(self.service.calls), seconds)
        draining = asyncio.ensure_future(self.service.drain(seconds))
        await super().shutdown(sockets)
        await draining


def _log_to_stderr() -> None:
    """Log lines as they are, unless the program has said where they go."""
    if not logging.getLogger().handlers and not logging.getLogger("vlmfx").handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logging.getLogger("vlmfx").addHandler(handler)
        logging.getLogger("vlmfx").setLevel(logging.INFO)
        logging.getLogger("vlmfx").propagate = False
