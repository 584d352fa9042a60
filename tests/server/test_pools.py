"""Pools: pictures to keep, texts to count and slow hosts hold up no prompt, have a bound, and leave nothing of clients that left."""

from __future__ import annotations

import asyncio
import threading
from contextlib import ExitStack
from typing import Any

import pytest

from tests.server.harness import CHAT, DEMO, EMBEDDINGS, asks, client_of, refused, run, serving, tiny
from tests.server.test_stream import Connection
from vlmfx.errors import InvalidRequest
from vlmfx.server import embeddings, generation, images, tokens, urls
from vlmfx.server import service as service_module
from vlmfx.server.app import create_app
from vlmfx.server.service import NUM_ASIDE, NUM_FETCHING, NUM_WORKING, SMALL

MAX_WAITING = 3
PICTURE: dict[str, Any] = {"content": DEMO.read_bytes(), "headers": {"content-type": "image/png"}}


@pytest.fixture
def service():
    with serving(tiny(), max_waiting=MAX_WAITING) as made:
        yield made
        assert made.bodies.num_held == 0


@pytest.mark.parametrize(
    ("module", "name", "path", "options"),
    [(images, "_kept", "/v1/images", PICTURE), (tokens, "_tokenized", "/tokenize", {"json": {"prompt": "Hello"}}),
     (tokens, "_detokenized", "/detokenize", {"json": {"tokens": [1, 2]}})],
    ids=["images", "tokenize", "detokenize"],
)  # fmt: skip
def test_what_needs_no_engine_holds_up_no_prompt_and_has_a_bound(service, monkeypatch, module, name, path, options):
    gate = threading.Event()
    true = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: gate.wait(30) and true(*given))

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
    assert len(refused) == 12 - MAX_WAITING - NUM_ASIDE
    assert all(response.headers["retry-after"] == "1" for response in refused)
    assert {response.status_code for response in done} == {200, 503}


async def until(is_so) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("name", "path", "body"),
    [("_tokenized", "/tokenize", {"prompt": "x" * 1000}), ("_detokenized", "/detokenize", {"tokens": [1] * 1000})],
)
def test_what_a_client_that_left_sent_counts_as_held_until_no_thread_works_for_it(monkeypatch, name, path, body):
    gate = threading.Event()
    monkeypatch.setattr(tokens, name, lambda *given: gate.wait(30) and {})
    with ExitStack() as stack, serving(tiny(), max_waiting=100) as service:
        stack.callback(gate.set)

        async def work():
            app = create_app(service)
            left = [Connection(app, body, path) for _ in range(50)]
            tasks = [asyncio.ensure_future(one.serve()) for one in left]
            await until(lambda: service.aside.num_waiting == len(left) - NUM_ASIDE)
            size = len(left[0].text)
            assert service.bodies.num_held == len(left) * size
            for one in left:
                one.gone.set()
            await asyncio.gather(*tasks)
            assert service.aside.num_waiting == 0  # what nobody has begun is dropped
            assert service.bodies.num_held == NUM_ASIDE * size
            gate.set()
            await until(lambda: service.bodies.num_held == 0)

        run(work)


def test_bodies_that_wait_to_be_parsed_have_a_bound_and_are_dropped_with_their_clients(service):
    gate, most = threading.Event(), MAX_WAITING + service.engine.engine.limits.max_num_seqs + NUM_WORKING
    with ExitStack() as stack:
        stack.callback(gate.set)
        for _ in range(NUM_WORKING):
            service.working.submit(gate.wait, 30)

        async def work():
            app = create_app(service)
            asked = [Connection(app, asks("x" * 2 * SMALL)) for _ in range(most + 5)]
            tasks = [asyncio.ensure_future(one.serve()) for one in asked]
            await until(lambda: sum(one.came.is_set() for one in asked) == 5)
            assert all("wait already" in one.text_sent for one in asked if one.came.is_set())
            assert service.working.num_waiting == most
            for one in asked:
                one.gone.set()
            await asyncio.gather(*tasks)
            assert service.working.num_waiting == 0
            assert service.bodies.num_held == 0

        run(work)


@pytest.mark.parametrize("path", [CHAT, "/tokenize", EMBEDDINGS, "/v1/score"])
def test_what_a_long_body_names_is_looked_for_by_no_thread_that_all_others_wait_for(monkeypatch, path):
    threads = []

    def names_urls(prompt):
        threads.append(threading.current_thread().name)
        return urls.names_urls(prompt)

    for module in (generation, tokens, embeddings, service_module):
        monkeypatch.setattr(module, "names_urls", names_urls, raising=False)
    body = asks("x " * SMALL)
    if path == "/v1/score":
        body = {"text_1": "x", "text_2": "x " * SMALL}
    with serving(tiny(), {"task": "embed"} if path in (EMBEDDINGS, "/v1/score") else None) as made:
        if path in ("/tokenize", EMBEDDINGS):
            body = {"messages": body["messages"]}
        refused(made, path, body)  # too long, but that is not known before
    assert threads
    assert set(threads) == {"vlmfx-serve"}


def test_a_fetch_whose_client_left_is_not_begun(monkeypatch):
    gate, fetched = threading.Event(), []

    def request(number, prompt, *given, **more):
        fetched.append(number)
        gate.wait(30)
        raise InvalidRequest("url", "it is not there; name another.")

    with ExitStack() as stack, serving(tiny(), max_waiting=500) as service:
        stack.callback(gate.set)
        monkeypatch.setattr(service.engine, "make", request)

        async def work():
            app = create_app(service)
            asked = [Connection(app, asks("x", f"http://example.invalid/{i}.png")) for i in range(NUM_FETCHING + 200)]
            tasks = [asyncio.ensure_future(one.serve()) for one in asked]
            await until(lambda: len(fetched) == NUM_FETCHING and service.fetching.num_waiting == 200)
            assert sum(thread.name == "vlmfx-fetch" for thread in threading.enumerate()) == NUM_FETCHING
            for one in asked:
                one.gone.set()
            await asyncio.gather(*tasks)
            gate.set()
            await until(lambda: service.bodies.num_held == 0)
            assert len(fetched) == NUM_FETCHING

        run(work)
