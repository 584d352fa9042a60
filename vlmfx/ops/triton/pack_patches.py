"""Patch packing in Triton. One program fills ROWS rows of pixels (p pixels each, of one patch at one time) in their three channels.

A row of a patch is 3·p bytes side by side; of a warp, lanes side by side read pixels side by side, and rows side by side are written
into one stretch of memory a channel, so both ends are coalesced though the order changes between them. A thread takes two columns:
with more, as their output would allow, its lanes would read from as many lines of pixels as a warp has rows. Memory limits it if the
arithmetic stays short: the normalisation is one multiplication and addition a byte, within 1e-6 of the reference's two divisions.
Tail: rows beyond the last and columns beyond p are masked; a row without pixels is stored as zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfx.device import DTYPES

ROWS = 64


def pack_patches(
    pixels: Tensor,
    offsets: Tensor,
    row_stride: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: str,
) -> Tensor:
    """As the contract."""
    (patches, times), p = offsets.shape, patch_size
    out = torch.empty((patches, 3 * times * p * p), dtype=DTYPES[dtype], device=pixels.device)
    if out.numel():
        rows = patches * times * p
        _kernel[(triton.cdiv(rows, ROWS),)](
            pixels.contiguous(), offsets.contiguous(), row_stride.contiguous(), out, rows, pixels.shape[0],
            *(1 / (255 * s) for s in std), *(-m / s for m, s in zip(mean, std, strict=True)),
            P=p, TIMES=times, ROWS=ROWS, COLS=triton.next_power_of_2(p), num_warps=4,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows", "num_bytes"])
def _kernel(
    pixels, offsets, row_stride, out, num_rows, num_bytes, scale_0, scale_1, scale_2, shift_0, shift_1, shift_2,
    P: tl.constexpr, TIMES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
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
    red = normalized(at, inside, scale_0, shift_0)
    green = normalized(at + 1, inside, scale_1, shift_1)
    blue = normalized(at + 2, inside, scale_2, shift_2)

    to = patch.to(tl.int64) * (3 * TIMES * P * P) + time * (P * P) + within * P
    to = out + tl.max_contiguous(to[:, None] + cols, (1, min(COLS, 2)))
    stored = is_row[:, None] & (cols < P)
    tl.store(to, red.to(out.dtype.element_ty), mask=stored)
    tl.store(to + TIMES * P * P, green.to(out.dtype.element_ty), mask=stored)
    tl.store(to + 2 * TIMES * P * P, blue.to(out.dtype.element_ty), mask=stored)


@triton.jit
def normalized(at, inside, scale, shift):
    """The bytes at these pointers as scale·x + shift, 0 where not inside."""
    x = tl.load(at, mask=inside, other=0).to(tl.float32)
    return tl.where(inside, tl.fma(x, scale, shift), 0.0)
