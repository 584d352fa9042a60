"""The rows of a tensor as the kernels here walk them: where each row starts, and how many of them one program takes.

Widths and strides are compile-time constants of a kernel. They are sizes of the model, so a server meets the few that its warm-up
met; from them the compiler knows which loads may be 16 bytes wide, also where a width is no multiple of 16. The number of rows,
which the batch decides, is an ordinary argument."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

TILE = (
    4096  # elements of a program: 32 a thread of four warps, four loads of 16 bytes in flight where an element has two
)
MAX_ROWS = 32


class Rows(NamedTuple):
    """Row i of num starts at (i // inner)·outer_stride + (i % inner)·inner_stride; its elements lie side by side."""

    tensor: Tensor
    num: int
    inner: int
    outer_stride: int
    inner_stride: int


def rows_of(x: Tensor) -> Rows:
    """The rows of x's last axis, without a copy where two strides reach them all, as those of (tokens, heads, head_dim) in a
    wider projection; else those of a contiguous copy."""
    width = x.shape[-1]
    if not x.numel():
        return Rows(x, 0, 1, width, 0)
    shape = list(zip(x.shape[:-1], x.stride()[:-1], strict=True))
    axes = _merged(shape)
    if len(axes) > 2:
        axes = _merged([(size, stride) for size, stride in shape if size != 1])
    if len(axes) > 2 or (x.stride(-1) != 1 and width > 1):
        return Rows(x.contiguous(), x.numel() // width, 1, width, 0)
    if len(axes) == 2:
        (outer, outer_stride), (inner, inner_stride) = axes
        return Rows(x, outer * inner, inner, outer_stride, inner_stride)
    num, stride = axes[0] if axes else (1, width)
    return Rows(x, num, 1, stride, 0)


def _merged(axes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(size, stride) of axes, outer ones first, as few as reach the same; an axis of one row stays, whose constants are those of more."""
    merged: list[tuple[int, int]] = []
    for size, stride in axes:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def tile_of(width: int) -> tuple[int, int, int]:
    """Rows a program, their width rounded up, warps: of the width alone, so that a row's sum does not depend on the batch."""
    block = triton.next_power_of_2(width)
    num_rows = min(max(TILE // block, 1), MAX_ROWS)
    return num_rows, block, min(max(num_rows * block // 1024, 1), 32)


@triton.jit
def start_of(row, INNER: tl.constexpr, OUTER_STRIDE: tl.constexpr, INNER_STRIDE: tl.constexpr):
    """Where a row starts, in elements."""
    return (row // INNER).to(tl.int64) * OUTER_STRIDE + (row % INNER).to(tl.int64) * INNER_STRIDE
