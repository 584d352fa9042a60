"""Which dtype a checkpoint of 16 bits is run with on an MLU370, which has no bfloat16: float16 where the range allows, else float32.

Each stored tensor is looked at. One that does not fit decides for all: a matmul has one dtype, and sums over weights beyond float16's
range would not fit either."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from vlmfx.errors import CheckpointError
from vlmfx.tree import Tree
from vlmfx.weights import MAX_NAMED, source_names

log = logging.getLogger("vlmfx")
MOST = torch.finfo(torch.float16).max  # 65504


def beyond_float16(specs: Tree, read: Callable[[str], Tensor]) -> dict[str, float]:
    """Name → largest absolute value, of the checkpoint's tensors that have one beyond float16's range; read(name) gives a tensor."""
    found = {}
    for name in sorted(source_names(specs)):
        stored = read(name)
        if stored.dtype != torch.float16 and stored.numel():
            low, high = torch.aminmax(stored)
            most = max(-float(low), float(high))
            if not most <= MOST:
                found[name] = most
    return found


def dtype_on_mlu(specs: Tree, read: Callable[[str], Tensor], *, is_auto: bool) -> torch.dtype:
    """float16, or float32 where a tensor does not fit, which one line of the log says; where float16 was asked for, CheckpointError."""
    beyond = beyond_float16(specs, read)
    if not beyond:
        return torch.float16
    named = ", ".join(f"{name} ({most:.3g})" for name, most in [*beyond.items()][:MAX_NAMED])
    more = f" and {len(beyond) - MAX_NAMED} more" if len(beyond) > MAX_NAMED else ""
    what = f"{len(beyond)} of {len(source_names(specs))} tensors are beyond float16's {MOST:.0f}: {named}{more}"
    if not is_auto:
        raise CheckpointError(f'dtype is "float16", but {what}; use "auto" or "float32".')
    log.warning("%s; the model is loaded as float32", what)
    return torch.float32
