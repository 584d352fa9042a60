"""Causal attention of the new tokens of packed sequences, to themselves and to what their sequence has in a paged KV cache.

The cache of a layer is K and V apart, each (num_blocks, num_kv_heads, block_size, head_dim)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from vlmfx.ops.cache_write import check_cache
from vlmfx.ops.packed import attend, check_heads, check_starts, dense, fused
from vlmfx.ops.registry import Cost, nbytes, refuse, register


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    block_table: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
) -> Tensor:
    """q (tokens, heads, D), k and v (tokens, num_kv_heads, D) of the new tokens → softmax(scale·q·K)·V, q's shape and dtype.

    cu_seqlens (num_seqs + 1,) int32 from 0, not falling: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1]; rows after the last
    sequence are padding, not read by others, and give zero. The j-th of its rows is at position prefix_lens[i] + j and attends to
    its own and all earlier positions, with window > 0 to the last `window` of them. Positions below prefix_lens[i] are in the cache:
    position p in block block_table[i, p // block_size]. prefix_lens (num_seqs,) int32; block_table (num_seqs, max_blocks) int32, of
    which what is beyond a prefix, or before every window, is not read. Cache, table and prefix_lens are all None where no sequence
    has a prefix; blocks may be shared, and slots that no prefix reaches may hold anything. Query head h reads KV head
    h // (heads / num_kv_heads). q, k and v may be slices of a fused projection; scale is positive. Raises ShapeError; a block beyond
    the cache is an error on the CPU and, on a GPU, in Triton's debug mode only.

    Source: Dao, "FlashAttention-2", arXiv:2307.08691; over a paged cache, Kwon et al., arXiv:2309.06180."""
    return OP(q, k, v, cu_seqlens, k_cache, v_cache, block_table, prefix_lens, scale, window)


def reference(
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
    """The definition of right: sequence by sequence, in float32."""
    outputs = [q[:0]]  # so that where all is padding, too, the result has a gradient, zero
    for i, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        keys, values, first = k[begin:end], v[begin:end], 0
        prefix = 0 if prefix_lens is None else int(prefix_lens[i])
        if k_cache is not None and v_cache is not None and block_table is not None:
            first = max(prefix - window + 1, 0) if window else 0
            keys = torch.cat((_cached(k_cache, block_table[i], first, prefix), keys))
            values = torch.cat((_cached(v_cache, block_table[i], first, prefix), values))
        outputs.append(attend(q[begin:end], keys, values, scale, _seen(prefix, first, end - begin, window, q.device)))
    return torch.cat([*outputs, torch.zeros_like(q[int(cu_seqlens[-1]) :])])


def _seen(prefix: int, first: int, num_new: int, window: int, device: torch.device) -> Tensor:
    """Which positions from `first` on the new tokens after a prefix attend to: (num_new, prefix + num_new − first) bool."""
    position = torch.arange(prefix, prefix + num_new, device=device)[:, None]
    key = torch.arange(first, prefix + num_new, device=device)
    return (key <= position) & (key > position - window) if window else key <= position


def _cached(cache: Tensor, blocks: Tensor, first: int, end: int) -> Tensor:
    """Positions first to end of a sequence that has these blocks: (end − first, num_kv_heads, D); no position if end is before."""
    size = cache.shape[2]
    if first >= end:
        return cache[:0, :, 0]
    # Unlike an index in brackets, index_select refuses −1.
    rows = cache.index_select(0, blocks[first // size : -(-end // size)]).transpose(1, 2).flatten(0, 1)
    return rows[first % size :][: end - first]


def cpu(
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
    """torch's fused attention: once for each run of sequences of equal length, or one by one where they have a prefix or a window."""
    starts: list[int] = cu_seqlens.tolist()
    prefixes: list[int] = [0] * (len(starts) - 1) if prefix_lens is None else prefix_lens.tolist()
    groups = q.shape[1] // k.shape[1]
    longest = max((b - a + p for (a, b), p in zip(pairwise(starts), prefixes, strict=True)), default=0)
    window = 0 if window >= longest else window
    if not window and not any(prefixes):
        if groups > 1:
            k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        return fused(q, k, v, starts, starts, scale, is_causal=True)
    out = q.new_zeros(q.shape)
    for i, ((begin, end), prefix) in enumerate(zip(pairwise(starts), prefixes, strict=True)):
        if begin == end:
            continue
        keys, values, first = k[begin:end], v[begin:end], 0
        if prefix and k_cache is not None and v_cache is not None and block_table is not None:
            first = max(prefix - window + 1, 0) if window else 0
            keys = torch.cat((_cached(k_cache, block_table[i], first, prefix), keys))
            values = torch.cat((_cached(v_cache, block_table[i], first, prefix), values))
        keys, values = (t.repeat_interleave(groups, 1).transpose(0, 1)[None] for t in (keys, values))
        queries, seen = q[begin:end].transpose(0, 1)[None], _seen(prefix, first, end - begin, window, q.device)
        own = dense(queries, keys, values, scale, mask=seen)
        out[begin:end] = own[0].transpose(0, 1)
    return out


def check(
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
) -> None:
    """Raise ShapeError for what the kernels do not take."""
    op = "prefill_attention"
    check_heads(op, q, k, v, scale)
    if len(k) != len(q):
        refuse(op, "k", k.shape, f"shape ({len(q)}, {k.shape[1]}, {k.shape[2]}), as many tokens as q")
    check_starts(op, "cu_seqlens", cu_seqlens)
    if window < 0:
        refuse(op, "window", window, "0 for none, or more")
    if k_cache is None or v_cache is None or block_table is None or prefix_lens is None:
        given = {"k_cache": k_cache, "v_cache": v_cache, "block_table": block_table, "prefix_lens": prefix_lens}
        for name, tensor in given.items():
            if tensor is not None:
                missing = ", ".join(n for n, t in given.items() if t is None)
                refuse(
                    op, name, f"no {missing} beside it", "all of k_cache, v_cache, block_table and prefix_lens, or none"
                )
        return
    check_cache(op, k_cache, v_cache)
    if k_cache.shape[1] != k.shape[1] or k_cache.shape[3] != k.shape[2]:
        refuse(
            op, "k_cache", k_cache.shape, f"shape (num_blocks, {k.shape[1]}, block_size, {k.shape[2]}), of k's heads"
        )
    if k_cache.dtype != q.dtype:
        refuse(op, "k_cache", k_cache.dtype, f"{q.dtype}, as q has")
    num_seqs = len(cu_seqlens) - 1
    if block_table.dim() != 2 or len(block_table) != num_seqs:
        refuse(op, "block_table", block_table.shape, f"shape ({num_seqs}, max_blocks)")
    if prefix_lens.shape != (num_seqs,):
        refuse(op, "prefix_lens", prefix_lens.shape, f"shape ({num_seqs},)")
    for name, numbers in (("block_table", block_table), ("prefix_lens", prefix_lens)):
        if numbers.dtype != torch.int32:
            refuse(op, name, numbers.dtype, "torch.int32")


def fake(
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
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def cost(
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
) -> Cost:
    """As if all sequences were equally long, which is the least, and had no prefix: lengths are not read."""
    length = -(-len(q) // max(len(cu_seqlens) - 1, 1))
    reach = min(window, length) if window else length
    pairs = len(q) * reach - len(q) * reach * (reach - 1) // (2 * max(length, 1))
    flops = 4 * pairs * q.shape[1] * q.shape[2]
    return Cost(flops=flops, bytes=nbytes(q, k, v, q, cu_seqlens, block_table, prefix_lens))


OP = register(
    "prefill_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? k_cache, Tensor? v_cache, Tensor? block_table, "
    "Tensor? prefix_lens, float scale, int window) -> Tensor",
    reference=reference,
    cpu=cpu,
    fake=fake,
    check=check,
    cost=cost,
    kernels={"cuda": "triton.prefill_attention"},
    # 16 bits: weights and result are rounded to the dtype, values are of order one; float32: the order of sums and exp2.
    tolerance={torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
)
