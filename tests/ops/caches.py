"""Strategies for paged caches: their sizes, and sequences laid into their blocks in any order, some sharing their first blocks."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.rotary_tables import heads_of
from tests.strategies import SEEDS, normal

HEAD_DIMS = st.sampled_from([1, 2, 7, 16, 64, 80, 129])  # powers of two and others, tiles of many rows and of 8
BLOCK_SIZES = st.sampled_from([1, 2, 3, 16, 40])


class Layout(NamedTuple):
    """Sequences in a cache: block_table and cu_seqlens as `cache_gather` takes them."""

    num_blocks: int
    block_size: int
    block_table: Tensor
    cu_seqlens: Tensor

    @property
    def num_live(self) -> int:
        return int(self.cu_seqlens[-1])

    def slots(self) -> Tensor:
        """The slot of each packed token."""
        found = [torch.empty(0, dtype=torch.int32)]
        for blocks, length in zip(self.block_table, self.cu_seqlens.diff().tolist(), strict=True):
            position = torch.arange(length, dtype=torch.int32)
            found.append(blocks[position // self.block_size] * self.block_size + position % self.block_size)
        return torch.cat(found)


def empty_cache(num_blocks: int, kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """A cache in which nothing was written: NaN."""
    return torch.full((num_blocks, kv_heads, block_size, head_dim), torch.nan, dtype=dtype)


def vast_caches(block_size: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """A cache of k and one of v, of one head, in bfloat16, whose last block begins 2^31 elements in and holds normal numbers.

    All before it are zero pages, which no one touches, so they cost nothing. The caches lie in one stretch of memory, v a block on."""
    block = block_size * head_dim
    memory = torch.from_numpy(np.zeros(2**31 + 2 * block, np.int16)).view(torch.bfloat16)
    memory[2**31 :] = normal(0, 2 * block)
    k_cache, v_cache = (part.view(-1, 1, block_size, head_dim) for part in (memory[:-block], memory[block:]))
    return k_cache, v_cache


def fused_qkv(
    seed: int, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """All of a fused projection (tokens, heads + 2·kv_heads, head_dim), and its k and v."""
    qkv = normal(seed, tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    return qkv, heads_of(qkv, heads, kv_heads), heads_of(qkv, heads + kv_heads, kv_heads)


@st.composite
def slot_mappings(draw: st.DrawFn, tokens: int, num_slots: int) -> Tensor:
    """Slots that differ, in any order; −1 here and there, and where there are too few."""
    g = torch.Generator().manual_seed(draw(SEEDS))
    slots = torch.full((tokens,), -1, dtype=torch.int32)
    chosen = torch.randperm(num_slots, generator=g)[:tokens].int()
    slots[: len(chosen)] = chosen
    skipped = torch.rand(tokens, generator=g) < draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))
    return slots[torch.randperm(tokens, generator=g)].masked_fill(skipped, -1)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """No sequence to five, some empty, their blocks scattered with others between; now and then hundreds of sequences. What stands
    in the table beyond a sequence's blocks is −1 or no block at all."""
    g = torch.Generator().manual_seed(draw(SEEDS))
    block_size = draw(BLOCK_SIZES)
    if draw(st.integers(0, 9)):
        lengths = draw(st.lists(st.integers(0, 40), max_size=5))
    else:
        lengths = torch.randint(0, 3, (draw(st.sampled_from([127, 128, 129, 300])),), generator=g).tolist()
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = sum(counts) + draw(st.integers(1, 3))
    width = max(counts, default=0) + draw(st.integers(0, 2))
    beyond = draw(st.sampled_from([-1, num_blocks, 2**31 - 1]))
    table = torch.full((len(lengths), width), beyond, dtype=torch.int32)
    blocks = torch.randperm(num_blocks, generator=g).int()
    for row, count, end in zip(table, counts, accumulate(counts), strict=True):
        row[:count] = blocks[end - count : end]
    return Layout(num_blocks, block_size, table, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))
