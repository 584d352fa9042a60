"""The first byte of a stream leaves before the step after that of the first token ends."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from tests.server.harness import CHAT, COMPLETIONS, asks, events, noise_url, run, serving, tiny
from vlmfx.engine.engine import Engine
from vlmfx.engine.launched import Drawn
from vlmfx.engine.observer import Observer
from vlmfx.server.app import create_app

STEP_S = 0.2  # long beside all that the server does between


class Reads(Observer):
    """When each step's tokens were read."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def read(self, drawn: list[Drawn]) -> None:  # type: ignore[override]
        if drawn:
            self.at.append(time.perf_counter())


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_first_byte_does_not_wait_for_another_step(monkeypatch, path):
    step, sent = Engine.step, list[tuple[float, bytes]]()

    def slow(self: Engine, timeout: float | None = None) -> Any:
        time.sleep(STEP_S)
        return step(self, timeout)

    monkeypatch.setattr(Engine, "step", slow)
    body = asks("What is it?", noise_url(), stream=True, max_tokens=4, ignore_eos=True, return_token_ids=True)
    if path == COMPLETIONS:
        body = {**body, "prompt": "What is it?"}
        del body["messages"]
    with serving(tiny()) as service:
        reads = service.engine.engine.observer.inner = Reads()  # type: ignore[attr-defined]
        app = create_app(service)

        async def timed(scope: Any, receive: Any, send: Any) -> None:
            async def sending(message: Any) -> None:
                sent.append((time.perf_counter(), message.get("body", b"")))
                await send(message)

            await app(scope, receive, sending)

        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app=timed), base_url="http://server") as client:
                return await client.post(path, json=body)

        chunks = events(run(ask))
    tokens = [i for chunk in chunks for choice in chunk["choices"] for i in choice.get("token_ids") or ()]
    assert len(tokens) == len(reads.at) == 4
    first = next(at for at, body in sent if body)
    assert 0 < first - reads.at[0] < STEP_S
    with_tokens = [at for at, body in sent if b"token_ids" in body]
    # each token leaves before the next one is read
    assert all(read < left for read, left in zip(reads.at, with_tokens[-4:], strict=True))
    assert all(left < read for left, read in zip(with_tokens[-4:], reads.at[1:], strict=False))
