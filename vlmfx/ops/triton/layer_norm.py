"""Layer norm in Triton. Tiles as in triton/rms_norm.py, kept in registers: mean and variance are two sums over them (the variance of
what the mean has left, which does not cancel), x is read once and the output written once. Memory limits it.

Tails: lanes beyond hidden load 0, are 0 again once the mean is taken off, and store nothing; nor do rows beyond the last."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfx.ops.triton.rows import rows_of, start_of, tile_of


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As the contract; rows may lie at two strides, elements of a row side by side."""
    hidden, rows = x.shape[-1], rows_of(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        num_rows, block, num_warps = tile_of(hidden)
        _kernel[(triton.cdiv(rows.num, num_rows),)](
            rows.tensor, weight.contiguous(), bias.contiguous(), out, rows.num, eps, HIDDEN=hidden, INNER=rows.inner,
            OUTER_STRIDE=rows.outer_stride, INNER_STRIDE=rows.inner_stride, ROWS=num_rows, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _kernel(x, weight, bias, out, num_rows, eps, HIDDEN: tl.constexpr, INNER: tl.constexpr, OUTER_STRIDE: tl.constexpr,
            INNER_STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows) & (col < HIDDEN)
    values = tl.load(x + start_of(row, INNER, OUTER_STRIDE, INNER_STRIDE) + col, mask=inside, other=0.0)
    w = tl.load(weight + col, mask=col < HIDDEN, other=0.0, eviction_policy="evict_last")
    b = tl.load(bias + col, mask=col < HIDDEN, other=0.0, eviction_policy="evict_last")
    v32 = values.to(tl.float32)
    mean = tl.sum(v32, axis=1, keep_dims=True) / HIDDEN
    centred = tl.where(col < HIDDEN, v32 - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / HIDDEN + eps)
    normed = centred * scale * w.to(tl.float32) + b.to(tl.float32)
    tl.store(out + row.to(tl.int64) * HIDDEN + col, normed.to(values.dtype), mask=inside)
