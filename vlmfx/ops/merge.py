"""Merge: token embeddings with image features laid over the placeholders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfx.ops.registry import Cost, nbytes, refuse, register

INTEGERS = (torch.int32, torch.int64)


def merge(embedding: Tensor, ids: Tensor, features: Tensor | None, feature_index: Tensor | None) -> Tensor:
    """embedding (vocab, hidden), ids (tokens,), features (F, hidden), feature_index (tokens,) → (tokens, hidden), embedding's dtype.

    Row t is features[feature_index[t]] where that index is 0 or more, and then ids[t] is not looked at; else embedding[ids[t]].
    Static shapes, no host sync. Rows of features may lie apart, F may be 0, ids and feature_index are int32 or int64. features None
    means text only. Raises ShapeError; a number out of range is an error on the CPU and, on a GPU, in Triton's debug mode only."""
    if features is None or feature_index is None:
        return F.embedding(ids, embedding)
    return OP(embedding, ids, features, feature_index)


def reference(embedding: Tensor, ids: Tensor, features: Tensor, feature_index: Tensor) -> Tensor:
    """The definition of right, and the CPU kernel."""
    is_text = feature_index < 0
    text = F.embedding(torch.where(is_text, ids, 0), embedding)
    if features.shape[0] == 0:
        return text
    image = F.embedding(feature_index.clamp(min=0), features).to(text.dtype)
    return torch.where(is_text[:, None], text, image)


def check(embedding: Tensor, ids: Tensor, features: Tensor, feature_index: Tensor) -> None:
    """Raise ShapeError for what the kernels do not take."""
    if embedding.dim() != 2:
        refuse("merge", "embedding", embedding.shape, "shape (vocab, hidden)")
    if ids.dim() != 1:
        refuse("merge", "ids", ids.shape, "shape (tokens,)")
    if features.dim() != 2 or features.shape[1] != embedding.shape[1]:
        refuse("merge", "features", features.shape, f"shape (features, {embedding.shape[1]}), the width of embedding")
    if feature_index.shape != ids.shape:
        refuse("merge", "feature_index", feature_index.shape, f"shape {tuple(ids.shape)}, as ids has")
    for name, numbers in (("ids", ids), ("feature_index", feature_index)):
        if numbers.dtype not in INTEGERS:
            refuse("merge", name, numbers.dtype, "torch.int32 or torch.int64")


def cost(embedding: Tensor, ids: Tensor, features: Tensor, feature_index: Tensor) -> Cost:
    """As if every row were of the embedding: the rows are read once and written once."""
    rows = ids.shape[0] * embedding.shape[1] * embedding.element_size()
    return Cost(flops=0, bytes=2 * rows + nbytes(ids, feature_index))


OP = register(
    "merge(Tensor embedding, Tensor ids, Tensor features, Tensor feature_index) -> Tensor",
    reference=reference,
    fake=lambda embedding, ids, features, feature_index: embedding.new_empty(ids.shape[0], embedding.shape[1]),
    check=check,
    cost=cost,
    kernels={"cuda": "triton.merge"},
    tolerance=dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), 0.0),
    is_inline=True,
)
