"""What one request becomes before the engine sees it, and how placeholders in its ids grow to the rows of its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfx.errors import InvalidRequest
from vlmfx.models.vision_inputs import VisionInputs


@dataclass(frozen=True, kw_only=True)
class ImageLayout:
    """How one image lies in the prompt: rows of features, and its (time, height, width) grid of rows for the position ids."""

    num_rows: int
    grid: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """One request, ready for the model.

    token_ids: the prompt with placeholders expanded. positions: (L,) or (3, L) int64; next_position is that of the first new token.
    feature_index: (L,) int64, the row of this request's features that replaces a placeholder, −1 for text. Features come from
    `vision` (to be encoded) or from `embeds` (rows, hidden), or there are none."""

    prompt: str | None
    token_ids: list[int]
    positions: Tensor
    next_position: int
    feature_index: Tensor
    vision: VisionInputs | None = None
    embeds: Tensor | None = None


def expand_placeholders(ids: Sequence[int], token_id: int, layouts: Sequence[ImageLayout]) -> list[int]:
    """ids with the i-th placeholder token repeated layouts[i].num_rows times; ids that are expanded already pass as they are.

    Raises InvalidRequest when placeholders and images differ in number."""
    if len(ids) == expanded_length(ids, token_id, layouts):
        return list(ids)
    out: list[int] = []
    remaining = iter(layouts)
    for token in ids:
        out.extend([token] * next(remaining).num_rows if token == token_id else [token])
    return out


def expanded_length(ids: Sequence[int], token_id: int, layouts: Sequence[ImageLayout]) -> int:
    """len(expand_placeholders(...)), which may be too long to be made. Raises InvalidRequest as that does."""
    if _are_expanded(ids, token_id, layouts):
        return len(ids)
    count = ids.count(token_id)
    if count != len(layouts):
        raise InvalidRequest(
            "prompt",
            f"it has {count} image placeholder{'s' * (count != 1)} but {len(layouts)} "
            f"image{'s were' if len(layouts) != 1 else ' was'} given; "
            + (
                "add an image or remove a placeholder."
                if count > len(layouts)
                else "add a placeholder or remove an image."
            ),
            found=count,
            expected=len(layouts),
        )
    return len(ids) + sum(layout.num_rows - 1 for layout in layouts)


def _are_expanded(ids: Sequence[int], token_id: int, layouts: Sequence[ImageLayout]) -> bool:
    """Whether every run of token_id holds the rows of whole images, which may touch."""
    remaining = [layout.num_rows for layout in reversed(layouts)]
    for run in _runs(ids, token_id):
        while run > 0 and remaining:
            run -= remaining.pop()
        if run:
            return False
    return not remaining


def _runs(ids: Sequence[int], token_id: int) -> list[int]:
    """Lengths of the runs of token_id."""
    runs, length = [], 0
    for token in [*ids, None]:
        if token == token_id:
            length += 1
        elif length:
            runs.append(length)
            length = 0
    return runs


def index_features(ids: Sequence[int], token_id: int) -> Tensor:
    """(L,) int64: 0, 1, 2, ... on the placeholder tokens in order, −1 elsewhere."""
    is_image = torch.tensor(ids, dtype=torch.int64) == token_id
    return torch.where(is_image, is_image.cumsum(0) - 1, -1)
