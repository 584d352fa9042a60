"""Patch packing in Triton. One program fills ROWS rows of pixels (p pixels each, of one patch at one time) in their three channels.

A row of a patch is 3·p bytes side by side; of a warp, lanes side by side read pixels side by side, and rows side by side are written
into one stretch of memory a channel, so both ends are coalesced though the order changes between them. A thread takes two columns:
with more, as their output would allow, its lanes would read from as many lines of pixels as a warp has rows. What limits it is the
memory if the arithmetic stays short: a division by a constant is two multiplications with the reciprocal in two parts, which for the
bytes and constants of the models here is the quotient to the bit (a test shows it). Tail: rows beyond the last and columns beyond p
are masked; a row without pixels is stored as zero."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64


def pack_patches(
    pixels: Tensor,
    offsets: Tensor,
    row_stride: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """As the contract."""
    (patches, times), p = offsets.shape, patch_size
    out = torch.empty((patches, 3 * times * p * p), dtype=dtype, device=pixels.device)
    if out.numel():
        rows = patches * times * p
        _kernel[(triton.cdiv(rows, ROWS),)](
            pixels.contiguous(), offsets.contiguous(), row_stride.contiguous(), out, rows, pixels.shape[0],
            *mean, *(part for s in (255.0, *std) for part in reciprocal(s)),
            P=p, TIMES=times, ROWS=ROWS, COLS=triton.next_power_of_2(p), IS_INTERPRETED=pixels.is_cpu, num_warps=4,
        )  # fmt: skip
    return out


def reciprocal(x: float) -> tuple[float, float]:
    """1/x as the sum of two float32 numbers, the second what the first lacks; x is rounded to float32 first."""
    exact = 1.0 / float(np.float32(x))
    high = float(np.float32(exact))
    return high, float(np.float32(exact - high))


@triton.jit(do_not_specialize=["num_rows", "num_bytes"])
def _kernel(
    pixels, offsets, row_stride, out, num_rows, num_bytes, mean_0, mean_1, mean_2, byte_high, byte_low,
    high_0, low_0, high_1, low_1, high_2, low_2,
    P: tl.constexpr, TIMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, IS_INTERPRETED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part, within = row // P, row % P
    patch, time = part // TIMES, part % TIMES
    is_row = row < num_rows
    begin = tl.load(offsets + part, mask=is_row, other=-1)
    is_live = begin >= 0
    begin += tl.load(row_stride + patch, mask=is_live, other=0).to(tl.int64) * within
    tl.device_assert(begin + 3 * P <= num_bytes, "offsets has a patch that ends beyond pixels", mask=is_live)

    cols = tl.arange(0, COLS)[None, :]
    inside = is_live[:, None] & (cols < P)
    at = pixels + begin[:, None] + cols * 3
    red = divided(tl.load(at, mask=inside, other=0), byte_high, byte_low, IS_INTERPRETED) - mean_0
    green = divided(tl.load(at + 1, mask=inside, other=0), byte_high, byte_low, IS_INTERPRETED) - mean_1
    blue = divided(tl.load(at + 2, mask=inside, other=0), byte_high, byte_low, IS_INTERPRETED) - mean_2
    red = tl.where(inside, divided(red, high_0, low_0, IS_INTERPRETED), 0.0)
    green = tl.where(inside, divided(green, high_1, low_1, IS_INTERPRETED), 0.0)
    blue = tl.where(inside, divided(blue, high_2, low_2, IS_INTERPRETED), 0.0)

    to = patch.to(tl.int64) * (3 * TIMES * P * P) + time * (P * P) + within * P
    to = out + tl.max_contiguous(to[:, None] + cols, (1, min(COLS, 2)))
    stored = is_row[:, None] & (cols < P)
    tl.store(to, red.to(out.dtype.element_ty), mask=stored)
    tl.store(to + TIMES * P * P, green.to(out.dtype.element_ty), mask=stored)
    tl.store(to + 2 * TIMES * P * P, blue.to(out.dtype.element_ty), mask=stored)


@triton.jit
def divided(x, high, low, IS_INTERPRETED: tl.constexpr):
    """x·(high + low) in float32, rounded once but for what x·low rounds."""
    x = x.to(tl.float32)
    if IS_INTERPRETED:  # which rounds the product before the sum
        return (x.to(tl.float64) * high + x * low).to(tl.float32)
    return tl.fma(x, high, x * low)
