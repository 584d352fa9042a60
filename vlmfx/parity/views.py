"""Packed patches, hidden states and rows in the shapes and under the names that each family's reference has: a function a family.

A family that is not in the tables shows its rows as they are packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfx.checkpoint import Model
from vlmfx.models import siglip
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.processing.inputs import ModelInputs

Values = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the tower makes of a request's pixels, packed: normalised patches, hidden states before the projector, feature rows."""

    pixels: Tensor
    hidden: Tensor
    rows: Tensor


def see(model: Model, vision: VisionInputs, taps: Mapping[str, Tensor]) -> Seen:
    """The patches, and what the tower made of them among the taps of their prompt."""
    pixels = vision.to(model.device).patches(model.config.vision.patch_size, torch.float32)
    return Seen(pixels=pixels, hidden=taps["vision"], rows=taps["projected"])


def plain_ids(model: Model, inputs: ModelInputs) -> Values:
    """The prompt with placeholders expanded, (1, L)."""
    yield "input_ids", torch.tensor([inputs.token_ids])


def packed(model: Model, inputs: ModelInputs, vision: VisionInputs, seen: Seen, kind: str = "image") -> Values:
    """Rows as they are packed, image after image."""
    yield "pixel_values" + "_videos" * (kind == "video"), seen.pixels
    yield f"{kind}_vision_hidden", seen.hidden
    yield f"{kind}_embeds", seen.rows


def _squares(pixels: Tensor, patch: int, side: int) -> Tensor:
    """Patches of square images → (n, 3, side·patch, side·patch)."""
    grid = pixels.view(-1, side, side, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, 3, side * patch, side * patch)


