"""One vector a sequence from its tokens' hidden states, and unit length.

The names of the kinds, and what each means, are UKPLab/sentence-transformers': sentence_transformers/models/Pooling.py."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfx.models.validate import refuse

Pooling = Literal["last", "mean", "cls"]
STORED: dict[str, Pooling] = {"lasttoken": "last", "mean_tokens": "mean", "cls_token": "cls"}
SHORT: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}


def pool(hidden: Tensor, cu_seqlens: Tensor, kind: Pooling) -> Tensor:
    """hidden (tokens, hidden) after the final norm, sequences packed one after another → (num_seqs, hidden) float32.

    cu_seqlens (num_seqs + 1,) int32: where sequences begin, and the last ends; tokens after it are padding. A sequence without tokens is
    padding, too, whose row means nothing. "last" takes a sequence's last token, "cls" its first, "mean" the mean of all, summed in
    float32."""
    starts = cu_seqlens.long()
    if kind == "last":
        return hidden[(starts[1:] - 1).clamp(min=0)].float()
    if kind == "cls":
        return hidden[starts[:-1].clamp(max=len(hidden) - 1)].float()
    sequence = torch.searchsorted(starts[1:], torch.arange(len(hidden), device=hidden.device), right=True)
    sums = hidden.new_zeros((len(starts), hidden.shape[1]), dtype=torch.float32).index_add(0, sequence, hidden.float())
    return sums[:-1] / starts.diff().clamp(min=1)[:, None]


def normalize(pooled: Tensor, dimensions: int | None = None) -> Tensor:
    """pooled (n, hidden) → (n, dimensions or hidden) of length 1; a row of zeros stays zero.

    The first dimensions are kept before the length is taken (matryoshka, arXiv:2205.13147), not after."""
    return F.normalize(pooled[:, :dimensions], dim=-1)


def stored_pooling(hf: dict[str, Any], file: str) -> Pooling:
    """The kind that a sentence-transformers pooling config asks for: one flag "pooling_mode_…" that is true, or "pooling_mode" by name.

    Raises CheckpointError for one of those that are not here (max, weighted mean) and for several at once."""
    if "pooling_mode" in hf:
        names = hf["pooling_mode"] if isinstance(hf["pooling_mode"], list) else [hf["pooling_mode"]]
        kinds = [SHORT.get(str(name)) for name in names]
    else:
        names = [key for key, value in hf.items() if key.startswith("pooling_mode_") and value is True]
        kinds = [STORED.get(name.removeprefix("pooling_mode_")) for name in names]
    if len(kinds) != 1 or kinds[0] is None:
        refuse("pooling_mode", names, f"one of {', '.join(SHORT)}", file=file)
    return kinds[0]
