"""Deadlines: --request-timeout covers all that is done for a request, from its first byte on, and ends it the same way everywhere."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import ExitStack

import pytest

from tests.server.harness import CHAT, EMBEDDINGS, PICTURE_URL, asks, refused, request, serving, tiny
from vlmfx.server import images, tokens
from vlmfx.server.service import NUM_WORKING, SMALL


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("url", [(), ("http://example.invalid/x.png",)])
def test_a_request_whose_time_is_over_before_it_is_generated_gets_the_same_answer(monkeypatch, url, streams):
    gate = threading.Event()
    with ExitStack() as stack, serving(tiny(), request_timeout_s=0.3) as service:
        stack.callback(gate.set)
        in_generation = refused(service, CHAT, asks("x", max_tokens=400, ignore_eos=True), 504)
        monkeypatch.setattr(service.engine, "make", lambda *given, **more: gate.wait(20))
        start = time.perf_counter()
        assert refused(service, CHAT, asks("x", *url, stream=streams), 504) == in_generation
        assert time.perf_counter() - start < 5


def test_the_time_of_a_request_begins_when_it_comes(monkeypatch):
    """And not when its body has been read."""
    with serving(tiny(), request_timeout_s=0.3) as service:

        async def slow():
            yield b"{"
            await asyncio.sleep(0.5)
            yield json.dumps(asks("x", max_tokens=1)).encode()[1:]

        headers = {"content-type": "application/json"}
        assert request(service, "POST", CHAT, content=slow(), headers=headers).status_code == 504


def busy(service, gate):
    """No thread is free before the gate opens."""
    for _ in range(NUM_WORKING):
        service.working.submit(gate.wait)


def test_a_body_that_waits_to_be_parsed_has_no_more_time():
    gate = threading.Event()
    with ExitStack() as stack, serving(tiny(), request_timeout_s=0.3) as service:
        stack.callback(gate.set)
        busy(service, gate)
        assert refused(service, CHAT, asks("x" * 2 * SMALL, max_tokens=1), 504)
        assert service.working.num_waiting == 0


def test_an_answer_that_waits_to_be_written_has_no_more_time():
    gate = threading.Event()
    with ExitStack() as stack, serving(tiny(), {"task": "embed"}, request_timeout_s=3) as service:
        stack.callback(gate.set)
        make = service.engine.make

        def made(*given, **more):
            busy(service, gate)
            return make(*given, **more)

        service.engine.make = made
        assert refused(service, EMBEDDINGS, {"input": "x"}, 504)
        assert service.working.num_waiting == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]}), ("/v1/images", {"url": PICTURE_URL})],
)
def test_what_needs_no_engine_has_no_more_time(monkeypatch, path, body):
    gate = threading.Event()
    with ExitStack() as stack, serving(tiny(), request_timeout_s=0.3) as service:
        stack.callback(gate.set)
        for module, name in ((images, "_kept"), (tokens, "_tokenized"), (tokens, "_detokenized")):
            monkeypatch.setattr(module, name, lambda *given: gate.wait(20))
        assert refused(service, path, body, 504)
