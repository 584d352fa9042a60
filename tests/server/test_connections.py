"""Connections: too many of them, and those that keep a server waiting."""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import uvicorn
from uvicorn.server import ServerState

from tests.server.harness import run
from vlmfx.server import connections
from vlmfx.server.connections import SPARE_FILES, Connection, allow_files

ASK = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
LARGE = 64 * 2**20  # more than the system keeps for a client that does not read


async def app(scope, receive, send):
    """Answers /slow after half a second, /large and /cut at length, the latter without an end, and all else at once; it reads no body."""
    path = scope["path"]
    await asyncio.sleep(0.5 if path == "/slow" else 0)
    body = bytes(LARGE) if path in ("/large", "/cut") else b"ok"
    length = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    await send({"type": "http.response.body", "body": body, "more_body": path == "/cut"})


@asynccontextmanager
async def listening(
    max_connections: int = 1024, header_timeout_s: float = 0.2, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """The port of a server of Connections; in the end none is left."""
    config, state = uvicorn.Config(app, lifespan="off", ws="none", log_config=None), ServerState()
    config.load()
    made = partial(Connection, config, state, {}, max_connections=max_connections, header_timeout_s=header_timeout_s)
    server = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
        end = time.monotonic() + 5
        while state.connections:
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
    finally:
        for left in list(state.connections):  # of a test that fails: no task that waits for a reader can be cancelled
            left.transport.abort()
        server.close()


async def dripped(port: int, start: bytes, drop: bytes) -> float:
    """Seconds until a connection is cut that gets a drop now and then; it never reads."""
    began = time.monotonic()
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(start)
    with suppress(ConnectionError):
        while time.monotonic() < began + 5:
            await asyncio.sleep(0.05)
            writer.write(drop)
            await writer.drain()
    writer.close()
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("start", "drop"),
    [(b"", b""), (b"GET / HTTP/1.1\r\n", b"X-A: b\r\n"), (ASK, b"X"),
     (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n", b"x")],
    ids=["nothing", "headers", "a second request", "a body that nobody wants"],
)  # fmt: skip
def test_a_client_that_drips_is_cut(start, drop):
    async def work():
        async with listening() as port:
            if drop:
                assert await dripped(port, start, drop) < 1.5
            else:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                assert await asyncio.wait_for(reader.read(), 1) == b""
                writer.close()

    run(work)


def test_who_asks_in_time_is_answered_however_long_it_takes():
    async def work():
        async with listening() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(3):
                writer.write(ASK.replace(b"/ ", b"/slow "))
                assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")
                await asyncio.sleep(0.1)
            writer.close()

    run(work)


@pytest.mark.parametrize("path", [b"/large", b"/cut"])
def test_an_answer_that_nobody_reads_is_dropped(path):
    """The end of `listening` is that no connection is left, though this one's buffers are full."""

    async def work():
        async with listening() as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
            writer.write(ASK.replace(b"/ ", path + b" "))
            await asyncio.sleep(0.1)
        writer.close()

    run(work)


def test_an_answer_that_nobody_reads_is_dropped_though_another_waits_behind_it():
    """The second cannot begin before some of the first is read, and is none that is being made."""

    async def work():
        async with listening() as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
            writer.write(ASK.replace(b"/ ", b"/large ") * 2)
            await asyncio.sleep(0.1)
        writer.close()

    run(work)


def test_an_answer_that_is_read_slowly_is_sent():
    async def work():
        async with listening() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(ASK.replace(b"/ ", b"/large "))
            num_read = 0
            while num_read < LARGE:
                num_read += len(await asyncio.wait_for(reader.read(2**22), 5))
                await asyncio.sleep(0.01)
            writer.close()

    run(work)


def test_more_connections_than_may_be_are_told_so():
    async def work():
        async with listening(max_connections=2, header_timeout_s=0) as port:
            kept = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            for _ in range(3):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                head, _, body = (await asyncio.wait_for(reader.read(), 5)).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 503 ")
                assert b"Retry-After: 1" in head
                assert "2 connections are open" in json.loads(body)["error"]["message"]
                writer.close()
            for reader, writer in kept:  # those that were there first are served
                writer.write(ASK)
                assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")
                writer.close()
            await asyncio.sleep(0.05)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(ASK)
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")
            writer.close()

    run(work)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not on this machine")
def test_a_refusal_over_tls_waits_for_no_client_to_end_its_side(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "GOODBYE_S", 0.2)
    files = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, *files], check=True, capture_output=True)
    theirs, ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=tmp_path / "cert")
    theirs.load_cert_chain(tmp_path / "cert", tmp_path / "key")

    def refused(port: int) -> None:
        encrypted = ours.wrap_socket(socket.create_connection(("127.0.0.1", port), 20), server_hostname="localhost")
        text = b""
        while part := encrypted.recv(65536):
            text += part
        assert text.startswith(b"HTTP/1.1 503 ")
        with socket.socket(fileno=encrypted.detach()) as bare:  # TLS has ended, of their side
            bare.settimeout(20)
            with suppress(ConnectionError):
                assert bare.recv(1) == b""

    async def work():
        async with listening(max_connections=1, header_timeout_s=0, tls=theirs) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=ours, server_hostname="localhost")
            await asyncio.to_thread(refused, port)
            writer.close()

    run(work)


def test_there_are_files_for_as_many():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        allow_files(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(300 + SPARE_FILES, before[1]), before[1])
        allow_files(1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
