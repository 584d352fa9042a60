"""At SIGTERM what a server does for a request is finished, whatever that is; what comes too late is told to go elsewhere."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.server.harness import CHAT, DEMO, asks, client_of, run, serving, tiny
from tests.server.test_serve import Server, served
from vlmfx.server import service

LOCAL = ("scenes", "--port", "0", "--host", "127.0.0.1")


@contextmanager
def slow_host(seconds: float, asked: threading.Event) -> Iterator[str]:
    """A host that has a picture, and takes so long to begin its answer."""
    body = DEMO.read_bytes()
    with socket.socket() as host:
        host.bind(("127.0.0.1", 0))
        host.listen()

        def answer() -> None:
            connection, _ = host.accept()
            with connection:
                connection.recv(65536)
                asked.set()
                time.sleep(seconds)
                connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)

        threading.Thread(target=answer, daemon=True).start()
        yield f"127.0.0.1:{host.getsockname()[1]}"


@pytest.mark.parametrize("path", ["/tokenize", "/v1/images"])
def test_what_needs_no_engine_is_finished(tmp_path, path):
    asked = threading.Event()
    with (
        slow_host(1.5, asked) as place,
        served(tmp_path / "log", *LOCAL, "--private-media-hosts", place) as server,
    ):

        def end() -> None:
            asked.wait(20)
            server.process.send_signal(signal.SIGTERM)

        threading.Thread(target=end).start()
        url = f"http://{place}/x.png"
        body = {"url": url} if path == "/v1/images" else {"messages": asks("x", url)["messages"]}
        response = httpx.post(f"{server.url}{path}", json=body, timeout=30)
        assert response.status_code == 200, response.text
        assert server.process.wait(10) == 0, server.log.read_text()
        assert "Traceback" not in server.log.read_text()


def begun(server: Server, body: bytes, sent: int) -> socket.socket:
    """A connection on which so many bytes of a body have been sent."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body[:sent])
    return connection


def ended(connection: socket.socket) -> tuple[int, str]:
    """(status, body) of the answer on a connection."""
    response = b""
    while part := connection.recv(65536):
        response += part
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


def test_a_body_that_comes_late_is_told_to_go_elsewhere(tmp_path):
    body = json.dumps(
        asks("x" * 100_000, model="scenes")
    ).encode()  # too long for the context, but that is not known before it is read
    with served(tmp_path / "log", *LOCAL) as server, begun(server, body, 50_000) as connection:
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        connection.sendall(body[50_000:])
        status, text = ended(connection)
        assert (status, json.loads(text)["error"]["type"]) == (503, "server_error")
        assert server.process.wait(10) == 0, server.log.read_text()
        assert "Traceback" not in server.log.read_text()


def test_a_body_that_crawls_does_not_hold_up_the_end_for_as_long_as_answers_may(monkeypatch):
    monkeypatch.setattr(service, "GRACE_S", 0.2)

    async def crawling():
        while True:
            yield b" "
            await asyncio.sleep(0.02)

    with serving(tiny()) as made:

        async def work():
            async with client_of(made) as client:
                headers = {"content-type": "application/json"}
                sent = asyncio.ensure_future(client.post(CHAT, content=crawling(), headers=headers))
                while not made.bodies.num_held:
                    await asyncio.sleep(0.01)
                await made.drain(600)
                return await sent

        response = run(work)
    assert response.status_code == 503
    assert "shut down" in response.json()["error"]["message"]


def test_a_body_that_never_comes_holds_up_the_end_no_longer_than_it_may(tmp_path):
    with (
        served(tmp_path / "log", *LOCAL, "--drain-timeout", "0.5") as server,
        begun(server, b"x" * 1000, 10) as connection,
    ):
        time.sleep(0.3)
        told_at = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        status, text = ended(connection)
        assert (status, json.loads(text)["error"]["type"]) == (503, "server_error")
        assert time.monotonic() - told_at < 4  # uvicorn would cancel it after five seconds more
        assert server.process.wait(10) == 0, server.log.read_text()
        assert "Traceback" not in server.log.read_text()
