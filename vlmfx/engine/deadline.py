"""Deadlines, by time.perf_counter: work that must be done by one, and what is said of work that is not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

from vlmfx.errors import DeadlineExceeded

T = TypeVar("T")


def too_late() -> DeadlineExceeded:
    """The error of a request whose time is over, wherever it is by then."""
    return DeadlineExceeded("deadline: the request took longer than it may; ask for less, or allow more time.")


async def in_time(work: Awaitable[T], deadline: float | None) -> T:
    """What work gives; it is cancelled where it is not done by then. None is no limit. Raises DeadlineExceeded and what work raises."""
    task = asyncio.ensure_future(work)
    try:
        # Not wait_for: a TimeoutError of the work's own is not ours.
        await asyncio.wait({task}, timeout=None if deadline is None else max(0.0, deadline - time.perf_counter()))
        if not task.done():
            raise too_late()
        return task.result()
    finally:
        task.cancel()
