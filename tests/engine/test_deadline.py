"""Work and its deadline: what is late is cancelled, and an error of the work's own is not taken for lateness."""

from __future__ import annotations

import asyncio
import time

import pytest

from vlmfx.engine.deadline import in_time
from vlmfx.errors import DeadlineExceeded


def test_work_by_a_deadline():
    async def fail() -> None:
        raise TimeoutError("of a host")

    async def work() -> None:
        assert await in_time(asyncio.sleep(0, "done"), None) == "done"
        assert await in_time(asyncio.sleep(0, "done"), time.perf_counter() + 20) == "done"
        with pytest.raises(TimeoutError, match="of a host"):
            await in_time(fail(), time.perf_counter() + 20)
        for deadline in (time.perf_counter() + 0.05, time.perf_counter() - 5):
            slow = asyncio.ensure_future(asyncio.sleep(20))
            with pytest.raises(DeadlineExceeded, match="took longer"):
                await in_time(slow, deadline)
            await asyncio.sleep(0)
            assert slow.cancelled()

    asyncio.run(work())
