"""Workers: threads for one kind of work, a queue with a bound before them, and an end that waits for none of them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future, InvalidStateError
from contextlib import suppress
from functools import partial
from threading import Condition, Thread
from typing import Any

from vlmfx.errors import EngineFull


class Workers(Executor):
    """At most num threads, begun as they are needed; max_waiting: work beyond those that may wait for one, None for any amount.

    Unlike a ThreadPoolExecutor's, work that is cancelled leaves the queue at once, with all that it holds, and what runs can be given up
    and does not keep the process from ending: a host that never answers must not hold up either."""

    def __init__(self, num: int, name: str, max_waiting: int | None = None) -> None:
        self.num, self.name, self.max_waiting = num, name, max_waiting
        self._waiting: OrderedDict[Future[Any], Callable[[], Any]] = OrderedDict()
        self._running: set[Future[Any]] = set()
        self._threads: list[Thread] = []
        self._changed = Condition()
        self._ended: str | None = None

    @property
    def num_waiting(self) -> int:
        """Work that no thread has begun."""
        return len(self._waiting)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The future of fn(*args, **kwargs). Raises EngineFull."""
        future: Future[Any] = Future()
        with self._changed:
            if self._ended is not None:
                raise EngineFull(self._ended)
            num_there = len(self._waiting) + len(self._running)
            if self.max_waiting is not None and num_there >= self.num + self.max_waiting:
                raise EngineFull(
                    f"{self.max_waiting} requests of this kind wait already, which is as many as may; send it again in a while."
                )
            if len(self._threads) < min(num_there + 1, self.num):
                self._begin_thread()
            self._waiting[future] = partial(fn, *args, **kwargs)
            self._changed.notify()
        future.add_done_callback(self._forget)
        return future

    def _begin_thread(self) -> None:
        """One more; where the machine has none to give, those there are do the work. Raises EngineFull where there is none."""
        thread = Thread(target=self._work, name=self.name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            if not self._threads:
                raise EngineFull("the machine has no threads left to work with; send it again in a while.") from None
        else:
            self._threads.append(thread)

    def end(self, message: str) -> None:
        """Take no more, and fail all that is not done, now, by an EngineFull of this message; what threads still find is dropped."""
        with self._changed:
            self._ended = message
            left = [*self._waiting, *self._running]
            self._waiting.clear()
            self._changed.notify_all()
        for future in left:
            with suppress(InvalidStateError):
                future.set_exception(EngineFull(message))

    def join(self, until: float) -> bool:
        """Whether no thread is at work any more, which is waited for until then, by time.monotonic; after `end`."""
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _forget(self, future: Future[Any]) -> None:
        with self._changed:
            self._waiting.pop(future, None)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and self._ended is None:
                    self._changed.wait()
                if self._ended is not None:
                    return
                future, fn = self._waiting.popitem(last=False)
                if not future.set_running_or_notify_cancel():
                    continue
                self._running.add(future)
            try:
                tell = partial(future.set_result, fn())
            except BaseException as error:
                tell = partial(future.set_exception, error)
            with self._changed:
                self._running.discard(future)
            del fn  # what it holds must not wait for the next work
            with suppress(InvalidStateError):  # given up meanwhile
                tell()
            del future, tell
