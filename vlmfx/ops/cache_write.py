"""New keys and values, written into their slots of a paged KV cache.

The cache of a layer is K and V apart, each (num_blocks, num_kv_heads, block_size, head_dim); slot block·block_size + offset is row
`offset` of every head of that block."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmfx.ops.registry import Cost, nbytes, refuse, register

# Up to so many tokens a loop over rows is faster on the CPU than one indexed assignment: 5 µs against 15 for one token, 20 against 18
# for sixteen, and 25 to 30 for torch's index_put_ (float32, 4 heads of 64, one thread of a Xeon).
LOOP = 12


def cache_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write k and v (tokens, num_kv_heads, head_dim) in place; slot_mapping (tokens,) int32, where −1 writes nothing.

    k and v may be slices of a wider projection. What two tokens of one slot leave is undefined. Raises ShapeError; a slot beyond the
    cache is an error on the CPU and, on a GPU, in Triton's debug mode only."""
    OP(k, v, k_cache, v_cache, slot_mapping)


def reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """The definition of right."""
    rows = (slot_mapping >= 0).nonzero()[:, 0]
    slots = slot_mapping[rows].long()
    blocks, offsets = slots // k_cache.shape[2], slots % k_cache.shape[2]
    k_cache[blocks, :, offsets] = k[rows]
    v_cache[blocks, :, offsets] = v[rows]


def cpu(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """By numpy, whose assignment of a row costs a tenth of torch's."""
    block_size = k_cache.shape[2]
    pairs = [(as_array(k_cache), as_array(k)), (as_array(v_cache), as_array(v))]
    if len(k) <= LOOP:
        for token, slot in enumerate(slot_mapping.tolist()):
            if slot >= 0:
                block, offset = divmod(slot, block_size)
                for cache, rows in pairs:
                    cache[block, :, offset] = rows[token]
        return
    slots = as_array(slot_mapping)
    written = (slots >= 0).nonzero()[0]
    blocks, offsets = slots[written] // block_size, slots[written] % block_size
    for cache, rows in pairs:
        cache[blocks, :, offsets] = rows if len(written) == len(rows) else rows[written]


def traced(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """One indexed assignment of a fixed number of rows, which Inductor does in place.

    A token without a slot does again what the first token with one does; where none has, each writes what is in slot 0 already."""
    if not len(k):
        return
    is_written = slot_mapping >= 0
    first = is_written.int().argmax()
    source = torch.where(is_written, torch.arange(len(k)), first)
    slots = slot_mapping[source].clamp(min=0).long()
    blocks, offsets = slots // k_cache.shape[2], slots % k_cache.shape[2]
    for cache, rows in ((k_cache, k), (v_cache, v)):
        cache[blocks, :, offsets] = torch.where(is_written.any(), rows[source], cache[blocks, :, offsets])


def as_array(x: Tensor) -> np.ndarray[Any, Any]:
    """x's memory as numpy sees it, which knows no bfloat16."""
    array: np.ndarray[Any, Any] = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).detach().numpy()
    return array


def check(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Raise ShapeError for what the kernels do not take."""
    check_cache("cache_write", k_cache, v_cache)
    tokens, kv_heads, head_dim = slot_mapping.shape[0], k_cache.shape[1], k_cache.shape[3]
    for name, rows in (("k", k), ("v", v)):
        if rows.shape != (tokens, kv_heads, head_dim):
            refuse("cache_write", name, rows.shape, f"shape ({tokens}, {kv_heads}, {head_dim}), tokens and the cache's")
        if rows.dtype != k_cache.dtype:
            refuse("cache_write", name, rows.dtype, f"{k_cache.dtype}, as the cache has")
    check_slots("cache_write", slot_mapping, tokens)


def check_cache(op: str, k_cache: Tensor, v_cache: Tensor) -> None:
    """Raise ShapeError unless these are the two caches of a layer."""
    if k_cache.dim() != 4:
        refuse(op, "k_cache", k_cache.shape, "shape (num_blocks, num_kv_heads, block_size, head_dim)")
    if v_cache.shape != k_cache.shape:
        refuse(op, "v_cache", v_cache.shape, f"shape {tuple(k_cache.shape)}, as k_cache has")
    if v_cache.dtype != k_cache.dtype:
        refuse(op, "v_cache", v_cache.dtype, f"{k_cache.dtype}, as k_cache has")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not cache.is_contiguous():
            refuse(op, name, f"strides {cache.stride()}", "contiguous memory")


def check_slots(op: str, slot_mapping: Tensor, tokens: int) -> None:
    """Raise ShapeError unless there is a slot a token."""
    if slot_mapping.shape != (tokens,):
        refuse(op, "slot_mapping", slot_mapping.shape, f"shape ({tokens},), a slot a token")
    if slot_mapping.dtype != torch.int32:
        refuse(op, "slot_mapping", slot_mapping.dtype, "torch.int32")


OP = register(
    "cache_write(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()",
    reference=reference,
    cpu=cpu,
    traced=traced,
    fake=lambda k, v, k_cache, v_cache, slot_mapping: None,
    check=check,
    cost=lambda k, v, k_cache, v_cache, slot_mapping: Cost(flops=0, bytes=nbytes(k, k, v, v, slot_mapping)),
    kernels={"cuda": "triton.cache_write"},
    tolerance=dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), 0.0),
)
