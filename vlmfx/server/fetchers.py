"""Fetchers: threads for prompts that name URLs, which wait for hosts most of the time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, InvalidStateError
from contextlib import suppress
from functools import partial
from threading import Semaphore, Thread
from typing import Any


class Fetchers(Executor):
    """At most num at once. Unlike a ThreadPoolExecutor's, what they do can be given up, and does not keep the process from ending: a host
    that never answers must not hold up either."""

    def __init__(self, num: int) -> None:
        self._places = Semaphore(num)
        self._futures: set[Future[Any]] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        Thread(target=self._work, args=(future, partial(fn, *args, **kwargs)), name="vlmfx-fetch", daemon=True).start()
        return future

    def end(self, error: Exception) -> None:
        """Fail all that is not done, now; what its threads find is dropped."""
        for future in list(self._futures):
            with suppress(InvalidStateError):
                future.set_exception(error)

    def _work(self, future: Future[Any], fn: Callable[[], Any]) -> None:
        with self._places:
            if future.done():  # given up while it waited for a place
                return
            try:
                tell = partial(future.set_result, fn())
            except BaseException as error:
                tell = partial(future.set_exception, error)
        with suppress(InvalidStateError):  # given up meanwhile
            tell()
