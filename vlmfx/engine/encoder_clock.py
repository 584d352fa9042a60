"""EncoderClock: the seconds that images and videos take to be encoded."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class EncoderClock:
    """On a CUDA GPU the time between two events on the device, which are read once both have passed: nothing waits for them. Elsewhere the
    host's time, which on an MLU is that of the launch. Used by the thread that steps the engine."""

    def __init__(self, device: torch.device) -> None:
        self._has_events = device.type == "cuda"
        self._seconds = 0.0
        self._spans: deque[tuple[Any, Any]] = deque()

    @contextmanager
    def span(self) -> Iterator[None]:
        """Count what is done in it, also where that fails."""
        if self._has_events:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            try:
                yield
            finally:
                last.record()
                self._spans.append((first, last))
        else:
            start = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - start

    def read(self) -> float:
        """The seconds of all spans that are over on the device too."""
        while self._spans and self._spans[0][1].query():
            first, last = self._spans.popleft()
            self._seconds += first.elapsed_time(last) / 1e3
        return self._seconds
