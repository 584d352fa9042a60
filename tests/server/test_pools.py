"""Pools: pictures to keep, texts to count and slow hosts hold up no prompt, have a bound, and leave nothing of clients that left."""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack

import pytest

from tests.server.harness import CHAT, DEMO, asks, client_of, run, serving, tiny
from vlmfx.server import images, tokens

MAX_WAITING = 3


@pytest.fixture
def service():
    with serving(tiny(), max_waiting=MAX_WAITING) as made:
        yield made
        assert made.bodies.num_held == 0


@pytest.mark.parametrize("what", ["images", "tokenize"])
def test_what_needs_no_engine_holds_up_no_prompt_and_has_a_bound(service, monkeypatch, what):
    gate = threading.Event()
    module, name = (images, "_kept") if what == "images" else (tokens, "_tokenized")
    true = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: gate.wait(30) and true(*given))
    options = {"content": DEMO.read_bytes(), "headers": {"content-type": "image/png"}}
    path = "/v1/images" if what == "images" else "/tokenize"
    options = options if what == "images" else {"json": {"prompt": "Hello"}}

    async def work():
        with ExitStack() as stack:
            stack.callback(gate.set)
            async with client_of(service) as client:
                sent = [asyncio.ensure_future(client.post(path, **options)) for _ in range(12)]
                answer = await asyncio.wait_for(client.post(CHAT, json=asks("x", max_tokens=1)), 10)
                assert answer.status_code == 200
                gate.set()
                return [await one for one in sent]

    done = run(work)
    refused = [response for response in done if response.status_code == 503]
    assert len(refused) == 12 - MAX_WAITING - 2
    assert all(response.headers["retry-after"] == "1" for response in refused)
    assert {response.status_code for response in done} == {200, 503}
