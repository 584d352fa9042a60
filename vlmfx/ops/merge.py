"""Merge: token embeddings with image features laid over the placeholders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def merge(embedding: Tensor, ids: Tensor, features: Tensor | None, feature_index: Tensor | None) -> Tensor:
    """embedding (vocab, hidden), ids (tokens,), features (F, hidden), feature_index (tokens,) → (tokens, hidden).

    Row t is features[feature_index[t]] where that index is 0 or more, else embedding[ids[t]]. One gather and one `where`: static
    shapes, no host sync. features None means text only."""
    text = F.embedding(ids, embedding)
    if features is None or feature_index is None:
        return text
    image = F.embedding(feature_index.clamp(min=0), features.to(text.dtype))
    return torch.where(feature_index[:, None] >= 0, image, text)
