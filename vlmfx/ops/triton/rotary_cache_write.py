"""Rotary embedding and cache write in Triton, one launch. One program turns up to rotary.PAIRS pairs of one token's heads of q and k,
stores them, and those of k in the cache too; the same program copies its share of the token's heads of v.

All loads of a program are issued before its first store; memory limits it. Tail: heads and columns beyond the last are masked, and
with slot −1 so is what goes to the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfx.ops.triton.cache_write import row_of
from vlmfx.ops.triton.rotary import by_token, load_angles, tile_of, turned


def rotary_cache_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    """As the contract; tokens and heads may lie apart, elements of a head may not."""
    qkv = by_token(qkv)
    (tokens, all_heads, head_dim), (num_blocks, kv_heads, block_size, _) = qkv.shape, k_cache.shape
    turned_heads = all_heads - kv_heads
    out = torch.empty((tokens, turned_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if out.numel():
        num_heads, cols, warps = tile_of(turned_heads, head_dim // 2)
        programs = triton.cdiv(turned_heads, num_heads)
        _kernel[(tokens, programs)](
            qkv, cos.contiguous(), sin.contiguous(), out, k_cache, v_cache, slot_mapping.contiguous(), num_blocks,
            *qkv.stride()[:2], turned_heads, kv_heads, block_size, head_dim // 2,
            HEADS=num_heads, V_HEADS=triton.next_power_of_2(triton.cdiv(kv_heads, programs)), COLS=cols, num_warps=warps,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_blocks"])
def _kernel(
    qkv, cos, sin, out, k_cache, v_cache, slot_mapping, num_blocks,
    TOKEN_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, TURNED: tl.constexpr, KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, V_HEADS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    tl.device_assert(slot < num_blocks.to(tl.int64) * BLOCK_SIZE, "slot_mapping has a slot beyond the cache")
    cols = tl.arange(0, COLS)[None, :]
    c, s = load_angles(cos, sin, token, cols, HALF)

    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    inside = (heads < TURNED) & (cols < HALF)
    a, b = turned(qkv + token * TOKEN_STRIDE + heads * HEAD_STRIDE + cols, inside, c, s, HALF)
    v_heads = (tl.program_id(1) * V_HEADS + tl.arange(0, V_HEADS))[:, None]
    v_inside = (v_heads < KV_HEADS) & (cols < HALF) & (slot >= 0)
    at = qkv + token * TOKEN_STRIDE + (TURNED + v_heads) * HEAD_STRIDE + cols
    first = tl.load(at, mask=v_inside)
    second = tl.load(at + HALF, mask=v_inside)

    to = out + token * (TURNED * 2 * HALF) + heads * (2 * HALF) + cols
    tl.store(to, a, mask=inside)
    tl.store(to + HALF, b, mask=inside)
    k_heads = heads - (TURNED - KV_HEADS)
    written = inside & (k_heads >= 0) & (slot >= 0)
    to = k_cache + row_of(slot, k_heads, KV_HEADS, BLOCK_SIZE, 2 * HALF) + cols
    tl.store(to, a, mask=written)
    tl.store(to + HALF, b, mask=written)
    to = v_cache + row_of(slot, v_heads, KV_HEADS, BLOCK_SIZE, 2 * HALF) + cols
    tl.store(to, first, mask=v_inside)
    tl.store(to + HALF, second, mask=v_inside)
