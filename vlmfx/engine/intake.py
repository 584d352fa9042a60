"""Intake: requests on their way into an engine, in order, while threads make their pixels ready."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from heapq import heapify, heappop, heappush

from vlmfx.engine.prepared import Prepared
from vlmfx.engine.sequence import Request
from vlmfx.engine.token_rules import TokenRules
from vlmfx.processing.inputs import ModelInputs

Loaded = tuple[Prepared | ModelInputs, TokenRules | None]  # inputs alone of a prompt for a vector


class Intake:
    """load makes a request ready, in another thread unless the request says that this takes no time."""

    def __init__(self, load: Callable[[Request], Loaded]) -> None:
        self._load = load
        self._new: list[tuple[tuple[int, int], Request]] = []  # a heap
        self._loading: dict[Future[Loaded], Request] = {}
        self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="vlmfx-load")

    def __len__(self) -> int:
        return len(self._new) + len(self._loading)

    def __iter__(self) -> Iterator[Request]:
        return iter([*(request for _, request in self._new), *self._loading.values()])

    @property
    def num_loading(self) -> int:
        return len(self._loading)

    def add(self, request: Request) -> None:
        heappush(self._new, (request.order, request))

    def remove(self, number: int) -> None:
        """Forget a request, where it is here; what a thread is loading already is dropped."""
        self._new = [entry for entry in self._new if entry[1].number != number]
        heapify(self._new)
        for future in [future for future, request in self._loading.items() if request.number == number]:
            future.cancel()
            del self._loading[future]

    def load(self, has_room: Callable[[Request], bool]) -> None:
        """Begin to load requests in order, as long as there is room for the next."""
        while self._new and has_room(self._new[0][1]):
            _, request = heappop(self._new)
            self._loading[self._begun(request)] = request

    def take(self) -> Iterator[tuple[Request, Future[Loaded]]]:
        """Those that are loaded, or failed."""
        for future in [future for future in self._loading if future.done()]:
            yield self._loading.pop(future), future

    def wait(self, timeout: float | None, *, for_all: bool = False) -> None:
        """Until one of those that are loading is done, or all are."""
        wait(self._loading, timeout, return_when=ALL_COMPLETED if for_all else FIRST_COMPLETED)

    def close(self) -> None:
        """Forget all, and end the threads."""
        self._new, self._loading = [], {}
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begun(self, request: Request) -> Future[Loaded]:
        if not request.is_ready:
            return self._threads.submit(self._load, request)
        future: Future[Loaded] = Future()
        try:
            future.set_result(self._load(request))
        except Exception as error:
            future.set_exception(error)
        return future
