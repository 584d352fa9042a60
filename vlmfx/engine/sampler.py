"""Logits to token ids and log-probabilities: the sampling ops, called with the parameters of requests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlmfx.engine.request import SamplingParams
from vlmfx.errors import ShapeError
from vlmfx.ops import sample as op
from vlmfx.ops.token_logprobs import token_logprobs

_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def sample(logits: Tensor, params: Sequence[SamplingParams], seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """logits (rows, vocab), any float dtype → the next ids (rows,) int64 on the same device.

    positions[i] is the index of the drawn token in its sequence; it and seeds[i] (64 bits) key the draw, which is that of
    `vlmfx.ops.sample`. Temperature, top_p and min_p are rounded to float32. Raises ShapeError."""
    rows = len(params)
    if logits.dim() != 2 or not logits.shape[0] == rows == len(seeds) == len(positions):
        raise ShapeError(
            f"sample: logits have shape {tuple(logits.shape)} beside {rows} params, {len(seeds)} seeds and "
            f"{len(positions)} positions; pass (rows, vocab) logits and one of each a row."
        )
    if not any(p.temperature > 0 for p in params):
        return logits.argmax(dim=-1)
    # A temperature that float32 would round to 0 is not greedy: it draws among the best.
    degrees = [min(max(p.temperature, _SMALLEST), _LARGEST) if p.temperature > 0 else 0.0 for p in params]
    at = _device_of_ops(logits)
    # By way of numpy, which takes a third of the time that torch takes to read a list.
    floats = np.array([degrees, [p.top_p for p in params], [p.min_p for p in params]], np.float32)
    top_k = np.array([min(p.top_k, op.MAX_VOCAB) for p in params], np.int32)
    keys = np.array([[_signed(s), 0, _signed(i)] for s, i in zip(seeds, positions, strict=True)], np.int64)
    temperature, top_p, min_p = torch.from_numpy(floats).to(at).unbind()
    limits, key = torch.from_numpy(top_k).to(at), torch.from_numpy(keys).to(at)
    draw = op.cpu if at.type == "cpu" else op.sample  # what the op runs there, without the microseconds of a dispatch
    return draw(logits.to(at), temperature, limits, top_p, min_p, key[:, 0], key[:, 1:]).to(logits.device)


def logprobs(logits: Tensor, ids: Tensor, num: Sequence[int | None]) -> list[dict[int, tuple[float, int]] | None]:
    """logits (rows, vocab), the sampled ids (rows,) → for each row {id: (log-probability, rank)}, or None where num is.

    The sampled id comes first, then the num most likely by rank; rank 1 is the most likely, and of equal logits the
    lower id ranks first. float32 log-softmax of the logits as given, before temperature and filters. Raises
    ShapeError."""
    if logits.dim() != 2 or not logits.shape[0] == ids.numel() == len(num):
        raise ShapeError(
            f"logprobs: logits have shape {tuple(logits.shape)} beside {ids.numel()} ids and {len(num)} numbers; "
            "pass (rows, vocab) logits and one of each a row."
        )
    out: list[dict[int, tuple[float, int]] | None] = [None] * len(num)
    asked = [(i, n) for i, n in enumerate(num) if n is not None]
    if not asked:
        return out
    rows = torch.tensor([i for i, _ in asked], device=logits.device)
    most = min(max(n for _, n in asked), logits.shape[1])
    at = _device_of_ops(logits)
    tokens, values, ranks = token_logprobs(logits[rows].to(at), ids[rows].flatten().to(at), most)
    table = zip(asked, tokens.tolist(), values.tolist(), ranks.tolist(), strict=True)
    for (i, n), (first, *rest), (value, *others), own_rank in table:
        out[i] = {first: (value, own_rank)}
        for r, (token, logprob) in enumerate(zip(rest[:n], others[:n], strict=True)):
            out[i].setdefault(token, (logprob, r + 1))  # type: ignore[union-attr]
    return out


def _device_of_ops(logits: Tensor) -> torch.device:
    """Where the ops run. float64 and int64 arithmetic is not to be had on every accelerator (MLU370); there the host draws."""
    return logits.device if logits.device.type in ("cpu", "cuda") else torch.device("cpu")


def _signed(word: int) -> int:
    """The int64 with the bits of a number of 64, signed or not."""
    return (word + 2**63) % 2**64 - 2**63
