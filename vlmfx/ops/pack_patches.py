"""Patches: pixels of any number of pictures, cut into the rows that a patch embedding multiplies, and normalised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmfx.device import DTYPES
from vlmfx.ops.registry import Cost, nbytes, refuse, register

CHANNELS = 3


def pack_patches(
    pixels: Tensor,
    offsets: Tensor,
    row_stride: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype | str,
) -> Tensor:
    """pixels (N,) uint8 → (P, 3·T·p·p) of dtype (or its name), (x/255 − mean)/std by channel, in float32 and then rounded.

    pixels holds pictures, each (height, width, 3). offsets (P, T) int64 says where in pixels patch p begins at time t, −1 for a part
    that is zero; row_stride (P,) int32, the bytes from one row of its picture to the next. `patch_offsets` makes both. Inside a row:
    channel, time, row, column, the order of a Conv3d weight. Raises ShapeError; a patch that ends beyond pixels is an error on the CPU
    and, on a GPU, in Triton's debug mode only."""
    return OP(pixels, offsets, row_stride, patch_size, list(mean), list(std), str(dtype).removeprefix("torch."))


def patch_offsets(
    sizes: Sequence[tuple[int, int, int]], patch_size: int, temporal_patch_size: int = 1, merge_size: int = 1
) -> tuple[Tensor, Tensor]:
    """offsets (P, T) int64 and row_stride (P,) int32 of pictures that lie one after another, each (frames, height, width, 3).

    sizes are (frames, height, width), multiples of patch_size·merge_size; where T does not divide frames the last frame is repeated.
    Patches go by picture, T frames, block of merge_size × merge_size patches, and within a block by row; merge_size 1 is raster order.
    Source of the block order: huggingface/transformers: src/transformers/models/qwen2_vl/image_processing_qwen2_vl.py."""
    offsets, strides, start = [], [], 0
    for frames, height, width in sizes:
        step = patch_size * merge_size
        if height % step or width % step:
            refuse("patch_offsets", "sizes", f"a height and width of {(height, width)}", f"multiples of {step}")
        row_bytes = width * CHANNELS
        first = torch.arange(0, frames, temporal_patch_size)
        frame = (first[:, None] + torch.arange(temporal_patch_size)).clamp(max=frames - 1)  # (groups, T)
        rows, cols = torch.arange(height // patch_size), torch.arange(width // patch_size)
        corner = rows[:, None] * (patch_size * row_bytes) + cols * (patch_size * CHANNELS)
        at = (
            start + by_block(corner, merge_size)[None, :, None] + frame[:, None] * (height * row_bytes)
        )  # (groups, patches, T)
        offsets.append(at.flatten(0, 1))
        strides.append(torch.full((at.shape[0] * at.shape[1],), row_bytes, dtype=torch.int32))
        start += frames * height * row_bytes
    if not offsets:
        return torch.empty(0, temporal_patch_size, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
    return torch.cat(offsets), torch.cat(strides)


def by_block(grid: Tensor, merge_size: int) -> Tensor:
    """grid (rows, cols, ...) → (rows·cols, ...), block of merge_size × merge_size after block, and within a block by row."""
    blocks = grid.unflatten(1, (-1, merge_size)).unflatten(0, (-1, merge_size)).transpose(1, 2)
    return blocks.flatten(0, 3)


def reference(
    pixels: Tensor,
    offsets: Tensor,
    row_stride: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: str,
) -> Tensor:
    """The definition of right, and the CPU kernel: the 3·p bytes of a patch's row are gathered as one."""
    (patches, times), p, width = offsets.shape, patch_size, CHANNELS * patch_size
    if pixels.shape[0] < width:  # no patch fits
        return pixels.new_zeros(patches, CHANNELS * times * p * p, dtype=DTYPES[dtype])
    is_live = offsets >= 0
    below = row_stride.long()[:, None, None] * torch.arange(p, device=pixels.device)
    at = torch.where(is_live[..., None], offsets[..., None] + below, 0)  # (P, T, p)
    rows = pixels.unfold(0, width, 1).index_select(0, at.flatten()).view(patches, times, p, p, CHANNELS)
    x = rows.permute(0, 4, 1, 2, 3).reshape(patches, CHANNELS, times * p * p).contiguous().float()
    mean_t, std_t = (torch.tensor(v, device=x.device)[:, None] for v in (mean, std))
    x = x.div_(255).sub_(mean_t).div_(std_t).view(patches, CHANNELS, times, p * p)
    return x.mul_(is_live[:, None, :, None]).flatten(1).to(DTYPES[dtype])


def fake(
    pixels: Tensor,
    offsets: Tensor,
    row_stride: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: str,
) -> Tensor:
    return pixels.new_empty(offsets.shape[0], CHANNELS * offsets.shape[1] * patch_size**2, dtype=DTYPES[dtype])


def check(
    pixels: Tensor,
    offsets: Tensor,
    row_stride: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: str,
) -> None:
    """Raise ShapeError for what the kernels do not take."""
    if pixels.dim() != 1:
        refuse("pack_patches", "pixels", pixels.shape, "shape (bytes,), all pictures as one")
    if offsets.dim() != 2:
        refuse("pack_patches", "offsets", offsets.shape, "shape (patches, times)")
    if row_stride.shape != offsets.shape[:1]:
        refuse("pack_patches", "row_stride", row_stride.shape, f"shape ({offsets.shape[0]},), the first of offsets")
    expected = {
        "pixels": (pixels, torch.uint8),
        "offsets": (offsets, torch.int64),
        "row_stride": (row_stride, torch.int32),
    }
    for name, (numbers, right) in expected.items():
        if numbers.dtype != right:
            refuse("pack_patches", name, numbers.dtype, f"{right}")
    for name, constants in (("mean", mean), ("std", std)):
        if len(constants) != CHANNELS:
            refuse("pack_patches", name, f"{len(constants)} numbers", f"{CHANNELS}, one a channel")
    if patch_size < 1:
        refuse("pack_patches", "patch_size", patch_size, "1 or more")
    if dtype not in DTYPES:
        refuse("pack_patches", "dtype", dtype, f"one of {', '.join(DTYPES)}")


def cost(
    pixels: Tensor,
    offsets: Tensor,
    row_stride: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: str,
) -> Cost:
    """As if every patch were read."""
    elements = offsets.numel() * CHANNELS * patch_size**2
    return Cost(flops=3 * elements, bytes=elements * (1 + DTYPES[dtype].itemsize) + nbytes(offsets, row_stride))


OP = register(
    # The dtype by name: torch 2.11 hands a ScalarType on as another one from inside an ahead-of-time package.
    "pack_patches(Tensor pixels, Tensor offsets, Tensor row_stride, int patch_size, float[] mean, float[] std, str dtype) -> Tensor",
    reference=reference,
    fake=fake,
    check=check,
    cost=cost,
    kernels={"cuda": "triton.pack_patches"},
    tolerance={torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
    is_inline=True,
)
