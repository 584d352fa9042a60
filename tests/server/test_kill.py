"""A server that is killed while it answers leaves nothing behind that keeps the next one from serving."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import httpx
import pytest

from tests.server.harness import CHAT, PICTURE_URL, asks
from tests.server.test_serve import Server, served


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def client_of(server: Server, uds: Path | None) -> httpx.Client:
    base = "http://server" if uds else server.url
    return httpx.Client(base_url=base, timeout=60, transport=httpx.HTTPTransport(uds=str(uds)) if uds else None)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["port", "uds"])
def test_after_sigkill_the_same_command_serves_again(tmp_path, by):
    uds = tmp_path / "socket" if by == "uds" else None
    where = ["--uds", str(uds)] if uds else ["--host", "127.0.0.1", "--port", free_port()]
    long = asks("x", model="scenes", stream=True, max_tokens=1900, ignore_eos=True, return_token_ids=True)
    for number in range(3):
        with served(tmp_path / f"log{number}", "scenes", *where) as server, client_of(server, uds) as client:
            answer = client.post(CHAT, json=asks("What colour is the star?", PICTURE_URL, model="scenes"))
            assert answer.json()["choices"][0]["message"]["content"] == "red"
            with client.stream("POST", CHAT, json=long) as response:
                lines = response.iter_lines()
                while "token_ids" not in next(lines):
                    pass
                assert server.end(signal.SIGKILL) == -signal.SIGKILL
                with pytest.raises(httpx.HTTPError):  # the client is told that this is not the end of the answer
                    list(lines)
