"""Attention of one new token a sequence to its context in a paged KV cache, and the cut of contexts into equal work.

The cache of a layer is K and V apart, each (num_blocks, num_kv_heads, block_size, head_dim)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmfx.errors import ShapeError
from vlmfx.ops.cache_write import check_cache
from vlmfx.ops.packed import dense
from vlmfx.ops.registry import Cost, nbytes, refuse, register, wide

TILE = 64  # keys that the CUDA kernel takes at a time: what `decode_work` cuts by


def paged_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    context_lens: Tensor,
    items: Tensor | None,
    item_offsets: Tensor | None,
    scale: float,
    window: int = 0,
) -> Tensor:
    """q (num_seqs, num_heads, D), the newest token of each sequence → softmax(scale·q·K)·V over its context, q's shape and dtype.

    context_lens (num_seqs,) int32 counts the newest token, whose own k and v are in the cache already; 0 is a padding row, whose
    output is zero. Position p of sequence i lies in block block_table[i, p // block_size]; block_table (num_seqs, max_blocks) int32,
    of which what is beyond a sequence's blocks is not read; None: sequence i owns block i. Blocks may be shared, and slots that no
    context reaches may hold anything. Query head h reads KV head h // (num_heads / num_kv_heads). window > 0: only the last `window`
    positions are read.

    items (W, 3) int32: (sequence, first position, end position), what a program takes; sequence −1 is no work. Each position is in
    one item, the items of a sequence are rows item_offsets[i] to item_offsets[i + 1], and item_offsets is (num_seqs + 1,) int32;
    `decode_work` makes both, None for both makes each sequence one item. They say how work is shared out and change a result by no
    more than rounding; for items given, a row does not depend on the other sequences. q may be a slice of a wider projection; scale
    is positive. Raises ShapeError; a block beyond the cache is an error on the CPU and, on a GPU, in Triton's debug mode only.

    Source: Dao et al., "Flash-Decoding for long-context inference" (2023); the list of work is that of flashinfer-ai/flashinfer:
    include/flashinfer/attention/scheduler.cuh."""
    return OP(q, k_cache, v_cache, block_table, context_lens, items, item_offsets, scale, window)


class DecodeWork(NamedTuple):
    """items (W, 3) int32 and item_offsets (num_seqs + 1,) int32 on the host, as `paged_decode_attention` takes them."""

    items: Tensor
    item_offsets: Tensor


def decode_work(context_lens: Sequence[int], num_items: int, *, tile: int, window: int = 0) -> DecodeWork:
    """Contexts cut into at most num_items pieces, the longest as short as that allows; rows of −1 fill up to num_items.

    A piece is a multiple of `tile` positions, but for the last of a sequence; those of one sequence differ by at most a tile. With
    window > 0, only the last `window` positions of a context are cut. An empty context has no piece. Raises ShapeError."""
    num_seqs = len(context_lens)
    if num_items < num_seqs:
        raise ShapeError(
            f"decode_work: num_items is {num_items} but there are {num_seqs} sequences; pass one item a sequence or more."
        )
    end = np.asarray(context_lens, dtype=np.int64)
    begin = np.maximum(end - window, 0) if window else np.zeros_like(end)
    tiles = -(-(end - begin) // tile)
    # The shortest longest piece, in tiles: one of `low` at least is needed, and one of `high` leaves each sequence its last, shorter one.
    total, spare = int(tiles.sum()), num_items - num_seqs
    low, high = max(-(-total // max(num_items, 1)), 1), max(int(tiles.max(initial=1)), 1)
    if spare:
        high = min(high, max(-(-total // spare), 1))
    while low < high:
        middle = (low + high) // 2
        if int((-(-tiles // middle)).sum()) <= num_items:
            high = middle
        else:
            low = middle + 1
    pieces = -(-tiles // high)
    offsets = np.zeros(num_seqs + 1, dtype=np.int32)
    np.cumsum(pieces, out=offsets[1:])
    sequence = np.repeat(np.arange(num_seqs), pieces)
    rank, of = np.arange(len(sequence)) - offsets[sequence], pieces[sequence]
    first = begin[sequence] + rank * tiles[sequence] // of * tile
    last = np.minimum(begin[sequence] + (rank + 1) * tiles[sequence] // of * tile, end[sequence])
    items = np.full((num_items, 3), -1, dtype=np.int32)
    items[: len(sequence)] = np.stack((sequence, first, last), 1)
    return DecodeWork(torch.from_numpy(items), torch.from_numpy(offsets))


def num_items_for(num_seqs: int, num_kv_heads: int, num_cores: int) -> int:
    """How many items a launch for num_seqs sequences has: as many as give every core, such as an SM of a GPU, three programs, which run
    at once; or where there are more sequences, one each and half a program a core beside them, for those that are longer than others."""
    return max(3 * num_cores // num_kv_heads, num_seqs + num_cores // (2 * num_kv_heads))


def reference(
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
    """The definition of right: sequence by sequence, in float32."""
    rows = [wide(q[:0])]
    for i, length in enumerate(context_lens.tolist()):
        first = max(length - window, 0) if window else 0
        k, v = (wide(_context(cache, block_table, i, length)[:, first:]) for cache in (k_cache, v_cache))
        weights = (wide(q[i]).unflatten(0, (len(k), -1)) @ k.mT * scale).softmax(-1)
        rows.append((weights @ v).flatten(0, 1)[None])
    return torch.cat(rows).to(q.dtype)


def _context(cache: Tensor, block_table: Tensor | None, i: int, length: int) -> Tensor:
    """The cached rows of sequence i, (num_kv_heads, length, D)."""
    if block_table is None:
        return cache[i, :, :length]
    blocks = block_table[i, : -(-length // cache.shape[2])].long()
    return cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length]


def cpu(
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
    """All sequences at once by torch's fused attention, the query heads of a KV head as the rows of one tile.

    Its mask lets through NaN, so where a hole between the shortest and the longest context holds one, and where windows begin
    apart, sequences go one by one."""
    lengths: list[int] = context_lens.tolist()
    num_seqs, num_heads, head_dim = q.shape
    if not lengths:
        return q.new_empty(q.shape)
    shortest, longest = min(lengths), max(lengths)
    _, kv_heads, block_size, _ = k_cache.shape
    slots = block_size * (1 if block_table is None else block_table.shape[1])
    if longest > slots:
        refuse(
            "paged_decode_attention", "context_lens", f"a context of {longest}", f"{slots} at most, as there are slots"
        )
    if block_table is not None:
        count = -(-longest // block_size)
        rows = _rows(block_table.numpy()[:, :count].tobytes(), tuple(lengths), count, block_size, kv_heads)
        k_cache, v_cache = (cache.view(-1, block_size * head_dim).index_select(0, rows) for cache in (k_cache, v_cache))
        slots = count * block_size
    strides = (kv_heads * slots * head_dim, slots * head_dim, head_dim, 1)

    def cut(cache: Tensor, i: int, count: int, first: int, end: int) -> Tensor:
        # In one step: slicing along two axes takes a sixth of a short attention's time.
        start = cache.storage_offset() + i * strides[0] + first * head_dim
        return cache.as_strided((count, kv_heads, end - first, head_dim), strides, start)

    tile = q.view(num_seqs, kv_heads, num_heads // kv_heads, head_dim)
    firsts = [max(n - window, 0) for n in lengths] if window else [0] * num_seqs
    first = min(firsts)
    if shortest and first == max(firsts):
        k, v = cut(k_cache, 0, num_seqs, first, longest), cut(v_cache, 0, num_seqs, first, longest)
        mask = None
        if shortest < longest:
            holes = k[:, :, shortest - first :].sum() + v[:, :, shortest - first :].sum()
            mask = _mask(tuple(lengths), first, q.dtype) if math.isfinite(holes) else None
        if mask is not None or shortest == longest:
            return dense(tile, k, v, scale, mask=mask).reshape(q.shape)
    out = q.new_zeros(q.shape)
    for i, (start, end) in enumerate(zip(firsts, lengths, strict=True)):
        if end:
            k, v = cut(k_cache, i, 1, start, end), cut(v_cache, i, 1, start, end)
            out[i] = dense(tile[i : i + 1], k, v, scale).reshape(num_heads, head_dim)
    return out


@lru_cache(maxsize=4)
def _mask(lengths: tuple[int, ...], first: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of positions from `first` on: −inf beyond a context. All layers of a step share it."""
    beyond = torch.arange(first, max(lengths)) >= torch.tensor(lengths)[:, None]
    return torch.zeros((), dtype=dtype).masked_fill(beyond, -torch.inf)[:, None, None]


@lru_cache(maxsize=4)
def _rows(table: bytes, lengths: tuple[int, ...], count: int, block_size: int, kv_heads: int) -> Tensor:
    """Which (block, head) pairs of a cache, seen as one axis, lie side by side as (sequence, head, its `count` blocks), any block after a
    sequence's last. table: `count` int32 a sequence. All layers of a step share it."""
    blocks = torch.from_numpy(np.frombuffer(table, np.int32).reshape(len(lengths), count).astype(np.int64))
    blocks = torch.where(torch.arange(count) * block_size < torch.tensor(lengths)[:, None], blocks, 0)
    return (blocks[:, None] * kv_heads + torch.arange(kv_heads)[:, None]).flatten()


def check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    context_lens: Tensor,
    items: Tensor | None,
    item_offsets: Tensor | None,
    scale: float,
    window: int,
) -> None:
    """Raise ShapeError for what the kernels do not take."""
    op = "paged_decode_attention"
    check_cache(op, k_cache, v_cache)
    num_blocks, kv_heads, _, head_dim = k_cache.shape
    if q.dim() != 3 or q.shape[2] != head_dim or q.shape[1] % kv_heads:
        refuse(
            op, "q", q.shape, f"shape (num_seqs, a multiple of {kv_heads}, {head_dim}), the cache's heads and head_dim"
        )
    if q.dtype != k_cache.dtype:
        refuse(op, "q", q.dtype, f"{k_cache.dtype}, as the cache has")
    num_seqs = q.shape[0]
    if block_table is None:
        if num_blocks < num_seqs:
            refuse(op, "k_cache", k_cache.shape, f"{num_seqs} blocks or more, one a sequence, without a block_table")
    elif block_table.dim() != 2 or block_table.shape[0] != num_seqs:
        refuse(op, "block_table", block_table.shape, f"shape ({num_seqs}, max_blocks), a row a sequence")
    if context_lens.shape != (num_seqs,):
        refuse(op, "context_lens", context_lens.shape, f"shape ({num_seqs},), a length a sequence")
    if (items is None) != (item_offsets is None):
        refuse(
            op, "item_offsets", "no items" if items is None else "no offsets", "both items and item_offsets, or neither"
        )
    if items is not None and (items.dim() != 2 or items.shape[1] != 3):
        refuse(op, "items", items.shape, "shape (num_items, 3)")
    if item_offsets is not None and item_offsets.shape != (num_seqs + 1,):
        refuse(op, "item_offsets", item_offsets.shape, f"shape ({num_seqs + 1},), one more than sequences")
    for name, numbers in (
        ("block_table", block_table),
        ("context_lens", context_lens),
        ("items", items),
        ("item_offsets", item_offsets),
    ):
        if numbers is not None and numbers.dtype != torch.int32:
            refuse(op, name, numbers.dtype, "torch.int32")
    if not scale > 0:
        refuse(op, "scale", scale, "a positive number")
    if window < 0:
        refuse(op, "window", window, "0 for none, or more")


def cost(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor | None,
    context_lens: Tensor,
    items: Tensor | None,
    item_offsets: Tensor | None,
    scale: float,
    window: int,
) -> Cost:
    """As if every context filled its window, or without one all slots that the table, or its block, gives it."""
    num_seqs, num_heads, head_dim = q.shape
    slots = k_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    positions = num_seqs * (min(slots, window) if window else slots)
    cached = 2 * positions * k_cache.shape[1] * head_dim * k_cache.element_size()
    return Cost(
        flops=4 * positions * num_heads * head_dim,
        bytes=cached + nbytes(q, q, block_table, context_lens, items, item_offsets),
    )


OP = register(
    "paged_decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? block_table, Tensor context_lens, Tensor? items, "
    "Tensor? item_offsets, float scale, int window) -> Tensor",
    reference=reference,
    cpu=cpu,
    fake=lambda q, *_: torch.empty_like(q, memory_format=torch.contiguous_format),
    check=check,
    cost=cost,
    kernels={"cuda": "triton.paged_decode_attention"},
    tolerance={torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
)
