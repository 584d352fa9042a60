"""Attention over packed sequences, over images, and over a KV cache; and the write into that cache.

A packed tensor holds the tokens of several sequences one after another, (tokens, heads, head_dim); `seq_lens` says where they end.
Tokens after the last sequence are padding: they are neither read nor attended to, and their output is zero.
The cache of a layer is K and V apart, each [num_blocks, num_kv_heads, block_size, head_dim]."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Slots(NamedTuple):
    """Where the tokens of a step go in the cache, resolved once for all layers: rows of k that are written, their block and offset."""

    rows: Tensor | None  # None: every row
    blocks: Tensor
    offsets: Tensor


def resolve_slots(slot_mapping: Tensor, block_size: int) -> Slots:
    """slot_mapping (tokens,) int64, block·block_size + offset, or −1 for a token that is written nowhere."""
    rows = None
    if bool((slot_mapping < 0).any()):
        rows = (slot_mapping >= 0).nonzero().squeeze(1)
        slot_mapping = slot_mapping[rows]
    return Slots(rows, slot_mapping // block_size, slot_mapping % block_size)


def cache_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Slots | None) -> None:
    """Write k and v (tokens, num_kv_heads, head_dim) into their slots, in place; slots None is the last place of token i's block i."""
    if slots is None:
        k_cache.select(2, -1).copy_(k)
        v_cache.select(2, -1).copy_(v)
        return
    if slots.rows is not None:
        k, v = k[slots.rows], v[slots.rows]
    at = (slots.blocks, slots.offsets)
    k_cache.transpose(1, 2).index_put_(at, k)
    v_cache.transpose(1, 2).index_put_(at, v)


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, seq_lens: Sequence[int], scale: float, mask: Tensor | None = None
) -> Tensor:
    """Causal attention of each sequence to itself; q (tokens, heads, D), k and v (tokens, kv_heads, D) → q's shape.

    mask (num_seqs, 1, T, T), for sequences of one length T, says which pairs attend in place of the causal rule."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    if mask is None:
        return _packed_attention(q, k, v, seq_lens, scale, is_causal=True)
    q, k, v = (t.unflatten(0, (len(seq_lens), -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)


def vision_attention(q: Tensor, k: Tensor, v: Tensor, seq_lens: Sequence[int], scale: float) -> Tensor:
    """Bidirectional attention within each segment (an image, or a frame); q, k, v (tokens, heads, D) → q's shape."""
    return _packed_attention(q, k, v, seq_lens, scale, is_causal=False)


def query_attention(q: Tensor, k: Tensor, v: Tensor, seq_lens: Sequence[int], scale: float) -> Tensor:
    """The same queries attend to each segment; q (queries, heads, D), k and v (tokens, heads, D) → (segments·queries, heads, D)."""
    outputs, start = [], 0
    for length, run in groupby(seq_lens):
        n = len(list(run))
        keys, values = (t[start : start + n * length].unflatten(0, (n, length)).transpose(1, 2) for t in (k, v))
        queries = q.transpose(0, 1).expand(n, -1, -1, -1)
        outputs.append(F.scaled_dot_product_attention(queries, keys, values, scale=scale).transpose(1, 2).flatten(0, 1))
        start += n * length
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def paged_decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one new token a sequence to its cached context; q (num_seqs, heads, D) → q's shape.

    Sequence i owns block i of num_seqs, its context the first slots of it; blocks are as long as the longest context. mask
    (num_seqs, 1, 1, block_size) is added to the scores, −inf beyond a sequence's context; None when all contexts are equally
    long. The heads that share a KV head are the rows of one query tile, so grouped KV heads are not repeated."""
    tile = q.view(q.shape[0], k_cache.shape[1], -1, q.shape[2])
    return F.scaled_dot_product_attention(tile, k_cache, v_cache, attn_mask=mask, scale=scale).reshape(q.shape)


def _packed_attention(
    q: Tensor, k: Tensor, v: Tensor, seq_lens: Sequence[int], scale: float, *, is_causal: bool
) -> Tensor:
    """Runs of sequences of equal length share one call: a batch of same-sized images, or a training batch, is a single one."""
    outputs, start, i = [], 0, 0
    while i < len(seq_lens):
        length, j = seq_lens[i], i
        while j < len(seq_lens) and seq_lens[j] == length:
            j += 1
        end = start + length * (j - i)
        rows = [t[start:end].unflatten(0, (j - i, length)).transpose(1, 2) for t in (q, k, v)]
        out = F.scaled_dot_product_attention(rows[0], rows[1], rows[2], is_causal=is_causal, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        start, i = end, j
    if start < len(q):
        outputs.append(torch.zeros_like(q[start:]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
