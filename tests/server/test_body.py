"""Bodies: what is too large, too slow, too deep or no JSON never reaches the engine, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gzip
import json
import time

import pytest

from tests.server.harness import CHAT, asks, client_of, post, request, run, serving, tiny
from vlmfx.errors import InvalidRequest
from vlmfx.server.body import MAX_ITEMS, parsed

JSON = {"content-type": "application/json"}
LIMIT = 20_000


@pytest.fixture(scope="module")
def service():
    with serving(tiny(), max_body_bytes=LIMIT, max_held_bytes=50_000, body_timeout_s=0.3) as made:
        yield made
        assert made.bodies.num_held == 0


def error_of(response):
    return response.status_code, response.json()["error"]["code"] or response.json()["error"]["param"]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("has_length", [False, True])
def test_a_body_that_is_too_large(service, has_length, streams):
    text = json.dumps(asks("x" * LIMIT, stream=streams)).encode()

    async def parts():
        for start in range(0, len(text), 1000):
            yield text[start : start + 1000]

    response = request(service, "POST", CHAT, content=text if has_length else parts(), headers=JSON)
    assert error_of(response) == (413, "request_too_large")
    assert response.headers["connection"] == "close"
    assert post(service, CHAT, asks("x")).status_code == 200


def test_an_endless_body_is_read_up_to_the_limit(service):
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 1000
            yield b" " * 1000

    assert error_of(request(service, "POST", CHAT, content=endless(), headers=JSON))[0] == 413
    assert sent <= LIMIT + 2000


def test_a_length_that_lies_is_no_help(service):
    headers = {**JSON, "content-length": "9" * 30}
    assert error_of(request(service, "POST", CHAT, content=b"{}", headers=headers))[0] == 413


def test_a_slow_body(service):
    async def slow():
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    start = time.perf_counter()
    assert request(service, "POST", CHAT, content=slow(), headers=JSON).status_code == 408
    assert time.perf_counter() - start < 4


def test_bodies_that_hold_too_much_together(service):
    body = asks("x" * 18_000, max_tokens=10**6)

    async def work():
        async with client_of(service) as client:
            return await asyncio.gather(*(client.post(CHAT, json=body) for _ in range(6)))

    statuses = {response.status_code for response in run(work)}
    assert statuses == {400, 503}  # read, and refused; not read
    assert service.bodies.num_held == 0


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"nonsense",
        b"\xff\xfe",
        b'{"a": NaN}',
        b"{} {}",
        b"[" * 5000 + b"]" * 5000,
        b'"\\ud800"',
        b"1e999",
        gzip.compress(b"{}", mtime=0),
    ],
)
def test_what_is_no_json(service, text):
    assert error_of(request(service, "POST", CHAT, content=text, headers=JSON)) == (400, "body")


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_other_types_are_refused(service, kind):
    headers = {} if kind is None else {"content-type": kind}
    response = request(service, "POST", CHAT, content=json.dumps(asks("x")).encode(), headers=headers)
    assert error_of(response) == (415, "unsupported_media_type")
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert request(service, "POST", CHAT, content=json.dumps(asks("x")).encode(), headers=headers).status_code == 200


def test_depth_and_items_have_bounds():
    assert parsed(b'{"a":' * 90 + b"1" + b"}" * 90)
    for text in (b'{"a":' * 110 + b"1" + b"}" * 110, b"[" * 110 + b"]" * 110):
        with pytest.raises(InvalidRequest, match="100 levels"):
            parsed(text)
    with pytest.raises(InvalidRequest, match="items"):
        parsed(b"[" + b"[]," * (MAX_ITEMS // 2 + 1) + b"[]]")
    assert len(parsed(b"[" + b"1," * 1000 + b"1]")) == 1001


@pytest.mark.parametrize(
    "body",
    [
        {"messages": {"role": "user"}}, {"messages": "x"}, {"messages": [1]}, {"messages": [{"role": 1, "content": "x"}]},
        {"messages": [{"role": "user", "content": 5}]}, {"messages": [{"role": "user", "content": [[]]}]},
        {"messages": [{"role": "user", "content": "x", "tool_calls": [[[[[]]]]]}], "max_tokens": 0},
        {"messages": [{"role": "user", "content": "x"}], "logit_bias": {"x": 1}},
        {"messages": [{"role": "user", "content": "x"}], "stop": [[]]},
        {"messages": [{"role": "user", "content": "x"}], "seed": 1e300},
        {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"messages": [{"role": "user", "content": "x"}], "media_io_kwargs": {"video": {"num_frames": 10**12}}},
        {"messages": [{"role": "user", "content": "x"}], "mm_processor_kwargs": {"max_pixels": 10**15}},
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}},
        {"messages": [{"role": "user", "content": "x"}], "structured_outputs": {"regex": "(a{1000}){1000}"}, "max_tokens": 2},
        {"messages": [{"role": "user", "content": "x"}], "model": ["tiny"]},
        {"messages": [{"role": "user", "content": "x"}], "priority": 10**30},
    ],
)  # fmt: skip
def test_bodies_of_any_form_are_at_worst_refused(service, body):
    response = post(service, CHAT, body)
    assert response.status_code in (400, 404), response.text
    assert post(service, CHAT, asks("x", max_tokens=1)).status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "gzip, gzip", "identity, gzip"])
def test_a_compressed_body_is_not_taken(service, encoding):
    """Nobody knows how large it would become."""
    body = gzip.compress(bytes(2**24))
    response = request(service, "POST", CHAT, content=body, headers={**JSON, "content-encoding": encoding})
    assert error_of(response) == (415, "unsupported_content_encoding")
    plain = json.dumps(asks("x")).encode()
    headers = {**JSON, "content-encoding": "identity"}
    assert request(service, "POST", CHAT, content=plain, headers=headers).status_code == 200
