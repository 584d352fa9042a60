"""Fetchers: so many at once, and none that cannot be given up."""

from __future__ import annotations

import threading
import time

import pytest

from vlmfx.errors import EngineFull, InvalidRequest
from vlmfx.server.fetchers import Fetchers
from vlmfx.server.service import names_urls


def test_results_and_errors_come_back():
    fetchers = Fetchers(2)
    assert [f.result(5) for f in [fetchers.submit(pow, 2, i) for i in range(20)]] == [2**i for i in range(20)]

    def fail() -> None:
        raise InvalidRequest("x", "no.")

    with pytest.raises(InvalidRequest):
        fetchers.submit(fail).result(5)


def test_no_more_than_so_many_run_at_once():
    fetchers, now, most, lock = Fetchers(3), 0, 0, threading.Lock()

    def work() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1

    for future in [fetchers.submit(work) for _ in range(12)]:
        future.result(5)
    assert most == 3


def test_what_is_not_done_can_be_given_up():
    fetchers, go = Fetchers(1), threading.Event()
    begun = threading.Event()

    def wait() -> None:
        begun.set()
        go.wait(10)

    running, waiting = fetchers.submit(wait), fetchers.submit(pow, 2, 2)
    assert begun.wait(5)
    fetchers.end(EngineFull("ended."))
    for future in (running, waiting):
        with pytest.raises(EngineFull):
            future.result(0)
    go.set()
    assert fetchers.submit(pow, 2, 3).result(5) == 8


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "text", "text": "http://x"}, False),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, False),
        ({"type": "image_url", "image_url": {"url": "HTTPS://x"}}, True),
        ({"type": "image_url", "image_url": "file:///x"}, True),
        ({"type": "image", "path": "http://x"}, True),
        ({"type": "video", "video": ["data:x", "http://x"]}, True),
        ("http://x", True),
    ],
)
def test_prompts_that_name_urls(part, expected):
    assert names_urls({"messages": [{"role": "user", "content": [part]}]}) == expected
    assert not names_urls({"messages": [{"role": "user", "content": "http://x"}, 5]})
    assert not names_urls({"prompt": "http://x"})
