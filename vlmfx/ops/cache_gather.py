"""Keys and values of whole sequences, gathered from a paged KV cache into packed rows."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfx.ops.cache_write import as_array, check_cache
from vlmfx.ops.registry import Cost, nbytes, refuse, register


def cache_gather(
    k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """The cached k and v of sequences, one after another: two of (num_tokens, num_kv_heads, head_dim), zero after the last sequence.

    Sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1]; its position p lies in block block_table[i, p // block_size].
    block_table (num_seqs, max_blocks) int32, of which what is beyond a sequence's blocks is not read; cu_seqlens (num_seqs + 1,)
    int32 from 0, not falling, its last at most num_tokens. Blocks may be shared. Raises ShapeError; a block beyond the cache is an
    error on the CPU and, on a GPU, in Triton's debug mode only."""
    return OP(k_cache, v_cache, block_table, cu_seqlens, num_tokens)


def reference(
    k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """The definition of right."""
    block_size = k_cache.shape[2]
    row = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    is_live = row < cu_seqlens[-1]
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    # One sequence and one block more than there are, so that rows of no sequence have something to point at.
    position = torch.where(is_live, row - cu_seqlens[sequence], 0)
    block = F.pad(block_table, (0, 1, 0, 1))[sequence, position // block_size]
    block = torch.where(is_live, block, 0).long()
    k, v = (cache[block, :, position % block_size] for cache in (k_cache, v_cache))
    return torch.where(is_live[:, None, None], k, 0), torch.where(is_live[:, None, None], v, 0)


def cpu(
    k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Block by block, by numpy: the reference goes row by row and takes up to three times as long."""
    _, kv_heads, block_size, head_dim = k_cache.shape
    outs = (k_cache.new_zeros(num_tokens, kv_heads, head_dim), v_cache.new_zeros(num_tokens, kv_heads, head_dim))
    pairs = [(as_array(out), as_array(cache)) for out, cache in zip(outs, (k_cache, v_cache), strict=True)]
    for row, (start, end) in zip(as_array(block_table), pairwise(cu_seqlens.tolist()), strict=True):
        blocks = row[: -(-(end - start) // block_size)].tolist()
        for i, first in enumerate(range(start, end, block_size)):
            num, block = min(block_size, end - first), blocks[i]
            if block < 0:  # which numpy would count from the end
                raise IndexError(f"cache_gather: block_table has {block} within a sequence, which is out of range.")
            for out, cache in pairs:
                out[first : first + num] = cache[block, :, :num].transpose(1, 0, 2)
    return outs


def fake(
    k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    shape = (num_tokens, k_cache.shape[1], k_cache.shape[3])
    return k_cache.new_empty(shape), v_cache.new_empty(shape)


def check(k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, num_tokens: int) -> None:
    """Raise ShapeError for what the kernels do not take."""
    check_cache("cache_gather", k_cache, v_cache)
    if block_table.dim() != 2:
        refuse("cache_gather", "block_table", block_table.shape, "shape (num_seqs, max_blocks)")
    num_seqs = block_table.shape[0]
    if cu_seqlens.shape != (num_seqs + 1,):
        refuse(
            "cache_gather", "cu_seqlens", cu_seqlens.shape, f"shape ({num_seqs + 1},), one more than block_table's rows"
        )
    for name, numbers in (("block_table", block_table), ("cu_seqlens", cu_seqlens)):
        if numbers.dtype != torch.int32:
            refuse("cache_gather", name, numbers.dtype, "torch.int32")
    if num_tokens < 0:
        refuse("cache_gather", "num_tokens", num_tokens, "0 or more")


def cost(k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Cost:
    """As if every row were of a sequence."""
    elements = 4 * num_tokens * k_cache.shape[1] * k_cache.shape[3]
    return Cost(flops=0, bytes=elements * k_cache.element_size() + nbytes(block_table, cu_seqlens))


OP = register(
    "cache_gather(Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor cu_seqlens, int num_tokens) -> (Tensor, Tensor)",
    reference=reference,
    cpu=cpu,
    fake=fake,
    check=check,
    cost=cost,
    kernels={"cuda": "triton.cache_gather"},
    tolerance=dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), 0.0),
)
