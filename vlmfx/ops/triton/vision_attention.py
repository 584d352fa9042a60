"""Attention within packed segments in Triton. One program works out a tile of queries of one head against all keys of its segment.

Grid: heads run fastest; the number of tiles follows from the number of rows and of segments, so a launch reads no lengths. At most
one tile a segment is empty and ends at once. Tail: the keys after the last full tile are a masked tile of their own, so full tiles
have no mask; the rows after the last segment are a segment without keys.

Limit: the tensor cores, and beside them the exponentials; for short segments (windows of 64) the memory, each operand read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfx.ops.triton.flash import (
    LOG2_E,
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


def vision_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float
) -> Tensor:
    """As the contract; tokens and heads may lie apart, elements of a head may not."""
    num_rows, num_heads, head_dim = q.shape
    q, k, v = side_by_side(q), side_by_side(k), side_by_side(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_segments = len(cu_seqlens_q) - 1
    block_m, block_n, num_warps, num_stages = config(q, num_segments)
    low, high = parts(head_dim)
    num_tiles = num_rows // block_m + num_segments + 1
    if out.numel():
        _kernel[(num_tiles * num_heads,)](
            q, k, v, out, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), num_rows, num_segments, scale * LOG2_E,
            NUM_HEADS=num_heads, HEAD_DIM=head_dim, LO=low, HI=high,
            Q_ROW=q.stride(0), Q_HEAD=q.stride(1), K_ROW=k.stride(0), K_HEAD=k.stride(1), V_ROW=v.stride(0), V_HEAD=v.stride(1),
            BLOCK_M=block_m, BLOCK_N=block_n, TAIL_STAGES=tail_stages(num_stages, q.dtype), num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return out


@triton.jit(
    do_not_specialize=["num_rows", "num_segments"], do_not_specialize_on_alignment=["cu_seqlens_q", "cu_seqlens_k"]
)
def _kernel(
    q, k, v, out, cu_seqlens_q, cu_seqlens_k, num_rows, num_segments, scale,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
    Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr, V_ROW: tl.constexpr, V_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % NUM_HEADS
    tile = tl.program_id(0) // NUM_HEADS
    segment, begin, length, first = find_segment(tile, cu_seqlens_q, num_segments, num_rows, BLOCK_M)
    if first >= length:
        return
    has_keys = segment < num_segments
    begin_k = tl.load(cu_seqlens_k + segment, mask=has_keys, other=0)
    num_keys = tl.load(cu_seqlens_k + segment + 1, mask=has_keys, other=0) - begin_k
    row = (begin + first).to(tl.int64)
    rows = tl.arange(0, BLOCK_M)
    inside = first + rows < length
    queries = load(q + row * Q_ROW + head * Q_HEAD, rows * Q_ROW, inside, HEAD_DIM, LO, HI)
    k += begin_k.to(tl.int64) * K_ROW + head * K_HEAD
    v += begin_k.to(tl.int64) * V_ROW + head * V_HEAD
    keys = tl.arange(0, BLOCK_N)
    state = start(BLOCK_M, LO, HI)
    full = num_keys // BLOCK_N * BLOCK_N
    for n in range(0, full, BLOCK_N):
        k_tile = load(k + tl.cast(n, tl.int64) * K_ROW, keys * K_ROW, None, HEAD_DIM, LO, HI)
        v_tile = load(v + tl.cast(n, tl.int64) * V_ROW, keys * V_ROW, None, HEAD_DIM, LO, HI)
        state = attend(state, queries, k_tile, v_tile, None, scale, HI)
    for n in tl.range(full, num_keys, BLOCK_N, num_stages=TAIL_STAGES):  # one tile at most
        seen = n + keys < num_keys
        k_tile = load(k + tl.cast(n, tl.int64) * K_ROW, keys * K_ROW, seen, HEAD_DIM, LO, HI)
        v_tile = load(v + tl.cast(n, tl.int64) * V_ROW, keys * V_ROW, seen, HEAD_DIM, LO, HI)
        state = attend(state, queries, k_tile, v_tile, seen[None, :], scale, HI)
    store(state, out + (row * NUM_HEADS + head) * HEAD_DIM, rows * NUM_HEADS * HEAD_DIM, inside, HEAD_DIM, LO, HI)
