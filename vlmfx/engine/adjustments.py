"""What `vlmfx.ops.adjust_logits` takes, from the rules of the sequences in a batch's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmfx.compile.programs import Adjustments
from vlmfx.engine.sampler import within_float32
from vlmfx.engine.token_mask import Mask, every_token
from vlmfx.engine.token_rules import TokenRules


def adjustments(
    rules: Sequence[TokenRules], vocab_size: int, is_ahead: Sequence[bool] | None = None, num_rows: int | None = None
) -> Adjustments | None:
    """The adjustments of rows 0, 1, ... on the host, None where no row needs any; a part that no row needs is None.

    is_ahead[i]: one more token of row i has been drawn and is not accepted yet, which its rules must allow (`needs_host`). `newest` is -1
    in every row here: put such tokens in it, which may be on the device, for penalties to count them. num_rows: of the bucket; rows
    beyond the rules are of padding, and change nothing. Raises InvalidRequest as `TokenRules.mask` does: not where `accept` has not."""
    ahead, total = is_ahead or [False] * len(rules), num_rows or len(rules)
    masks = [r.mask(is_ahead=a) for r, a in zip(rules, ahead, strict=True)]
    mask = _masks(masks, vocab_size, total) if any(m is not None for m in masks) else None
    has_bias, has_penalties = any(len(r.bias) for r in rules), any(r.has_penalties for r in rules)
    if mask is None and not has_bias and not has_penalties:
        return None
    p = [r.params for r in rules]
    repetition = [within_float32(x.repetition_penalty) for x in p]  # so that no logit becomes NaN
    return Adjustments(
        mask=mask,
        bias_ids=_side_by_side([r.bias_ids for r in rules], total, -1) if has_bias else None,
        bias=_side_by_side([r.bias for r in rules], total, 0.0) if has_bias else None,
        history=_side_by_side([r.history for r in rules], total, -1) if has_penalties else None,
        prompt_lens=_column([r.prompt_len for r in rules], total, 0, np.int32) if has_penalties else None,
        newest=_column([], total, -1, np.int64) if has_penalties else None,
        presence=_column([x.presence_penalty for x in p], total, 0.0, np.float32) if has_penalties else None,
        frequency=_column([x.frequency_penalty for x in p], total, 0.0, np.float32) if has_penalties else None,
        repetition=_column(repetition, total, 1.0, np.float32) if has_penalties else None,
    )


def _masks(masks: Sequence[Mask | None], vocab_size: int, total: int) -> Tensor:
    """(total, words) int32; a row without a mask allows all tokens."""
    out = np.tile(every_token(vocab_size), (total, 1))
    for i, mask in enumerate(masks):
        if mask is not None:
            out[i] = mask
    return torch.from_numpy(out)


def _side_by_side(rows: Sequence[NDArray[Any]], total: int, fill: float) -> Tensor:
    """(total, longest), shorter rows filled up."""
    out = np.full((total, max(map(len, rows))), fill, rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


def _column(values: Sequence[float], total: int, fill: float, dtype: Any) -> Tensor:
    """(total,), filled up."""
    out = np.full(total, fill, dtype)
    out[: len(values)] = values
    return torch.from_numpy(out)
