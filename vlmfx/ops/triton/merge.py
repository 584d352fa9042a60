"""The merge in Triton. One program copies up to WIDTH columns of one token, from the embedding or from the features: of the other
nothing is read.

Both indices are read at once, the row after them; memory limits it. Tail: columns beyond the last are masked."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 8192


def merge(embedding: Tensor, ids: Tensor, features: Tensor, feature_index: Tensor) -> Tensor:
    """As the contract; rows may lie apart, elements of a row may not."""
    features = features.to(embedding.dtype)
    embedding, features = (t if t.stride(1) == 1 else t.contiguous() for t in (embedding, features))
    tokens, (vocab, hidden) = len(ids), embedding.shape
    out = torch.empty((tokens, hidden), dtype=embedding.dtype, device=embedding.device)
    if out.numel():
        cols = min(triton.next_power_of_2(hidden), WIDTH)
        _kernel[(tokens, triton.cdiv(hidden, cols))](
            embedding, ids.contiguous(), features, feature_index.contiguous(), out, vocab, len(features),
            embedding.stride(0), features.stride(0), hidden, COLS=cols, num_warps=min(max(cols // 1024, 1), 8),
        )  # fmt: skip
    return out


# Strides and widths are sizes of the model: as constants they say which loads may be wide where they are no multiples of 16.
@triton.jit(do_not_specialize=["num_features"])
def _kernel(
    embedding, ids, features, feature_index, out, VOCAB: tl.constexpr, num_features,
    EMBEDDING_STRIDE: tl.constexpr, FEATURE_STRIDE: tl.constexpr, HIDDEN: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = col < HIDDEN
    row = tl.load(feature_index + token).to(tl.int64)
    word = tl.load(ids + token).to(tl.int64)
    to = out + token * HIDDEN + col
    if row >= 0:
        tl.device_assert(row < num_features, "feature_index has a row beyond features")
        tl.store(to, tl.load(features + row * FEATURE_STRIDE + col, mask=inside), mask=inside)
    else:
        tl.device_assert((word >= 0) & (word < VOCAB), "ids has a number beyond the embedding")
        tl.store(to, tl.load(embedding + word * EMBEDDING_STRIDE + col, mask=inside), mask=inside)
