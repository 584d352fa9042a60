"""Bidirectional attention within packed segments: images, frames or windows of patches, and the queries of a resampler."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from vlmfx.ops.packed import attend, check_heads, check_starts, fused
from vlmfx.ops.registry import Cost, nbytes, refuse, register


def vision_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float
) -> Tensor:
    """q (q_tokens, heads, D), k and v (k_tokens, heads, D) → softmax(scale·q·k)·v within each segment, q's shape and dtype.

    cu_seqlens_q and cu_seqlens_k (num_segments + 1,) int32 from 0, not falling: segment i's queries, rows cu_seqlens_q[i] to
    cu_seqlens_q[i + 1], attend to all its keys; both are one tensor where a segment attends to itself. Queries of a segment without
    keys and rows after the last segment give zero; rows of k and v after it are not read. q, k and v may be slices of a fused
    projection; scale is positive. Raises ShapeError.

    Source: Dao, "FlashAttention-2", arXiv:2307.08691."""
    return OP(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)


def reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float) -> Tensor:
    """The definition of right: segment by segment, in float32."""
    rows = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    outputs = [attend(q[a:b], k[c:d], v[c:d], scale) for (a, b), (c, d) in rows]
    # An empty part of q: also where all is padding, the result has a gradient, zero.
    return torch.cat([q[:0], *outputs, torch.zeros_like(q[int(cu_seqlens_q[-1]) :])])


def cpu(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float) -> Tensor:
    """torch's fused attention, once for each run of segments of equal lengths."""
    return fused(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), scale, is_causal=False)


def check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float) -> None:
    """Raise ShapeError for what the kernels do not take."""
    check_heads("vision_attention", q, k, v, scale)
    if k.shape[1] != q.shape[1]:
        refuse("vision_attention", "k", k.shape, f"shape (tokens, {q.shape[1]}, {q.shape[2]}), as many heads as q")
    check_starts("vision_attention", "cu_seqlens_q", cu_seqlens_q)
    check_starts("vision_attention", "cu_seqlens_k", cu_seqlens_k)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        refuse("vision_attention", "cu_seqlens_k", cu_seqlens_k.shape, f"shape ({len(cu_seqlens_q)},), as cu_seqlens_q")


def cost(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float) -> Cost:
    """As if all segments were equally long, which for a segment's attention to itself is the least."""
    flops = 4 * q.numel() * len(k) // max(len(cu_seqlens_k) - 1, 1)
    return Cost(flops=flops, bytes=nbytes(q, k, v, q, cu_seqlens_q, cu_seqlens_k))


OP = register(
    "vision_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale) -> Tensor",
    reference=reference,
    cpu=cpu,
    with_grad=cpu,
    fake=lambda q, k, v, cu_seqlens_q, cu_seqlens_k, scale: torch.empty_like(q, memory_format=torch.contiguous_format),
    check=check,
    cost=cost,
    kernels={"cuda": "triton.vision_attention"},
    # 16 bits: weights and result are rounded to the dtype, values are of order one; float32: the order of sums and exp2.
    tolerance={torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
)
