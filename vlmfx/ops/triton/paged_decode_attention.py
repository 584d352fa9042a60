"""Attention of one new token a sequence to its paged context in Triton, split over the context.

First kernel: one program takes one work item for one KV head. The query heads of that KV head are the rows of one tile, so keys and
values are read once; they stream through shared memory, a tile of them worked on while the next are on their way, and block
numbers are read a tile earlier still. KV heads run fastest: programs side by side read pieces of memory side by side. The only item
of a sequence is its output; of several, each leaves its mean of values and the logarithm of its sum of weights in float32.
Second kernel: one program takes one head of one sequence, and adds its items up in their order, so who came first never shows.
There are two launches rather than one whose last program adds up, because that one needs counters that are zero before each launch;
on Hopper the second is launched while the first runs, and waits.

Grids depend on shapes only; an item of sequence −1, and a sequence whose output is written, end at once. Tails: keys beyond an item,
and rows beyond the query heads, are masked. Limit: the memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vlmfx.ops.paged_decode_attention import TILE
from vlmfx.ops.triton.flash import LOG2_E, LOWEST, attend, is_hopper, load, parts, side_by_side, start, store

LEAST = 16  # rows, and elements of a head, of a product
SUMMED = 16  # items a step of the second kernel, which has the next four steps' on their way


class Config(NamedTuple):
    """Keys of a tile, and how a program is run."""

    tile: int
    num_warps: int
    num_stages: int


def config(head_dim: int, dtype: torch.dtype) -> Config:
    """Keys and values of a tile are 16 KB each, and two tiles are in shared memory: three programs fit an SM that has 228 KB, and one
    an SM of 100 KB. float32 has no tensor cores; fewer warps would not hold its operands in registers."""
    if dtype == torch.float32:
        return Config(TILE // 2, 8, 2)
    return Config(2 * TILE if head_dim <= 64 else TILE if head_dim <= 128 else TILE // 2, 4, 3)


def paged_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    context_lens: Tensor,
    items: Tensor | None,
    item_offsets: Tensor | None,
    scale: float,
    window: int,
) -> Tensor:
    """As the contract; sequences and heads of q may lie apart, elements of a head may not."""
    num_seqs, num_heads, head_dim = q.shape
    num_blocks, kv_heads, block_size, _ = k_cache.shape
    if head_dim < LEAST:  # of toy models only
        q, k_cache, v_cache = (F.pad(x, (0, LEAST - head_dim)) for x in (q, k_cache, v_cache))
        wide = paged_decode_attention(
            q, k_cache, v_cache, block_table, context_lens, items, item_offsets, scale, window
        )
        return wide[..., :head_dim].contiguous()
    q = side_by_side(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    num_items = num_seqs if items is None else len(items)
    partial = lse = None
    if items is not None and item_offsets is not None:
        items, item_offsets = items.contiguous(), item_offsets.contiguous()
        partial = torch.empty((num_items, num_heads, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((num_items, num_heads), dtype=torch.float32, device=q.device)
    slots, table_row = block_size, 0
    if block_table is not None:
        block_table = side_by_side(block_table)
        slots, table_row = block_size * block_table.shape[1], block_table.stride(0)
    group = num_heads // kv_heads
    rows = max(LEAST, triton.next_power_of_2(group))
    low, high = parts(head_dim)
    # The warps share a product's columns only if these are more than its rows; else each does all of it.
    high = max(high, 2 * rows) if high else 0
    tile, num_warps, num_stages = config(head_dim, q.dtype)
    is_overlapped = is_hopper() and items is not None
    if num_items:
        _attend_items[(num_items * kv_heads,)](
            q, k_cache, v_cache, block_table, context_lens.contiguous(), items, item_offsets, out, partial, lse,
            num_blocks, block_size, slots, table_row, window, scale * LOG2_E,
            Q_ROW=q.stride(0), Q_HEAD=q.stride(1), NUM_KV_HEADS=kv_heads, GROUP=group, ROWS=rows, HEAD_DIM=head_dim, LO=low, HI=high,
            BLOCK_SIZE=0 if block_table is None else block_size, HAS_WINDOW=window > 0, TILE=tile,
            IS_OVERLAPPED=is_overlapped, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    if items is not None:
        _add_up[(num_seqs * num_heads,)](
            partial, lse, item_offsets, out, NUM_HEADS=num_heads, HEAD_DIM=head_dim,
            COLS=triton.next_power_of_2(head_dim), SUMMED=SUMMED, IS_OVERLAPPED=is_overlapped,
            **({"launch_pdl": True} if is_overlapped else {}),
        )  # fmt: skip
    return out


@triton.jit(
    do_not_specialize=["num_blocks", "block_size", "slots", "table_row", "window"],
    do_not_specialize_on_alignment=["block_table", "context_lens", "items", "item_offsets"],
)
def _attend_items(
    q, k_cache, v_cache, block_table, context_lens, items, item_offsets, out, partial, lse,
    num_blocks, block_size, slots, table_row, window, scale,
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HAS_WINDOW: tl.constexpr, TILE: tl.constexpr, IS_OVERLAPPED: tl.constexpr,
):  # fmt: skip
    if IS_OVERLAPPED:
        tl.extra.cuda.gdc_launch_dependents()
    item = tl.program_id(0) // NUM_KV_HEADS
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    sequence = item
    begin = 0
    if items is None:
        end = tl.load(context_lens + sequence)
    else:
        sequence = tl.load(items + item * 3)
        begin = tl.load(items + item * 3 + 1)
        end = tl.load(items + item * 3 + 2)
    if sequence < 0:
        return
    if HAS_WINDOW:
        begin = tl.maximum(begin, tl.load(context_lens + sequence) - window)
    tl.device_assert(end <= slots, "an item ends beyond the block table, or beyond its block")
    is_alone = True
    if items is not None:
        is_alone = tl.load(item_offsets + sequence + 1) - tl.load(item_offsets + sequence) == 1
    sequence = sequence.to(tl.int64)
    rows, keys = tl.arange(0, ROWS), tl.arange(0, TILE)
    inside = rows < GROUP
    queries = load(q + sequence * Q_ROW + kv_head * GROUP * Q_HEAD, rows * Q_HEAD, inside, HEAD_DIM, LO, HI)
    state = start(ROWS, LO, HI)
    if BLOCK_SIZE > 0:
        table = block_table + sequence * table_row
        coming = tl.load(table + (begin + keys) // BLOCK_SIZE, mask=begin + keys < end, other=0)
    else:
        first = (sequence * NUM_KV_HEADS + kv_head) * block_size * HEAD_DIM
        k_cache += first
        v_cache += first
    for n in range(begin, end, TILE):
        key = n + keys
        known = key < end
        if BLOCK_SIZE > 0:
            # The block numbers of the next tile are asked for before the keys of this one: nothing waits for two reads in turn.
            block = coming
            coming = tl.load(table + (key + TILE) // BLOCK_SIZE, mask=key + TILE < end, other=0)
            tl.device_assert((block >= 0) & (block < num_blocks), "block_table has a block beyond the cache")
            at = ((block.to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE) * HEAD_DIM
        else:
            at = key.to(tl.int64) * HEAD_DIM
        k_tile = load(k_cache, at, known, HEAD_DIM, LO, HI)
        v_tile = load(v_cache, at, known, HEAD_DIM, LO, HI)
        state = attend(state, queries, k_tile, v_tile, known[None, :], scale, HI)
    head = kv_head * GROUP + rows
    if is_alone:
        store(state, out + sequence * NUM_KV_HEADS * GROUP * HEAD_DIM, head * HEAD_DIM, inside, HEAD_DIM, LO, HI)
    elif items is not None:
        item_head = item.to(tl.int64) * NUM_KV_HEADS * GROUP + head
        store(state, partial, item_head * HEAD_DIM, inside, HEAD_DIM, LO, HI)
        tl.store(lse + item_head, state[3] + tl.log2(tl.where(state[2] == 0.0, 1.0, state[2])), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["item_offsets"])
def _add_up(
    partial, lse, item_offsets, out,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, COLS: tl.constexpr, SUMMED: tl.constexpr, IS_OVERLAPPED: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0) // NUM_HEADS
    head = tl.program_id(0) % NUM_HEADS
    begin = tl.load(item_offsets + sequence)
    end = tl.load(item_offsets + sequence + 1)
    if end - begin == 1:
        return
    if IS_OVERLAPPED:
        tl.extra.cuda.gdc_wait()  # for the first kernel's results; the offsets are older
    cols = tl.arange(0, COLS)
    # Every SUMMEDth item has a sum of its own until the end, so that a step is without a sum over items.
    top = tl.full((), LOWEST, tl.float32)
    totals = tl.zeros((SUMMED,), tl.float32)
    sums = tl.zeros((SUMMED, COLS), tl.float32)
    for n in tl.range(begin, end, SUMMED, num_stages=5):
        item = n + tl.arange(0, SUMMED)
        row = item.to(tl.int64) * NUM_HEADS + head
        inside = (item < end)[:, None] & (cols < HEAD_DIM)[None, :]
        means = tl.load(partial + row[:, None] * HEAD_DIM + cols[None, :], mask=inside, other=0.0)
        logs = tl.load(lse + row, mask=item < end, other=float("-inf"))
        greatest = tl.maximum(top, tl.max(logs, 0))
        weights = tl.exp2(logs - greatest)
        fade = tl.exp2(top - greatest)
        totals = totals * fade + weights
        sums = sums * fade + weights[:, None] * means
        top = greatest
    total = tl.sum(totals, 0)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    tl.store(out + tl.program_id(0).to(tl.int64) * HEAD_DIM + cols, tl.sum(sums, 0) * share, mask=cols < HEAD_DIM)
