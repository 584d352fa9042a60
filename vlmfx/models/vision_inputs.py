"""VisionInputs: the pixels of one encode call, as processing hands them to a family's `encode`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class VisionInputs:
    """Packed patches of one or more images.

    patches (P, C·T·p·p) uint8; position_ids (P, 2) int64 row and column, empty (P, 0) for towers with learned positions;
    seq_lens: patches of each segment, within which attention stays; mean and std by channel, of pixels scaled to 0..1."""

    patches: Tensor
    position_ids: Tensor
    seq_lens: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to(self, device: torch.device) -> VisionInputs:
        """The same inputs on a device."""
        return VisionInputs(
            patches=self.patches.to(device),
            position_ids=self.position_ids.to(device),
            seq_lens=self.seq_lens,
            mean=self.mean,
            std=self.std,
        )


def concat(inputs: Sequence[VisionInputs]) -> VisionInputs:
    """One VisionInputs of several of the same family, in order."""
    return VisionInputs(
        patches=torch.cat([i.patches for i in inputs]),
        position_ids=torch.cat([i.position_ids for i in inputs]),
        seq_lens=tuple(n for i in inputs for n in i.seq_lens),
        mean=inputs[0].mean,
        std=inputs[0].std,
    )
