"""The runner's programs on whole prompts, sequence i in the i-th equal share of the cache's blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlmfx.checkpoint import Model
from vlmfx.compile.executor import EagerExecutor, Executor
from vlmfx.compile.layout import CacheLayout
from vlmfx.compile.programs import Sampling
from vlmfx.engine import runner
from vlmfx.processing.inputs import ModelInputs


def paged(model: Model, num_rows: int, length: int) -> EagerExecutor:
    """The functions as they are, over a cache for num_rows sequences of this length."""
    return EagerExecutor(model.program_set, model.params, layout=CacheLayout.of(num_rows, length))


def blocks_of(executor: Executor, row: int) -> list[int]:
    assert executor.layout is not None
    most = executor.layout.max_blocks
    return list(range(row * most, (row + 1) * most))


def prefill(
    model: Model,
    requests: Sequence[ModelInputs],
    max_lens: Sequence[int],
    executor: Executor,
    sampling: Sampling | None = None,
) -> tuple[Tensor, Tensor]:
    chunks = [
        runner.Chunk(
            token_ids=r.token_ids,
            positions=r.positions,
            feature_index=r.feature_index,
            features=features,
            blocks=blocks_of(executor, row),
            max_len=max_len,
        )
        for row, (r, features, max_len) in enumerate(
            zip(requests, runner.encode(model, requests, executor), max_lens, strict=True)
        )
    ]
    return runner.prefill(model, chunks, executor.cache, sampling, executor)


def decode(
    model: Model,
    ids: Tensor,
    positions: Sequence[int],
    context_lens: Sequence[int],
    max_lens: Sequence[int],
    executor: Executor,
    sampling: Sampling | None = None,
) -> tuple[Tensor, Tensor]:
    rows = [
        runner.Row(position=p, context_len=n, blocks=blocks_of(executor, row), max_len=most)
        for row, (p, n, most) in enumerate(zip(positions, context_lens, max_lens, strict=True))
    ]
    return runner.decode(model, ids, rows, executor.cache, sampling, executor)
