"""How most families join features to their decoder: params["text"] and cfg.text are the decoder's, its head may be tied."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from vlmfx.models import decoder
from vlmfx.models.layers import Batch, Cache
from vlmfx.ops.merge import merge as merge_rows
from vlmfx.tree import Tree

BUFFERS = ("position_ids", "rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")


class HasText(Protocol):
    """A family's config."""

    @property
    def text(self) -> decoder.DecoderConfig: ...


def is_head_copy_or_buffer(cfg: HasText, name: str, head: str) -> bool:
    """True for what any checkpoint may hold and no model needs: a copy of tied embeddings under the head's name, and buffers."""
    return (cfg.text.tie_word_embeddings and name == head) or name.endswith(BUFFERS)


def merge(params: Tree, cfg: HasText, ids: Tensor, features: Tensor | None, feature_index: Tensor | None) -> Tensor:
    """ids (tokens,) → embeddings (tokens, hidden) with feature rows where feature_index is 0 or more."""
    return merge_rows(params["text"]["embed"], ids, features, feature_index)


def forward(
    params: Tree, cfg: HasText, x: Tensor, positions: Tensor, cache: Cache | None, batch: Batch, extras: Tree = ()
) -> tuple[Tensor, Cache | None]:
    """x (tokens, hidden), positions (tokens,) or (3, tokens) with M-RoPE → hidden states after the final norm, and the cache.

    extras is empty."""
    return decoder.forward(params["text"], cfg.text, x, positions, cache, batch)


def text_inputs(cfg: HasText, x: Tensor, extras: Tree) -> dict[str, Tensor | None]:
    """What the decoder's `forward` takes of a family's extras, by keyword: nothing, where there are none."""
    return {}


def logits(params: Tree, cfg: HasText, hidden: Tensor) -> Tensor:
    """hidden (rows, hidden) → (rows, vocab)."""
    return decoder.logits(params["text"], hidden)
