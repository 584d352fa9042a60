"""The loop of embeddings: prompts go through the model a few at a time, without a cache, and each becomes one vector."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from vlmfx.checkpoint import Model
from vlmfx.compile.executor import Executor
from vlmfx.engine import runner
from vlmfx.errors import InvalidRequest, VlmfxError, as_vlmfx_error, shown
from vlmfx.models.pooling import normalize
from vlmfx.processing.inputs import ModelInputs


def check_dimensions(model: Model, dimensions: int | None) -> None:
    """Raise InvalidRequest for a length that the model's embeddings cannot be cut to; None is all of it."""
    most = model.config.text.hidden_size
    if dimensions is not None and not (type(dimensions) is int and 1 <= dimensions <= most):
        raise InvalidRequest(
            "dimensions",
            f"it is {shown(dimensions)}, expected a whole number from 1 to {most}; leave it out for all {most}.",
            found=dimensions,
            expected=most,
        )


@torch.no_grad()  # as a decorator: a `with` in a generator would hold for its caller, too
def run(
    model: Model,
    requests: Iterable[ModelInputs],
    *,
    dimensions: int | None = None,
    max_tokens: int = runner.MAX_TOKENS,
    executor: Executor | None = None,
) -> Iterator[tuple[ModelInputs, Tensor | VlmfxError]]:
    """(request, its unit vector (dimensions,) float32 on the CPU, or why there is none), in order.

    Requests are taken as they are needed, so that their pixels need not all be in memory at once. Which of them share a pass is
    decided by max_tokens alone, and does not change a vector beyond rounding."""
    check_dimensions(model, dimensions)
    executor = executor or model.executor
    plan, max_seqs = executor.plan, 2**31
    if plan is not None and plan.pool:
        max_tokens, max_seqs = min(max_tokens, plan.pool[-1]), plan.max_seqs
    for batch in _passes(requests, max_tokens, max_seqs):
        yield from zip(batch, _vectors(model, batch, dimensions, executor), strict=True)


def _vectors(
    model: Model, batch: list[ModelInputs], dimensions: int | None, executor: Executor
) -> list[Tensor | VlmfxError]:
    """Of one pass; where that fails of one pass a request, so that only the cause fails."""
    try:
        return [*normalize(runner.pool(model, batch, executor), dimensions).cpu()]
    except Exception as error:
        if len(batch) == 1:
            return [as_vlmfx_error(error, "the prompt could not be computed")]
        return [vector for request in batch for vector in _vectors(model, [request], dimensions, executor)]


def _passes(requests: Iterable[ModelInputs], max_tokens: int, max_seqs: int) -> Iterator[list[ModelInputs]]:
    """The requests in order, cut where the next would bring a pass above max_tokens or max_seqs."""
    batch: list[ModelInputs] = []
    num_tokens = 0
    for request in requests:
        if batch and (num_tokens + len(request.token_ids) > max_tokens or len(batch) == max_seqs):
            yield batch
            batch, num_tokens = [], 0
        batch.append(request)
        num_tokens += len(request.token_ids)
    if batch:
        yield batch
