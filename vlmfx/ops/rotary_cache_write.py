"""Rotary embedding of q and k, and the write of k and v into the cache, from the fused projection in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfx.ops import cache_write, rotary
from vlmfx.ops.registry import Cost, nbytes, refuse, register
from vlmfx.ops.rotary import RotaryTable


def rotary_cache_write(
    qkv: Tensor, table: RotaryTable, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> Tensor:
    """qkv (tokens, heads + 2·kv_heads, head_dim) → (tokens, heads + kv_heads, head_dim), contiguous: q and k, turned.

    As `rotary` of q and k, then `cache_write` of the turned k and of v, in place. kv_heads is the cache's. slot_mapping (tokens,)
    int32, where −1 writes nothing; its token is turned all the same. Raises ShapeError."""
    return OP(qkv, table.cos, table.sin, k_cache, v_cache, slot_mapping)


def reference(qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> Tensor:
    """The definition of right."""
    qk, v = _split(qkv, k_cache)
    turned = rotary.reference(qk, cos, sin)
    cache_write.reference(turned[:, -v.shape[1] :], v, k_cache, v_cache, slot_mapping)
    return turned


def cpu(qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> Tensor:
    """The two ops' own."""
    qk, v = _split(qkv, k_cache)
    turned = rotary.cpu(qk, cos, sin)
    cache_write.cpu(turned[:, -v.shape[1] :], v, k_cache, v_cache, slot_mapping)
    return turned


def traced(qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> Tensor:
    """The two ops' own."""
    qk, v = _split(qkv, k_cache)
    turned = rotary.cpu(qk, cos, sin)
    cache_write.traced(turned[:, -v.shape[1] :], v, k_cache, v_cache, slot_mapping)
    return turned


def fake(qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> Tensor:
    tokens, heads, head_dim = qkv.shape
    return qkv.new_empty(tokens, heads - k_cache.shape[1], head_dim)


def _split(qkv: Tensor, k_cache: Tensor) -> tuple[Tensor, Tensor]:
    """q beside k, and v."""
    kv_heads = k_cache.shape[1]
    qk, v = qkv.split_with_sizes((qkv.shape[1] - kv_heads, kv_heads), 1)
    return qk, v


def check(qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Raise ShapeError for what the kernels do not take."""
    cache_write.check_cache("rotary_cache_write", k_cache, v_cache)
    least, head_dim = 2 * k_cache.shape[1], k_cache.shape[3]
    if qkv.dim() != 3 or qkv.shape[1] < least or qkv.shape[2] != head_dim or head_dim % 2:
        expected = (
            f"shape (tokens, heads, {head_dim}), with {least} heads of k and v and those of q, and an even head_dim"
        )
        refuse("rotary_cache_write", "qkv", qkv.shape, expected)
    if qkv.dtype != k_cache.dtype:
        refuse("rotary_cache_write", "qkv", qkv.dtype, f"{k_cache.dtype}, as the cache has")
    rotary.check_table("rotary_cache_write", qkv, cos, sin)
    cache_write.check_slots("rotary_cache_write", slot_mapping, qkv.shape[0])


def cost(qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> Cost:
    """Of qkv all is read, q and k are written, and k and v once more into the cache."""
    tokens, heads, head_dim = qkv.shape
    turned = tokens * (heads - k_cache.shape[1]) * head_dim
    written = (turned + 2 * tokens * k_cache.shape[1] * head_dim) * qkv.element_size()
    return Cost(flops=3 * turned, bytes=nbytes(qkv, slot_mapping) + nbytes(cos, sin) // 2 + written)


OP = register(
    "rotary_cache_write(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> Tensor",
    reference=reference,
    cpu=cpu,
    traced=traced,
    fake=fake,
    check=check,
    cost=cost,
    kernels={"cuda": "triton.rotary_cache_write"},
    tolerance={torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
)
