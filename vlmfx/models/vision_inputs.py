"""VisionInputs: the pixels of one encode call, as processing hands them to a family's `encode`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class VisionInputs:
    """Packed patches of one or more images or videos, and what the family's tower must know of where they lie.

    patches (P, C·T·p·p): uint8, or float32 that is normalised already. position_ids (P, n) int64: row and column in most families,
    n = 0 for towers with learned positions. seq_lens: patches of each segment, within which attention stays; window_lens: those of
    the smaller segments of windowed layers. mean and std by channel, of pixels scaled to 0..1. position_weights (P, m) float32: shares
    of m learned positions in a patch's own. row_index (F,) int64: which projected row each feature row is, counted within this
    object; negative ones are the family's separators."""

    patches: Tensor
    position_ids: Tensor
    seq_lens: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    window_lens: tuple[int, ...] = ()
    position_weights: Tensor | None = None
    row_index: Tensor | None = None

    def to(self, device: torch.device) -> VisionInputs:
        """The same inputs on a device."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return VisionInputs(**values)


def concat(inputs: Sequence[VisionInputs]) -> VisionInputs:
    """One VisionInputs of several of the same family, in order."""
    first = inputs[0]
    return replace(
        first,
        patches=torch.cat([i.patches for i in inputs]),
        position_ids=torch.cat([i.position_ids for i in inputs]),
        seq_lens=tuple(n for i in inputs for n in i.seq_lens),
        window_lens=tuple(n for i in inputs for n in i.window_lens),
        position_weights=None
        if first.position_weights is None
        else torch.cat([i.position_weights for i in inputs if i.position_weights is not None]),
        row_index=None
        if first.row_index is None
        else _joined_rows([i.row_index for i in inputs if i.row_index is not None]),
    )


def _joined_rows(indices: Sequence[Tensor]) -> Tensor:
    """Indices counted from the first object on; every projected row is used, so the largest index tells how many there are."""
    joined, start = [], 0
    for index in indices:
        joined.append(torch.where(index >= 0, index + start, index))
        start += int(index.max()) + 1
    return torch.cat(joined)
