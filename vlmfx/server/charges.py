"""What is fetched in a thread is charged to the request that it is fetched for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_hold: ContextVar[Callable[[int], None] | None] = ContextVar("hold", default=None)


@contextmanager
def charged_to(hold: Callable[[int], None]) -> Iterator[None]:
    """Inside, hold is told of what `charge` is told in this thread."""
    token = _hold.set(hold)
    try:
        yield
    finally:
        _hold.reset(token)


def charge(num_bytes: int) -> None:
    """Bytes that have come. Raises what the holder raises."""
    hold = _hold.get()
    if hold is not None:
        hold(num_bytes)
