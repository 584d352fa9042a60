"""Streams and their readers: who goes away ends the request, who is slow holds up nobody, an error ends the stream in order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI

from tests.server.harness import CHAT, asks, events, post, run, scenes, serving, tiny
from vlmfx.errors import InternalError
from vlmfx.server import generation, stream
from vlmfx.server.app import create_app
from vlmfx.server.errors import ClientGone
from vlmfx.server.stream import unless_gone

LONG = {"max_tokens": 900, "ignore_eos": True}


class Connection:
    """A client of an application that can go away, and stop reading."""

    def __init__(self, app, body, path=CHAT):
        self.app, self.text, self.path = app, json.dumps(body).encode(), path
        self.gone, self.reads = asyncio.Event(), asyncio.Event()
        self.reads.set()
        self.came = asyncio.Event()
        self.sent = []
        self._is_sent = False

    async def receive(self):
        if not self._is_sent:
            self._is_sent = True
            return {"type": "http.request", "body": self.text, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        await self.reads.wait()
        self.sent.append(message)
        if message.get("body"):
            self.came.set()

    async def serve(self):
        headers = [(b"content-type", b"application/json"), (b"host", b"server")]
        scope = {"type": "http", "method": "POST", "path": self.path, "raw_path": self.path.encode(), "root_path": "",
                 "scheme": "http", "query_string": b"", "headers": headers, "client": ("test", 1), "server": ("s", 80),
                 "http_version": "1.1", "asgi": {"version": "3.0"}}  # fmt: skip
        await self.app(scope, self.receive, self.send)

    @property
    def text_sent(self):
        return b"".join(message.get("body", b"") for message in self.sent).decode()


@pytest.fixture
def service():
    with serving(scenes(), {"max_num_seqs": 2}) as made:
        yield made


@asynccontextmanager
async def all_rows_taken(app: FastAPI) -> AsyncIterator[None]:
    """Inside, as many long streams run as texts may be generated at once."""
    busy = [Connection(app, asks("x", stream=True, **LONG)) for _ in range(2)]
    tasks = [asyncio.ensure_future(one.serve()) for one in busy]
    for one in busy:
        await one.came.wait()
    yield
    for one in busy:
        one.gone.set()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_goes_away_ends_its_request(service, streams):
    async def work():
        connection = Connection(create_app(service), asks("x", stream=streams, **LONG))
        task = asyncio.ensure_future(connection.serve())
        if streams:
            await connection.came.wait()
        else:
            while not service.engine.engine.counters.num_drawn:
                await asyncio.sleep(0.01)
        assert service.engine.num_requests == 1
        connection.gone.set()
        await asyncio.wait_for(task, 5)
        assert service.engine.num_requests == 0
        while service.engine.engine.has_work:
            await asyncio.sleep(0.01)
        assert service.engine.engine.counters.num_drawn < 800
        assert "[DONE]" not in connection.text_sent

    run(work)


def test_a_client_that_goes_away_while_it_waits_ends_its_request(service):
    async def work():
        app = create_app(service)
        async with all_rows_taken(app):
            waiting = Connection(app, asks("y", stream=True, **LONG))
            task = asyncio.ensure_future(waiting.serve())
            await asyncio.sleep(0.2)
            assert (service.engine.num_requests, waiting.sent) == (3, [])
            waiting.gone.set()
            await asyncio.wait_for(task, 5)
            assert service.engine.num_requests == 2

    run(work)


def test_who_does_not_read_holds_up_nobody(service, monkeypatch):
    monkeypatch.setattr(stream, "STALL_S", 0.3)
    monkeypatch.setattr(stream, "PING_S", 0.3)

    async def work():
        app = create_app(service)
        slow, quick = (Connection(app, asks("x", stream=True, max_tokens=40, ignore_eos=True)) for _ in range(2))
        slow.reads.clear()
        task = asyncio.ensure_future(slow.serve())
        await asyncio.wait_for(quick.serve(), 20)
        assert "[DONE]" in quick.text_sent
        await asyncio.wait_for(task, 5)
        assert slow.sent == []
        assert service.engine.num_requests == 0

    run(work)


def test_a_ping_that_nobody_reads_is_not_waited_for(service, monkeypatch):
    monkeypatch.setattr(generation, "PATIENCE_S", 0.1)
    monkeypatch.setattr(stream, "PING_S", 0.1)
    monkeypatch.setattr(stream, "STALL_S", 0.5)

    async def work():
        app = create_app(service)
        async with all_rows_taken(app):
            waiting = Connection(app, asks("y", stream=True, max_tokens=3))
            task = asyncio.ensure_future(waiting.serve())
            await waiting.came.wait()
            waiting.reads.clear()
            await asyncio.wait_for(task, 5)
            assert service.engine.num_requests == 2

    run(work)


def test_a_client_that_goes_away_before_the_first_byte_ends_its_request(service, monkeypatch):
    """The generator of its lines was never begun, and so has nothing to end."""
    made = []

    def kept(*args, **options):
        made.append(events_of(*args, **options))
        return made[-1]

    async def work():
        connection = Connection(create_app(service), asks("x", stream=True, **LONG))
        connection.reads.clear()
        task = asyncio.ensure_future(connection.serve())
        while not service.engine.engine.counters.num_drawn:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # the response waits to be sent
        connection.gone.set()
        await asyncio.wait_for(task, 5)
        assert service.engine.num_requests == 0

    events_of = service.engine.events
    monkeypatch.setattr(service.engine, "events", kept)
    run(work)
    assert len(made) == 1


def test_a_stream_that_waits_begins_and_is_kept_alive(service, monkeypatch):
    monkeypatch.setattr(generation, "PATIENCE_S", 0.1)
    monkeypatch.setattr(stream, "PING_S", 0.1)

    async def work():
        app = create_app(service)
        async with all_rows_taken(app):
            waiting = Connection(app, asks("y", stream=True, max_tokens=3))
            task = asyncio.ensure_future(waiting.serve())
            while ": ping" not in waiting.text_sent:
                await asyncio.sleep(0.02)
            assert '"role":"assistant"' in waiting.text_sent
        await asyncio.wait_for(task, 20)
        assert waiting.text_sent.endswith("data: [DONE]\n\n")
        assert 'finish_reason":"' in waiting.text_sent

    run(work)


def test_a_fault_in_a_stream_is_an_event_and_then_the_end(service, monkeypatch):
    read = service.engine.engine._collect
    num_steps = 0

    def fail(launched):
        nonlocal num_steps
        num_steps += 1
        if num_steps == 30:
            raise RuntimeError("a secret")
        read(launched)

    monkeypatch.setattr(service.engine.engine, "_collect", fail)
    chunks = events(post(service, CHAT, asks("x", stream=True, return_token_ids=True, **LONG)))
    assert sum(len(c.get("token_ids", ())) for chunk in chunks[:-1] for c in chunk["choices"]) == 29
    assert chunks[-1]["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(chunks)


def test_the_first_chunk_comes_before_the_second_token_is_drawn(monkeypatch):
    """A step that waits until the first chunk has left: the chunk does not wait for the step."""
    with serving(tiny(), {"max_num_seqs": 1}) as service:

        async def work():
            connection = Connection(create_app(service), asks("x", stream=True, max_tokens=4, ignore_eos=True))
            loop = asyncio.get_running_loop()
            step, held = service.engine.engine.step_or_fail, []

            def stepped(timeout):
                if service.engine.engine.counters.num_drawn == 1:
                    held.append(asyncio.run_coroutine_threadsafe(connection.came.wait(), loop).result(10))
                return step(timeout)

            monkeypatch.setattr(service.engine.engine, "step_or_fail", stepped)
            await connection.serve()
            assert held == [True]
            assert "[DONE]" in connection.text_sent

        run(work)


def test_work_and_its_client():
    async def work():
        gone = asyncio.Event()

        async def receive():
            await gone.wait()
            return {"type": "http.disconnect"}

        async def slow():
            try:
                await asyncio.sleep(20)
            except asyncio.CancelledError:
                ended.append(True)
                raise

        async def fail():
            raise InternalError("x")

        ended: list[bool] = []
        assert await unless_gone(receive, asyncio.sleep(0, "done")) == "done"
        with pytest.raises(InternalError):
            await unless_gone(receive, fail())
        left = asyncio.ensure_future(slow())
        assert await unless_gone(receive, left, 0.01) is None
        assert not left.done()
        gone.set()
        with pytest.raises(ClientGone):
            await unless_gone(receive, left)
        assert ended == [True]

    run(work)
