"""RMS norm in Triton. One program takes 4096 elements, as 32 rows of 128 or one of 4096 (one row where rows are longer), and keeps
them in registers: x is read once, the output written once, and the weight read once a program. Memory limits it.

Tails: lanes beyond hidden load 0, which adds nothing to the square sum, and store nothing; nor do rows beyond the last.
Short rows side by side in one tile: fla-org/flash-linear-attention: fla/modules/layernorm.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfx.ops.triton.rows import rows_of, start_of, tile_of


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the contract; rows may lie at two strides, elements of a row side by side."""
    hidden, rows = x.shape[-1], rows_of(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        num_rows, block, num_warps = tile_of(hidden)
        _kernel[(triton.cdiv(rows.num, num_rows),)](
            rows.tensor, weight.contiguous(), out, rows.num, eps, HIDDEN=hidden, INNER=rows.inner,
            OUTER_STRIDE=rows.outer_stride, INNER_STRIDE=rows.inner_stride, ROWS=num_rows, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _kernel(x, weight, out, num_rows, eps, HIDDEN: tl.constexpr, INNER: tl.constexpr, OUTER_STRIDE: tl.constexpr,
            INNER_STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows) & (col < HIDDEN)
    values = tl.load(x + start_of(row, INNER, OUTER_STRIDE, INNER_STRIDE) + col, mask=inside, other=0.0)
    w = tl.load(weight + col, mask=col < HIDDEN, other=0.0, eviction_policy="evict_last").to(tl.float32)
    v32 = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(v32 * v32, axis=1, keep_dims=True) / HIDDEN + eps)
    # Rounded before the weight multiplies, and the product rounded again: as the reference in 16 bits.
    normed = (v32 * scale).to(values.dtype).to(tl.float32)
    tl.store(out + row.to(tl.int64) * HIDDEN + col, (normed * w).to(values.dtype), mask=inside)
