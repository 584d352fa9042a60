"""VisionInputs: the pixels of one encode call, as processing hands them to a family's `encode`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfx.ops.pack_patches import pack_patches
from vlmfx.tree import node, tree_map


@node("mean", "std")
@dataclass(frozen=True, kw_only=True)
class VisionInputs:
    """Pixels of one or more images or videos, and what the family's tower must know of where their P patches lie.

    pixels (N,) uint8: frames, each (height, width, 3), one after another; patch_offsets (P, T) int64 and row_stride (P,) int32 say
    where in them each patch is, as `pack_patches` takes them. Where these are None, pixels (P, 3·T·p·p) float32 are patches that are
    packed and normalised already. position_ids (P, n) int64: row and column in most families, n = 0 for towers with learned positions.
    cu_seqlens (segments + 1,) int32: the patches of segments, within which attention stays; cu_window_seqlens those of the smaller
    segments of windowed layers. mean and std by channel, of pixels scaled to 0..1. position_weights (P, m) float32: shares of m learned
    positions in a patch's own. row_index (F,) int64: which projected row each feature row is, counted within this object; negative
    ones are the family's separators."""

    pixels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch_offsets: Tensor | None = None
    row_stride: Tensor | None = None
    cu_window_seqlens: Tensor | None = None
    position_weights: Tensor | None = None
    row_index: Tensor | None = None

    @property
    def num_segments(self) -> int:
        return len(self.cu_seqlens) - 1

    def to(self, device: torch.device) -> VisionInputs:
        """The same inputs on a device."""
        moved: VisionInputs = tree_map(lambda t: None if t is None else t.to(device), self)
        return moved

    def patches(self, patch_size: int, dtype: torch.dtype) -> Tensor:
        """(P, 3·T·p·p) normalised, in float32 and then rounded to dtype."""
        if self.patch_offsets is None or self.row_stride is None:
            return self.pixels.to(dtype)
        made = torch.float32 if dtype == torch.float64 else dtype  # which the op does not make
        args = self.patch_offsets, self.row_stride, patch_size, self.mean, self.std, made
        return pack_patches(self.pixels, *args).to(dtype)


def cumulative(lengths: Iterable[int]) -> Tensor:
    """cu_seqlens (n + 1,) int32, from 0, of n lengths."""
    return F.pad(torch.tensor([*lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))


def concat(inputs: Sequence[VisionInputs]) -> VisionInputs:
    """One VisionInputs of several of the same family, in order."""
    if len(inputs) == 1:
        return inputs[0]
    # Every projected row is used, so the largest index tells how many there are.
    num_rows = [0 if i.row_index is None else int(i.row_index.max()) + 1 for i in inputs]
    return replace(
        inputs[0],
        pixels=torch.cat([i.pixels for i in inputs]),
        position_ids=torch.cat([i.position_ids for i in inputs]),
        cu_seqlens=cumulative(n for i in inputs for n in i.cu_seqlens.diff().tolist()),
        patch_offsets=_joined([i.patch_offsets for i in inputs], [len(i.pixels) for i in inputs]),
        row_stride=_joined([i.row_stride for i in inputs]),
        cu_window_seqlens=None
        if inputs[0].cu_window_seqlens is None
        else cumulative(
            n for i in inputs if i.cu_window_seqlens is not None for n in i.cu_window_seqlens.diff().tolist()
        ),
        position_weights=_joined([i.position_weights for i in inputs]),
        row_index=_joined([i.row_index for i in inputs], num_rows),
    )


def _joined(parts: Sequence[Tensor | None], sizes: Sequence[int] | None = None) -> Tensor | None:
    """The parts as one, None where they are; with sizes, each counts on from the sizes before it, but for negative numbers."""
    present = [part for part in parts if part is not None]
    if len(present) < len(parts):
        return None
    if sizes is not None:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        present = [torch.where(part >= 0, part + start, part) for part, start in zip(present, starts, strict=True)]
    return torch.cat(present)
