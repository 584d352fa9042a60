"""The cache write in Triton. One program copies up to ELEMENTS of k and as many of v, whole rows of one head each.

Nothing but the memory limits it: a row is read once and written once. Tail: rows beyond the last, columns beyond head_dim and rows
of slot −1 are masked in the load and in the store."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vlmfx.ops.triton.rotary import by_token

ELEMENTS = 2048  # 16 a thread of four warps: two loads of 16 bytes of each tensor in flight


def cache_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """As the contract; tokens and heads may lie apart, elements of a head may not."""
    k, v = by_token(k), by_token(v)
    tokens, kv_heads, head_dim = k.shape
    if k.numel():
        num_rows, cols, warps = tile_of(head_dim)
        _kernel[(triton.cdiv(tokens * kv_heads, num_rows),)](
            k, v, k_cache, v_cache, slot_mapping.contiguous(), tokens * kv_heads, k_cache.shape[0],
            *k.stride()[:2], *v.stride()[:2], kv_heads, k_cache.shape[2], head_dim,
            ROWS=num_rows, COLS=cols, num_warps=warps,
        )  # fmt: skip


def tile_of(width: int) -> tuple[int, int, int]:
    """Rows a program, their width rounded up, warps: of the width alone, so that a batch of another size compiles nothing."""
    cols = triton.next_power_of_2(width)
    num_rows = max(ELEMENTS // cols, 1)
    return num_rows, cols, min(max(num_rows * cols // 512, 1), 8)


# Strides and sizes are those of the model and of the cache: as constants they say which loads may be wide, and divide cheaply.
@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _kernel(
    k, v, k_cache, v_cache, slot_mapping, num_rows, num_blocks,
    K_TOKEN_STRIDE: tl.constexpr, K_HEAD_STRIDE: tl.constexpr, V_TOKEN_STRIDE: tl.constexpr, V_HEAD_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = (row // KV_HEADS).to(tl.int64), row % KV_HEADS
    slot = tl.load(slot_mapping + token, mask=row < num_rows, other=-1)
    tl.device_assert(slot < num_blocks.to(tl.int64) * BLOCK_SIZE, "slot_mapping has a slot beyond the cache")
    cols = tl.arange(0, COLS)[None, :]
    inside = (slot >= 0)[:, None] & (cols < HEAD_DIM)
    to = row_of(slot, head, KV_HEADS, BLOCK_SIZE, HEAD_DIM)[:, None] + cols
    keys = tl.load(k + (token * K_TOKEN_STRIDE + head * K_HEAD_STRIDE)[:, None] + cols, mask=inside)
    values = tl.load(v + (token * V_TOKEN_STRIDE + head * V_HEAD_STRIDE)[:, None] + cols, mask=inside)
    tl.store(k_cache + to, keys, mask=inside)
    tl.store(v_cache + to, values, mask=inside)


@triton.jit
def row_of(slot, head, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where the row of a head begins in a cache, in elements."""
    block, offset = (slot // BLOCK_SIZE).to(tl.int64), slot % BLOCK_SIZE
    return ((block * KV_HEADS + head) * BLOCK_SIZE + offset) * HEAD_DIM
