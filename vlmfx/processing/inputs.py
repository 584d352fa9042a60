"""What one request becomes before the engine sees it, and how placeholders in its ids grow to the rows of its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfx.errors import InvalidRequest
from vlmfx.models.vision_inputs import VisionInputs, concat


@dataclass(frozen=True, kw_only=True)
class MediaLayout:
    """How one image or video lies in the prompt: rows of features, and its (time, height, width) grid of rows for the position ids.

    A family whose prompt or positions need more than that extends it."""

    num_rows: int
    grid: tuple[int, int, int]


# "image" and "video" → the layouts of a request's images and videos, in order. Feature rows are the images', then the videos'.
Layouts = Mapping[str, Sequence[MediaLayout]]


@dataclass(frozen=True, kw_only=True)
class Expanded:
    """A prompt with room for its features: ids, and for each (L,) int64 the feature row that replaces it, −1 for text."""

    token_ids: list[int]
    feature_index: Tensor


@dataclass(frozen=True, kw_only=True)
class MediaItem:
    """An image or a video of a request: what is to be encoded, and the feature rows it becomes."""

    num_rows: int
    vision: VisionInputs


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """One request, ready for the model.

    token_ids: the prompt with placeholders expanded. positions: (L,) or (3, L) int64; next_position is that of the first new token.
    feature_index: (L,) int64, the row of this request's features that replaces a placeholder, −1 for text. Its num_features rows come
    from `media` in order (to be encoded) or from `embeds` (rows, hidden), or there are none."""

    prompt: str | None
    token_ids: list[int]
    positions: Tensor
    next_position: int
    feature_index: Tensor
    num_features: int
    media: tuple[MediaItem, ...] = ()
    embeds: Tensor | None = None

    @property
    def vision(self) -> VisionInputs | None:
        """All media as the inputs of one call of encode, None where there are none."""
        return concat([item.vision for item in self.media]) if self.media else None


def expand_tokens(ids: Sequence[int], token_ids: Mapping[str, int], layouts: Layouts) -> Expanded:
    """The expansion of a family in which one token of the prompt, token_ids[modality], stands for an image or a video.

    Raises InvalidRequest when placeholders and images, or videos, differ in number."""
    for modality, token_id in token_ids.items():
        ids = expand_placeholders(ids, token_id, layouts.get(modality, ()), modality)
    index, start = torch.full((len(ids),), -1), 0
    for modality, token_id in token_ids.items():
        rows = index_features(ids, token_id)
        index = torch.where(rows >= 0, rows + start, index)
        start += num_rows(layouts.get(modality, ()))
    return Expanded(token_ids=list(ids), feature_index=index)


def plain_positions(cfg: object, ids: Sequence[int], layouts: Layouts) -> tuple[Tensor, int]:
    """The positions 0..L−1 (L,) of a family whose images count as their tokens, and the position of the next token."""
    return torch.arange(len(ids)), len(ids)


def check_ratio(height: int, width: int, most: int, field: str) -> None:
    """Raise InvalidRequest for an image or a frame whose longer side is over `most` times the shorter one."""
    long, short = max(height, width), min(height, width)
    if long > most * short:
        raise InvalidRequest(
            field,
            f"its sides are {width} x {height}, a ratio over {most}; crop it to the part you ask about.",
            found=long / short,
            expected=most,
        )


def num_rows(layouts: Sequence[MediaLayout]) -> int:
    """Feature rows of several images or videos."""
    return sum(layout.num_rows for layout in layouts)


def expand_placeholders(
    ids: Sequence[int], token_id: int, layouts: Sequence[MediaLayout], modality: str = "image"
) -> list[int]:
    """ids with the i-th placeholder token repeated layouts[i].num_rows times; ids that are expanded already pass as they are.

    Raises InvalidRequest when placeholders and images differ in number."""
    if _are_expanded(ids, token_id, layouts):
        return list(ids)
    check_count(ids.count(token_id), len(layouts), modality)
    out: list[int] = []
    remaining = iter(layouts)
    for token in ids:
        out.extend([token] * next(remaining).num_rows if token == token_id else [token])
    return out


def check_count(found: int, given: int, modality: str) -> None:
    """Raise InvalidRequest where a prompt's placeholders are not as many as the images or videos that came with it."""
    if found != given:
        raise InvalidRequest(
            "prompt",
            f"it has {found} {modality} placeholder{'s' * (found != 1)} but {given} {modality}"
            f"{'s were' if given != 1 else ' was'} given; "
            + (
                f"add {'an image' if modality == 'image' else 'a video'} or remove a placeholder."
                if found > given
                else f"add a placeholder or remove {'an image' if modality == 'image' else 'a video'}."
            ),
            found=found,
            expected=given,
        )


def _are_expanded(ids: Sequence[int], token_id: int, layouts: Sequence[MediaLayout]) -> bool:
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
