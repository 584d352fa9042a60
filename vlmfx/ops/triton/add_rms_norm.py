"""Residual add and RMS norm in Triton. Tiles as in triton/rms_norm.py: x and the residual are read once, the sum and its norm written
once, with nothing in between; memory limits it.

Tails: lanes beyond hidden load 0, which adds nothing to the square sum, and store nothing; nor do rows beyond the last.
The fusion is that of flashinfer-ai/flashinfer: include/flashinfer/norm.cuh (FusedAddRMSNorm), which writes in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfx.ops.triton.rows import rows_of, start_of, tile_of


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the contract; rows of x and of the residual may each lie at two strides, elements of a row side by side."""
    hidden, rows, others = x.shape[-1], rows_of(x), rows_of(residual)
    normed, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if total.numel():
        num_rows, block, num_warps = tile_of(hidden)
        _kernel[(triton.cdiv(rows.num, num_rows),)](
            rows.tensor, others.tensor, weight.contiguous(), normed, total, rows.num, eps, HIDDEN=hidden,
            X_INNER=rows.inner, X_OUTER=rows.outer_stride, X_STRIDE=rows.inner_stride,
            R_INNER=others.inner, R_OUTER=others.outer_stride, R_STRIDE=others.inner_stride,
            ROWS=num_rows, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
    return normed, total


@triton.jit(do_not_specialize=["num_rows"])
def _kernel(x, residual, weight, normed, total, num_rows, eps, HIDDEN: tl.constexpr,
            X_INNER: tl.constexpr, X_OUTER: tl.constexpr, X_STRIDE: tl.constexpr,
            R_INNER: tl.constexpr, R_OUTER: tl.constexpr, R_STRIDE: tl.constexpr,
            ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows) & (col < HIDDEN)
    a = tl.load(x + start_of(row, X_INNER, X_OUTER, X_STRIDE) + col, mask=inside, other=0.0)
    b = tl.load(residual + start_of(row, R_INNER, R_OUTER, R_STRIDE) + col, mask=inside, other=0.0)
    w = tl.load(weight + col, mask=col < HIDDEN, other=0.0, eviction_policy="evict_last")
    # The rounded sum is what the next layer adds to, so it is also what is normed.
    added = (a.to(tl.float32) + b.to(tl.float32)).to(a.dtype)
    out = row.to(tl.int64) * HIDDEN + col
    tl.store(total + out, added, mask=inside)
    v32 = added.to(tl.float32)
    scale = tl.rsqrt(tl.sum(v32 * v32, axis=1, keep_dims=True) / HIDDEN + eps)
    # Rounded before the weight multiplies, and the product rounded again: as the reference in 16 bits.
    rounded = (v32 * scale).to(a.dtype).to(tl.float32)
    tl.store(normed + out, (rounded * w.to(tl.float32)).to(a.dtype), mask=inside)
