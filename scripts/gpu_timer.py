"""How long a GPU takes for a call whose operands are not in its cache, and what the GPU at hand does at most.

A captured graph of many calls, each on tensors of its own where they would fit the cache together, has no launch cost of Python's
in it, as a server's has none. A call that waits for the GPU cannot be captured: events time it, the cache swept before each call.
As triton.testing.do_bench and flashinfer-ai/flashinfer: flashinfer/testing/utils.py do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

Call = Callable[[], Any]
GRAPH_MS = 4.0
REPLAYS = 9
SLOW_MS = 100.0  # of which three are enough
MAX_SETS = 512


@dataclass(frozen=True)
class Limits:
    """What this GPU was measured to do: bytes a second copied (read and written) and read, bfloat16 operations a second."""

    copied: float
    read: float
    flops: float


def operand_sets(make: Callable[[], tuple[Any, ...]], bytes_touched: int) -> list[tuple[Any, ...]]:
    """So many sets of a call's operands that a round over all finds none of them in the cache."""
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    free_before = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    before = torch.cuda.memory_allocated()
    sets = [make()]
    held = torch.cuda.memory_allocated() - before
    wanted = -(-3 * cache_bytes // max(bytes_touched, 1))
    sets += [make() for _ in range(min(wanted, free_before // 4 // max(held, 1), MAX_SETS) - 1)]
    return sets


def median_ms(calls: Sequence[Call]) -> float:
    """Milliseconds of one call, a median; calls are the same one on different tensors. Each runs twice before it is timed."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    return _swept_ms(calls[0]) if _waits(calls[0]) else _captured_ms(calls)


def limits() -> Limits:
    """Measured now: a copy and a sum of 2 GiB, and a product of two bfloat16 matrices of 8192 × 8192."""
    x = torch.ones(2**30, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    num_bytes = x.numel() * x.element_size()
    # By a kernel: copy_ in a captured graph is left to the copy engines, which do two thirds of it.
    copied = 2 * num_bytes / median_ms([lambda: torch.neg(x, out=y)]) * 1e3
    read = num_bytes / median_ms([lambda: x.view(torch.float32).sum()]) * 1e3
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    flops = 2 * 8192**3 / median_ms([lambda: a @ b]) * 1e3
    return Limits(copied, max(read, copied), flops)


def _waits(call: Call) -> bool:
    """Whether the call waits for the GPU, found without a capture: a failed one leaves the allocator in doubt."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _captured_ms(calls: Sequence[Call]) -> float:
    outputs: list[Any] = [None] * len(calls)  # of a round, kept apart: else each would be written over the one before

    def round_of_calls() -> None:
        for i, call in enumerate(calls):
            outputs[i] = call()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        round_of_calls()
        estimate = _elapsed_ms(round_of_calls)
        rounds = max(1, min(int(GRAPH_MS / max(estimate, 1e-3)), 400 // len(calls)))
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(rounds):
                round_of_calls()
        replays = 3 if _elapsed_ms(graph.replay) > SLOW_MS else REPLAYS
        times = [_elapsed_ms(graph.replay) for _ in range(replays)]
    torch.cuda.synchronize()
    return median(times) / (rounds * len(calls))


def _swept_ms(call: Call) -> float:
    sweep = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(max(3, min(20, int(SLOW_MS / max(_elapsed_ms(call), 1e-3))))):
        sweep.zero_()
        times.append(_elapsed_ms(call))
    return median(times)


def _elapsed_ms(call: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
