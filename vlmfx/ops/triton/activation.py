"""Activations in Triton. One flat grid over all elements, 2048 a program and 16 a thread, wherever a row ends. x is read once and the
output written once. Memory limits it, if the arithmetic is short: at 4.3 TB/s an H200 has time for some 28 instructions an element
in 16 bits; with all that is around it, gelu takes 18, silu 11.

Tail: no lane is idle but in the last program, where those beyond the last element are masked."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfx.ops.triton.rows import rows_of, start_of

BLOCK = 2048


def activation(x: Tensor, kind: str) -> Tensor:
    """As the contract; rows may lie at two strides, elements of a row side by side."""
    width, rows = x.shape[-1], rows_of(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        _kernel[(triton.cdiv(out.numel(), BLOCK),)](
            rows.tensor, out, rows.num, KIND=kind, WIDTH=width, INNER=rows.inner, OUTER_STRIDE=rows.outer_stride,
            INNER_STRIDE=rows.inner_stride, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def activate(x, KIND: tl.constexpr):
    """The activation of float32 numbers: x·sigmoid(y), y an odd polynomial of x, here of 2 as base: log2 e is in its coefficients."""
    if KIND == "gelu":
        # y = log2(Φ(x) / Φ(−x)), fitted so that x·sigmoid(y) is within 7e-8 of x·Φ(x) everywhere, before rounding. With the
        # device's erf in its place the kernel has 37 instructions an element.
        t = x * x
        y = x * (2.302207232 + t * (0.1048385799 + t * (-9.55929936e-05 + t * (-1.593893976e-04 + t * (
            1.145242732e-05 + t * (-3.850448707e-07 + t * 5.20990584e-09))))))  # fmt: skip
    elif KIND == "gelu_pytorch_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2u), u = sqrt(2/π)·(x + 0.044715 x³).
        y = x * (2.3022082 + x * x * 0.10294324)
    elif KIND == "quick_gelu":
        y = x * 2.4554670
    else:
        tl.static_assert(KIND == "silu")
        y = x * 1.4426950
    # 1 / (1 + 2^−y) as a square: a division costs five instructions more. Where 2^−y overflows, it is 0.
    root = tl.rsqrt(1.0 + tl.exp2(-y))
    return x * (root * root)


@triton.jit(do_not_specialize=["num_rows"])
def _kernel(x, out, num_rows, KIND: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr,
            OUTER_STRIDE: tl.constexpr, INNER_STRIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, col = at // WIDTH, at % WIDTH
    inside = row < num_rows
    values = tl.load(x + start_of(row, INNER, OUTER_STRIDE, INNER_STRIDE) + col, mask=inside, other=0.0)
    tl.store(out + at, activate(values.to(tl.float32), KIND).to(values.dtype), mask=inside)
