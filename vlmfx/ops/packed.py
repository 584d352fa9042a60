"""Attention over packed segments in plain torch: of one segment as it is defined, and of all of them as a CPU does it fast.

A packed tensor holds the tokens of several segments one after another, (tokens, heads, head_dim); segment i is the rows from
starts[i] to starts[i + 1], and the rows after the last segment are padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfx.ops.registry import refuse, wide

HALF_SCORES = torch.__version__ < "2.11"  # of float16 on a CPU: NaN above 65,504 in torch 2.4.1, but not in 2.13


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None = None) -> Tensor:
    """softmax(scale·q·k)·v of one segment in float32: q (queries, heads, D), k and v (keys, kv_heads, D) → q's shape and dtype.

    seen (queries, keys) says what a query attends to, None that it is all; without keys the result is zero. Query head h reads KV
    head h // (heads / kv_heads)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (wide(t).repeat_interleave(groups, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", wide(q), k) * scale
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(q.dtype)


def dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """torch's fused attention of (batch, heads, tokens, D), in float32 where its scores of float16 would overflow."""
    dtype = q.dtype
    if dtype == torch.float16 and q.is_cpu and HALF_SCORES:
        q, k, v = (wide(t) for t in (q, k, v))
        mask = mask if mask is None or mask.dtype == torch.bool else wide(mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale).to(dtype)


def fused(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Sequence[int], starts_k: Sequence[int], scale: float, *, is_causal: bool
) -> Tensor:
    """Attention of each segment to itself, padding rows zero; k and v have as many heads as q.

    Runs of segments of equal lengths share one call: a batch of images of one size, or a training batch, is a single one."""
    # Beside zeros an empty part of q, so that where all is zero, too, the result has a gradient.
    outputs, at_q, at_k = [], starts_q[0], starts_k[0]
    lengths = zip((b - a for a, b in pairwise(starts_q)), (b - a for a, b in pairwise(starts_k)), strict=True)
    for (num_q, num_k), run in groupby(lengths):
        num = len(list(run))
        end_q, end_k = at_q + num * num_q, at_k + num * num_k
        if num_q and num_k:
            queries = q[at_q:end_q].unflatten(0, (num, num_q)).transpose(1, 2)
            keys, values = (t[at_k:end_k].unflatten(0, (num, num_k)).transpose(1, 2) for t in (k, v))
            out = dense(queries, keys, values, scale, is_causal=is_causal)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        else:
            outputs += [q[:0], q.new_zeros((end_q - at_q, *q.shape[1:]))]
        at_q, at_k = end_q, end_k
    if at_q < len(q) or not outputs:
        outputs += [q[:0], q.new_zeros((len(q) - at_q, *q.shape[1:]))]
    return outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs)


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Raise ShapeError unless q, k and v are packed heads of one width and dtype, and scale is positive."""
    if q.dim() != 3 or not 1 <= q.shape[2] <= 256:
        refuse(op, "q", q.shape, "shape (tokens, heads, D), D from 1 to 256")
    heads, head_dim = q.shape[1:]
    if k.dim() != 3 or k.shape[2] != head_dim or not k.shape[1] or heads % k.shape[1]:
        refuse(op, "k", k.shape, f"shape (tokens, a divisor of {heads}, {head_dim})")
    if v.shape != k.shape:
        refuse(op, "v", v.shape, f"shape {tuple(k.shape)}, as k has")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            refuse(op, name, tensor.dtype, f"{q.dtype}, as q has")
    if not scale > 0:
        refuse(op, "scale", scale, "a positive number")


def check_starts(op: str, name: str, starts: Tensor) -> None:
    """Raise ShapeError unless these are cu_seqlens."""
    if starts.dim() != 1 or not len(starts):
        refuse(op, name, starts.shape, "shape (num_segments + 1,)")
    if starts.dtype != torch.int32:
        refuse(op, name, starts.dtype, "torch.int32")
