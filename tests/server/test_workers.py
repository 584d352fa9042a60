"""Workers: so many at once, so many that wait, and none that cannot be given up."""

from __future__ import annotations

import threading
import time
import weakref

import pytest

from vlmfx.errors import EngineFull, InvalidRequest
from vlmfx.server.urls import names_urls
from vlmfx.server.workers import Workers


def test_results_and_errors_come_back():
    workers = Workers(2, "test")
    assert [f.result(5) for f in [workers.submit(pow, 2, i) for i in range(20)]] == [2**i for i in range(20)]

    def fail() -> None:
        raise InvalidRequest("x", "no.")

    with pytest.raises(InvalidRequest):
        workers.submit(fail).result(5)


def test_no_more_than_so_many_run_at_once():
    workers, now, most, lock = Workers(3, "test"), 0, 0, threading.Lock()

    def work() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1

    for future in [workers.submit(work) for _ in range(12)]:
        future.result(5)
    assert most == 3


def test_what_is_not_done_can_be_given_up():
    workers, go = Workers(1, "test"), threading.Event()
    begun = threading.Event()

    def wait() -> None:
        begun.set()
        go.wait(10)

    running, waiting = workers.submit(wait), workers.submit(pow, 2, 2)
    assert begun.wait(5)
    workers.end("the server is shut down; ask another.")
    for future in (running, waiting):
        with pytest.raises(EngineFull, match="shut down"):
            future.result(0)
    go.set()
    with pytest.raises(EngineFull, match="shut down"):
        workers.submit(pow, 2, 3)


def test_more_than_may_wait_are_refused_and_take_no_threads():
    workers, go = Workers(2, "test-bound", max_waiting=3), threading.Event()
    futures = [workers.submit(go.wait, 10) for _ in range(5)]
    with pytest.raises(EngineFull, match="3 requests"):
        workers.submit(go.wait, 10)
    assert sum(thread.name == "test-bound" for thread in threading.enumerate()) == 2
    go.set()
    assert all(future.result(5) for future in futures)
    assert workers.submit(pow, 2, 3).result(5) == 8


def test_threads_that_cannot_be_begun_are_done_without(monkeypatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    workers, go = Workers(2, "test"), threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(EngineFull, match="no threads"):
            workers.submit(pow, 2, 3)
        assert workers.num_waiting == 0
    first = workers.submit(go.wait, 30)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        second = workers.submit(pow, 2, 3)  # waits for the one thread that there is
    go.set()
    assert first.result(30)
    assert second.result(30) == 8
    blocked, again = workers.submit(threading.Event().wait, 30), workers.submit(pow, 2, 3)
    assert again.result(20) == 8  # by a second thread, now that it can be begun
    workers.end("the test is over; ask another.")
    assert blocked.done()


class Held:
    """What some work holds."""


def test_work_that_is_cancelled_before_it_begins_leaves_at_once_with_all_that_it_holds():
    workers, go, begun = Workers(1, "test", max_waiting=1), threading.Event(), threading.Event()

    def wait(held: object = None) -> None:
        begun.set()
        go.wait(10)

    running = workers.submit(wait)
    assert begun.wait(5)
    held = Held()
    left = weakref.ref(held)
    waiting = workers.submit(wait, held)
    del held
    assert waiting.cancel()
    assert left() is None
    assert not running.cancel()
    following = workers.submit(pow, 2, 3)  # its place is free
    go.set()
    assert following.result(5) == 8


def test_a_thread_without_work_holds_none():
    workers, held = Workers(1, "test"), Held()
    left = weakref.ref(held)
    workers.submit(id, held).result(5)
    del held
    end = time.monotonic() + 5
    while left() is not None:
        assert time.monotonic() < end
        time.sleep(0.01)


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