def llava(model: Model, inputs: ModelInputs, vision: VisionInputs, seen: Seen) -> Values:
    """Square images and their rows, by image."""
    n, tower = vision.num_segments, model.config.vision
    yield "pixel_values", _squares(seen.pixels, tower.patch_size, tower.image_size // tower.patch_size)
    yield "vision_selected_hidden", seen.hidden.unflatten(0, (n, -1))
    yield "image_embeds", seen.rows.unflatten(0, (n, -1))


def qwen2_vl(model: Model, inputs: ModelInputs, vision: VisionInputs, seen: Seen) -> Values:
    """Packed rows, and the grids that the positions of segments span: a segment's last patch lies in its lower right corner.

    One video alone is shown under a video's names; beside images its rows are the last. Patches that go through the tower window by
    window (Qwen2.5-VL) are shown as the image has them, wide rows (Qwen3-VL) apart: the merger's, then those of deepstack's. Hidden
    states stay in the tower's order, as the references show them."""
    ends = vision.cu_seqlens[1:].long() - 1
    grids = torch.cat([torch.ones(len(ends), 1, dtype=torch.int64), vision.position_ids[ends, :2] + 1], 1)
    ids = set(inputs.token_ids)
    pixels = seen.pixels
    if vision.row_index is not None:
        blocks = pixels.unflatten(0, (-1, model.config.vision.merge_size**2))
        pixels = blocks[vision.row_index.to(pixels.device)].flatten(0, 1)
    hidden = seen.hidden[:, : model.config.vision.hidden_size]
    rows, *deepstack = seen.rows.split(model.config.text.hidden_size, -1)
    kind = "image"
    if model.config.video_token_id in ids and model.config.image_token_id not in ids:
        kind, grids = "video", grids[:1] * torch.tensor([len(ends), 1, 1])
    yield f"{kind}_grid_thw", grids
    yield from packed(model, inputs, vision, Seen(pixels=pixels, hidden=hidden, rows=rows), kind)
    if deepstack:
        yield "deepstack_embeds", torch.stack(deepstack)


def qwen2_vl_ids(model: Model, inputs: ModelInputs) -> Values:
    """The ids, and where the rows came ready the grid of one image, which its positions span."""
    yield from plain_ids(model, inputs)
    if inputs.embeds is not None:
        places = inputs.positions[:, inputs.feature_index >= 0]
        span = places.amax(1) - places.amin(1) + 1
        if int(span.prod()) == places.shape[1]:
            yield "image_grid_thw", (span * torch.tensor([1, *[model.config.vision.merge_size] * 2]))[None]


def _phi3_v_views(model: Model, vision: VisionInputs) -> list[tuple[int, int, int]]:
    """(feature rows, lines of crops, views) of each image, read from the order of its rows: a picture's crops end in a −1."""
    assert vision.row_index is not None
    side, start, found = model.config.crop_side, 0, []
    for end in (vision.row_index == -1).nonzero().flatten().tolist():
        stop = end + 1 + side * (side + 1)
        lines = int((vision.row_index[start:end] == -2).sum()) // side
        found.append((stop - start, lines, int((vision.row_index[start:stop] >= 0).sum()) // side**2))
        start = stop
    return found


def phi3_v_ids(model: Model, inputs: ModelInputs) -> Values:
    """The ids with −i for each row of image i, as the reference marks them."""
    ids = torch.tensor(inputs.token_ids)
    if inputs.vision is not None:
        counts = [rows for rows, _, _ in _phi3_v_views(model, inputs.vision)]
        marks = torch.arange(-1, -len(counts) - 1, -1).repeat_interleave(torch.tensor(counts))
        ids = torch.where(inputs.feature_index >= 0, marks[inputs.feature_index.clamp(min=0)], ids)
    yield "input_ids", ids[None]


def phi3_v(model: Model, inputs: ModelInputs, vision: VisionInputs, seen: Seen) -> Values:
    """The whole image and its crops (views, 3, S, S) and their rows, image by image; sizes (height, width) of the padded image."""
    tower, images = model.config.vision, _phi3_v_views(model, vision)
    side = tower.image_size // tower.patch_size
    views = [n for _, _, n in images]
    yield "image_sizes", torch.tensor([(n, (v - 1) // n) for _, n, v in images]) * tower.image_size
    pixels = _squares(seen.pixels, tower.patch_size, side).split(views)
    hidden = seen.hidden.unflatten(0, (-1, side * side)).split(views)
    rows = seen.rows.split([n for n, _, _ in images])
    for i in range(len(images)):
        yield f"image{i}.pixel_values", pixels[i]
        yield f"image{i}.vision_selected_hidden", hidden[i]
        yield f"image{i}.image_embeds", rows[i]


def minicpm_v_ids(model: Model, inputs: ModelInputs) -> Values:
    """The ids, and (slices, 2) where the rows of each image and slice begin and end."""
    yield from plain_ids(model, inputs)
    places = (inputs.feature_index >= 0).nonzero().view(-1, model.config.resampler.num_queries)
    yield "image_bound", torch.stack((places[:, 0], places[:, -1] + 1), 1)


def minicpm_v(model: Model, inputs: ModelInputs, vision: VisionInputs, seen: Seen) -> Values:
    """Each image and slice: pixels (3, p, p·patches), embedded patches, the tower's output; then all rows by slice."""
    patch = model.config.vision.patch_size
    dtype = model.params["vision"]["positions"].dtype
    embedded = siglip.embed(model.params["vision"], seen.pixels.to(dtype), vision.position_ids[:, 0].to(model.device))
    ends = vision.cu_seqlens[1:].long() - 1
    yield "tgt_sizes", vision.position_ids[ends, 1:] + 1
    slices = zip(
        *(t.split(vision.cu_seqlens.diff().tolist()) for t in (seen.pixels, embedded, seen.hidden)), strict=True
    )
    for k, (pixels, patches, hidden) in enumerate(slices):
        yield f"slice{k}.pixel_values", pixels.view(-1, 3, patch, patch).permute(1, 2, 0, 3).reshape(3, patch, -1)
        yield f"slice{k}.patch_plus_position", patches
        yield f"slice{k}.vision_hidden", hidden
    yield "image_embeds", seen.rows.unflatten(0, (vision.num_segments, -1))


VIEWS: dict[str, Callable[[Model, ModelInputs, VisionInputs, Seen], Values]] = {
    "llava": llava,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_vl,
    "qwen3_vl": qwen2_vl,
    "phi3_v": phi3_v,
    "minicpm_v": minicpm_v,
}
VIEWS_OF_IDS: dict[str, Callable[[Model, ModelInputs], Values]] = {
    "qwen2_vl": qwen2_vl_ids,
    "qwen2_5_vl": qwen2_vl_ids,
    "qwen3_vl": qwen2_vl_ids,
    "phi3_v": phi3_v_ids,
    "minicpm_v": minicpm_v_ids,
}
