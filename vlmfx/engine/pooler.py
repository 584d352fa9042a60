"""Embeddings: prompts go through the model without a cache, and each becomes one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmfx.checkpoint import Model
from vlmfx.compile.executor import Executor
from vlmfx.engine import runner
from vlmfx.engine.encoder_clock import EncoderClock
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


@torch.no_grad()
def vectors(
    model: Model,
    requests: Sequence[ModelInputs],
    dimensions: Sequence[int | None],
    executor: Executor,
    clock: EncoderClock,
) -> list[Tensor | VlmfxError]:
    """The unit vector (dimensions,) float32 on the CPU of each request, from one pass; where that fails from one pass a request, so that
    only the cause has an error in its place."""
    try:
        features: list[Tensor | None] | None = None
        if any(one.media for one in requests):
            with clock.span():
                features = runner.encode(model, requests, executor)
        pooled = runner.pool(model, requests, executor, features)
        return [normalize(row[None], size)[0].cpu() for row, size in zip(pooled, dimensions, strict=True)]
    except Exception as error:
        if len(requests) == 1:
            return [as_vlmfx_error(error, "the prompt could not be computed")]
        pairs = zip(requests, dimensions, strict=True)
        return [vector for one, size in pairs for vector in vectors(model, [one], [size], executor, clock)]
