"""The gather of cached sequences in Triton. One program fills up to cache_write.ELEMENTS of k and as many of v: whole rows of one head
each, side by side in the output.

Which sequence a row is of is counted: as many as end at or before it, in one pass over cu_seqlens, where a binary search would wait
for memory at each step. Two dependent reads (cu_seqlens, block_table) come before the rows'; enough programs hide them, and memory
limits it. Tail: rows after the last sequence read nothing and are stored as zero; rows beyond the last are masked."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfx.ops.triton.cache_write import row_of, tile_of

SEARCHED = 32  # sequences a step of the count


def cache_gather(
    k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """As the contract."""
    num_blocks, kv_heads, block_size, head_dim = k_cache.shape
    shape = (num_tokens, kv_heads, head_dim)
    k, v = (torch.empty(shape, dtype=k_cache.dtype, device=k_cache.device) for _ in range(2))
    if k.numel():
        num_rows, cols, warps = tile_of(head_dim)
        _kernel[(triton.cdiv(num_tokens * kv_heads, num_rows),)](
            k_cache, v_cache, block_table.contiguous(), cu_seqlens.contiguous(), k, v, num_tokens * kv_heads, num_blocks,
            *block_table.shape, kv_heads, block_size, head_dim,
            ROWS=num_rows, COLS=cols, SEQS=SEARCHED, num_warps=warps,
        )  # fmt: skip
    return k, v


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "num_seqs", "max_blocks"])
def _kernel(
    k_cache, v_cache, block_table, cu_seqlens, k, v, num_rows, num_blocks, num_seqs, max_blocks,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, SEQS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // KV_HEADS, row % KV_HEADS
    sequence = tl.zeros((ROWS,), tl.int32)
    begin = tl.zeros((ROWS,), tl.int32)
    for start in range(0, num_seqs, SEQS):
        at = start + tl.arange(0, SEQS)
        end = tl.load(cu_seqlens + 1 + at, mask=at < num_seqs, other=2147483647)[None, :]
        is_before = end <= token[:, None]
        sequence += tl.sum(is_before.to(tl.int32), 1)
        begin = tl.maximum(begin, tl.max(tl.where(is_before, end, 0), 1))

    is_live = (row < num_rows) & (sequence < num_seqs)
    position = token - begin
    entry = sequence.to(tl.int64) * max_blocks + position // BLOCK_SIZE
    block = tl.load(block_table + entry, mask=is_live, other=0)
    tl.device_assert((block >= 0) & (block < num_blocks), "block_table has a block beyond the cache", mask=is_live)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE

    cols = tl.arange(0, COLS)[None, :]
    at = row_of(slot, head, KV_HEADS, BLOCK_SIZE, HEAD_DIM)[:, None] + cols
    inside = is_live[:, None] & (cols < HEAD_DIM)
    keys = tl.load(k_cache + at, mask=inside, other=0.0)
    values = tl.load(v_cache + at, mask=inside, other=0.0)
    to = row.to(tl.int64)[:, None] * HEAD_DIM + cols
    stored = (row < num_rows)[:, None] & (cols < HEAD_DIM)
    tl.store(k + to, keys, mask=stored)
    tl.store(v + to, values, mask=stored)
