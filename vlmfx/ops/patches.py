"""Patches: images cut into the rows that a patch embedding multiplies, and their normalisation."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_patches(frames: Tensor, patch_size: int, merge_size: int = 1) -> Tensor:
    """frames (n, T, H, W, C) → (n·(H/p)·(W/p), C·T·p·p), rows ordered by merge_size × merge_size block.

    T is the temporal patch. Inside a row: channel, time, row, column, the order of a Conv3d weight. H and W are multiples of
    patch_size·merge_size. Source of the block order: huggingface/transformers: models/qwen2_vl/image_processing_qwen2_vl.py."""
    n, t, height, width, c = frames.shape
    p, m = patch_size, merge_size
    blocks = frames.reshape(n, t, height // p // m, m, p, width // p // m, m, p, c)
    return blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, c * t * p * p)


def normalize_patches(patches: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """uint8 patches (P, C·k) → (x/255 − mean)/std by channel, in float32 and then rounded to dtype; float ones are normalised already."""
    if patches.is_floating_point():
        return patches.to(dtype)
    x = patches.reshape(len(patches), len(mean), -1).float() / 255
    mean_t, std_t = (torch.tensor(v, device=x.device)[:, None] for v in (mean, std))
    return ((x - mean_t) / std_t).reshape(patches.shape).to(dtype)
