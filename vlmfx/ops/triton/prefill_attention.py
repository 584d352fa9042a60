"""Causal attention of packed new tokens in Triton. One program works out a tile of queries of one head: first against the tokens
that its sequence has in the paged cache, gathered tile by tile through the block table, then against the new tokens before it.

Grid: heads run fastest, so the query heads of a KV head read its tiles at the same time, out of L2; tiles run from the last to the
first, so those with the most keys start first. The number of tiles follows from the number of rows and of sequences, so a launch
reads no lengths; at most one tile a sequence is empty and ends at once. Tail: only the last tile of the prefix and the tiles on
the diagonal have a mask (all tiles with a window); the rows after the last sequence are a sequence that attends to nothing.

Limit: the tensor cores, and beside them the exponentials."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfx.ops.triton.flash import (
    LOG2_E,
    Config,
    attend,
    config,
    find_segment,
    load,
    parts,
    side_by_side,
    start,
    store,
    tail_stages,
)


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    block_table: Tensor | None,
    prefix_lens: Tensor | None,
    scale: float,
    window: int,
) -> Tensor:
    """As the contract; tokens and heads may lie apart, elements of a head may not."""
    num_rows, num_heads, head_dim = q.shape
    q, k, v = side_by_side(q), side_by_side(k), side_by_side(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_segments = len(cu_seqlens) - 1
    block_m, block_n, num_warps, num_stages = _config(q, num_segments, k_cache is not None or window > 0)
    low, high = parts(head_dim)
    num_tiles = num_rows // block_m + num_segments + 1
    num_blocks, block_size, max_blocks, table_row = 0, 1, 0, 0
    if k_cache is not None and block_table is not None and prefix_lens is not None:
        num_blocks, block_size, max_blocks = k_cache.shape[0], k_cache.shape[2], block_table.shape[1]
        block_table, prefix_lens = side_by_side(block_table), prefix_lens.contiguous()
        table_row = block_table.stride(0)
    if out.numel():
        _kernel[(num_tiles * num_heads,)](
            q, k, v, out, cu_seqlens.contiguous(), k_cache, v_cache, block_table, prefix_lens,
            num_rows, num_segments, num_tiles, num_blocks, max_blocks, table_row, window, scale * LOG2_E,
            NUM_HEADS=num_heads, NUM_KV_HEADS=k.shape[1], HEAD_DIM=head_dim, LO=low, HI=high,
            Q_ROW=q.stride(0), Q_HEAD=q.stride(1), K_ROW=k.stride(0), K_HEAD=k.stride(1), V_ROW=v.stride(0), V_HEAD=v.stride(1),
            BLOCK_SIZE=block_size, HAS_PREFIX=k_cache is not None, HAS_WINDOW=window > 0,
            BLOCK_M=block_m, BLOCK_N=block_n, NUM_STAGES=num_stages, TAIL_STAGES=tail_stages(num_stages, q.dtype),
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return out


def _config(q: Tensor, num_segments: int, has_more: bool) -> Config:
    """As `config`, but heads of 128 without prefix or window are faster in smaller tiles, of which fewer keys are masked: 258 µs
    where tiles of 128 take 276, for 4096 tokens of 28 heads on an H200."""
    chosen = config(q, num_segments)
    return Config(64, 64, 4, 3) if chosen == Config(128, 128, 8, 3) and q.shape[2] > 96 and not has_more else chosen


@triton.jit
def _cached(
    state, queries, k_cache, v_cache, table, num_blocks, max_blocks, kv_head, begin, end, position, window, scale,
    NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
    BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, IS_MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """The state after cached tokens begin..end, for rows at `position` (rows,); without IS_MASKED, these are full tiles."""
    keys = tl.arange(0, BLOCK_N)
    # Keys wait for block numbers, which takes up stages: with these, as many tiles are on their way as in a loop without a table.
    for n in tl.range(begin, end, BLOCK_N, num_stages=2 * NUM_STAGES - 1 if NUM_STAGES > 1 else 1):
        key = n + keys
        known = None
        seen = None
        if IS_MASKED:
            known = key < end
            seen = known[None, :]
            if HAS_WINDOW:
                seen = seen & (key[None, :] > position[:, None] - window)
        column = key // BLOCK_SIZE
        block = tl.load(table + column, mask=(key < end) & (column < max_blocks), other=-1)
        tl.device_assert(
            (key >= end) | ((block >= 0) & (block < num_blocks)), "block_table has a block beyond the cache"
        )
        at = ((block.to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE) * HEAD_DIM
        k_tile = load(k_cache, at, known, HEAD_DIM, LO, HI)
        v_tile = load(v_cache, at, known, HEAD_DIM, LO, HI)
        state = attend(state, queries, k_tile, v_tile, seen, scale, HI)
    return state


@triton.jit
def _new(
    state, queries, k, v, begin, end, position, window, scale,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, HEAD_DIM: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
    BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, IS_MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """The state after new tokens begin..end, for rows that are tokens `position` (rows,); without IS_MASKED, each sees all."""
    keys = tl.arange(0, BLOCK_N)
    for n in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
        key = n + keys
        known = None
        seen = None
        if IS_MASKED:
            known = key < end
            seen = key[None, :] <= position[:, None]
            if HAS_WINDOW:
                seen = seen & (key[None, :] > position[:, None] - window)
        k_tile = load(k + tl.cast(n, tl.int64) * K_ROW, keys * K_ROW, known, HEAD_DIM, LO, HI)
        v_tile = load(v + tl.cast(n, tl.int64) * V_ROW, keys * V_ROW, known, HEAD_DIM, LO, HI)
        state = attend(state, queries, k_tile, v_tile, seen, scale, HI)
    return state


@triton.jit(
    do_not_specialize=["num_rows", "num_segments", "num_tiles", "num_blocks", "max_blocks", "table_row", "window"],
    do_not_specialize_on_alignment=["cu_seqlens", "block_table", "prefix_lens"],
)
def _kernel(
    q, k, v, out, cu_seqlens, k_cache, v_cache, block_table, prefix_lens,
    num_rows, num_segments, num_tiles, num_blocks, max_blocks, table_row, window, scale,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr, V_ROW: tl.constexpr, V_HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HAS_PREFIX: tl.constexpr, HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, TAIL_STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % NUM_HEADS
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    tile = num_tiles - 1 - tl.program_id(0) // NUM_HEADS
    segment, begin, length, first = find_segment(tile, cu_seqlens, num_segments, num_rows, BLOCK_M)
    if first >= length:
        return
    row = (begin + first).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    position = first + rows
    queries = load(q + row * Q_ROW + head * Q_HEAD, rows * Q_ROW, position < length, HEAD_DIM, LO, HI)
    state = start(BLOCK_M, LO, HI)
    if HAS_PREFIX:
        prefix = tl.load(prefix_lens + segment, mask=segment < num_segments, other=0)
        table = block_table + segment.to(tl.int64) * table_row
        if HAS_WINDOW:
            masked = tl.maximum(prefix + first - window + 1, 0)
        else:
            masked = prefix // BLOCK_N * BLOCK_N
            state = _cached(
                state, queries, k_cache, v_cache, table, num_blocks, max_blocks, kv_head, 0, masked, None, window, scale,
                NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, LO, HI, BLOCK_N, NUM_STAGES, False, False,
            )  # fmt: skip
        state = _cached(
            state, queries, k_cache, v_cache, table, num_blocks, max_blocks, kv_head, masked, prefix, prefix + position, window,
            scale, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, LO, HI, BLOCK_N, TAIL_STAGES, True, HAS_WINDOW,
        )  # fmt: skip
    k += begin.to(tl.int64) * K_ROW + kv_head * K_HEAD
    v += begin.to(tl.int64) * V_ROW + kv_head * V_HEAD
    # Padding rows see nothing.
    end = tl.where(segment < num_segments, tl.minimum(first + BLOCK_M, length), 0)
    masked = 0
    if HAS_WINDOW:
        masked = tl.maximum(first - window + 1, 0)
    elif not (HAS_PREFIX and TAIL_STAGES == 1):  # else the prefix is the longest loop, and new tokens are one more
        masked = tl.minimum(first, end)
        state = _new(
            state, queries, k, v, 0, masked, None, window, scale,
            K_ROW, V_ROW, HEAD_DIM, LO, HI, BLOCK_N, NUM_STAGES, False, False,
        )  # fmt: skip
    state = _new(
        state, queries, k, v, masked, end, position, window, scale,
        K_ROW, V_ROW, HEAD_DIM, LO, HI, BLOCK_N, NUM_STAGES if HAS_WINDOW else TAIL_STAGES, True, HAS_WINDOW,
    )  # fmt: skip
    out += (row * NUM_HEADS + head) * HEAD_DIM
    store(state, out, rows * NUM_HEADS * HEAD_DIM, position < length, HEAD_DIM, LO, HI)
