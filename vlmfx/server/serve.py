"""A server process: bind, load, listen, and at SIGTERM finish what runs."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

import uvicorn

from vlmfx.checkpoint import Model
from vlmfx.compile.counter import CompileCounter
from vlmfx.engine.async_engine import AsyncEngine
from vlmfx.engine.engine import Engine
from vlmfx.engine.request import SamplingParams
from vlmfx.engine.sequence import Request
from vlmfx.errors import InvalidRequest
from vlmfx.processing.prompt import with_options
from vlmfx.server.app import create_app
from vlmfx.server.charges import charge
from vlmfx.server.metrics import Metrics
from vlmfx.server.options import ServerOptions
from vlmfx.server.service import Service
from vlmfx.server.steps import StepCounter

log = logging.getLogger("vlmfx.server")
MARGIN_S = 5.0  # after the time for draining, for last answers to leave
BACKLOG = 2048


class Loaded(Protocol):
    """What a server needs of an LLM."""

    model: Model
    engine: Engine

    @property
    def task(self) -> str: ...

    def request(self, number: int, prompt: Any, params: SamplingParams | None = None, **more: Any) -> Request: ...


def serve(load: Callable[[], Loaded], options: ServerOptions) -> int:
    """Serve what load gives until SIGTERM or SIGINT; 0 after an orderly end.

    The address is taken before the model is loaded, so that one that is in use shows at once, but connections are refused until the
    model is there. Raises InvalidRequest for the address, and what load raises."""
    _log_to_stderr()
    listener = bind(options)
    try:
        service = service_of(load(), options)
        try:
            _run(service, listener)
        finally:
            service.engine.close()
            service.close()
    finally:
        listener.close()
        if options.uds:
            with suppress(OSError):
                os.unlink(options.uds)
    return 0


def service_of(llm: Loaded, options: ServerOptions) -> Service:
    """An LLM's engine in a thread of its own, for prompts of clients: paths in them are not read from this machine's disk."""
    counter = CompileCounter()
    steps = StepCounter(llm.engine.observer, llm.engine.executor)
    llm.engine.observer = steps
    metrics = Metrics(
        llm.engine, steps, options.names[0], prefix=options.metrics_prefix, compiles=lambda: counter.total
    )
    media = {"allow_paths": False, "on_fetch": metrics.fetched, "on_bytes": charge}
    llm.model = replace(llm.model, processor=with_options(llm.model.processor, None, media))
    engine = AsyncEngine(llm.engine, llm.request, max_waiting=options.max_waiting)
    return Service(engine=engine, processor=llm.model.processor, task=llm.task, options=options, metrics=metrics)


def bind(options: ServerOptions) -> socket.socket:
    """The socket of the address, which does not listen yet. Raises InvalidRequest."""
    where = options.uds or f"{options.host or '*'}:{options.port}"
    try:
        if options.uds:
            with suppress(FileNotFoundError):
                if stat.S_ISSOCK(os.stat(options.uds).st_mode) and not _answers(options.uds):
                    os.unlink(options.uds)  # left by a server that was killed
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(options.uds)
            return listener
        found = socket.getaddrinfo(
            options.host or "0.0.0.0", options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, proto, _, address = found[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except OSError as error:
        is_used = error.errno == errno.EADDRINUSE
        why = "it is in use" if is_used else f"it cannot be had ({error.strerror or error})"
        raise InvalidRequest("uds" if options.uds else "port", f"{where}: {why}; choose another.") from error


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def _run(service: Service, listener: socket.socket) -> None:
    options = service.options
    config = uvicorn.Config(
        create_app(service),
        root_path="",  # the application has it
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
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
        _Server(config, service, _url(options, listener)).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)


class _Server(uvicorn.Server):
    """Uvicorn's server, which drains the engine while it waits for its connections to end."""

    def __init__(self, config: uvicorn.Config, service: Service, url: str) -> None:
        super().__init__(config)
        self.service, self.url = service, url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        log.info("serving %s at %s", ", ".join(self.service.options.names), self.url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        seconds = self.service.options.drain_timeout_s
        log.info("ending: %d requests have %g s to finish", len(self.service.calls), seconds)
        draining = asyncio.ensure_future(self.service.drain(seconds))
        await super().shutdown(sockets)
        await draining


def _url(options: ServerOptions, listener: socket.socket) -> str:
    if options.uds:
        return f"unix:{options.uds}"
    host, port = listener.getsockname()[:2]
    return (
        f"http{'s' if options.ssl_certfile else ''}://{f'[{host}]' if ':' in host else host}:{port}{options.root_path}"
    )


def _log_to_stderr() -> None:
    """Log lines as they are, unless the program has said where they go."""
    if not logging.getLogger().handlers and not logging.getLogger("vlmfx").handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logging.getLogger("vlmfx").addHandler(handler)
        logging.getLogger("vlmfx").setLevel(logging.INFO)
        logging.getLogger("vlmfx").propagate = False
