"""Qwen2-VL's images, videos and positions: any resolution, patches in 2 × 2 blocks, three position rows.

Source: huggingface/transformers: models/qwen2_vl/{image_processing,video_processing,modeling}_qwen2_vl.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmfx.errors import InvalidRequest, shown
from vlmfx.models.qwen2_vl import Qwen2VLConfig
from vlmfx.models.validate import PREPROCESSOR, positive_int, refuse, section, supported
from vlmfx.models.vision_inputs import VisionInputs, concat, cumulative
from vlmfx.ops.pack_patches import by_block, patch_offsets
from vlmfx.processing.embeds import integer_table, joined, rows_of
from vlmfx.processing.images import FIELD, MAX_PIXELS
from vlmfx.processing.inputs import Expanded, Layouts, MediaLayout, check_ratio, expand_tokens
from vlmfx.processing.pixels import STEPS, pixel_settings
from vlmfx.processing.resize import resize
from vlmfx.processing.tokenizer import Tokenizer
from vlmfx.processing.video import FIELD as VIDEO_FIELD
from vlmfx.processing.video import VideoPlan

PLACEHOLDERS = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}
REQUEST_SETTINGS = {"min_pixels": range(1, MAX_PIXELS + 1), "max_pixels": range(1, MAX_PIXELS + 1)}
MAX_ASPECT_RATIO = 200
VIDEO_PREPROCESSOR = "video_preprocessor_config.json"


@dataclass(frozen=True, kw_only=True)
class Qwen2VLProcessing:
    """min_pixels and max_pixels bound the area an image is resized to; a request may set both in mm_processor_kwargs.

    video_pixels: the same of a video's frame, where the checkpoint has limits of their own for them."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    hidden_size: int
    image_token_id: int
    video_token_id: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = Image.Resampling.BICUBIC
    video_pixels: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.min_pixels > self.max_pixels:
            raise InvalidRequest(
                "mm_processor_kwargs",
                f"min_pixels is {self.min_pixels} but max_pixels {self.max_pixels}; make min_pixels the smaller.",
                found=(self.min_pixels, self.max_pixels),
            )


def config(preprocessor: dict[str, Any], model: Qwen2VLConfig, tokenizer: Tokenizer) -> Qwen2VLProcessing:
    """The processing of a preprocessor_config.json."""
    return Qwen2VLProcessing(**settings(preprocessor, model))


def settings(
    preprocessor: dict[str, Any], model: Qwen2VLConfig, video_areas: tuple[int, int] = (128 * 784, 768 * 784)
) -> dict[str, Any]:
    """The fields of Qwen2VLProcessing, checked; newer files keep the two areas in `size`. video_areas: a video processor's own defaults."""
    vision = model.vision
    patches: dict[str, Any] = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.merge_size,
    }
    supported(preprocessor, {**STEPS, **patches}, file=PREPROCESSOR)
    least, most = _areas(preprocessor, (56 * 56, 28 * 28 * 1280))
    video = section(preprocessor, "video_processor", optional=True, file=PREPROCESSOR)
    supported(video, {**STEPS, **patches}, file=VIDEO_PREPROCESSOR)
    if pixel_settings({**preprocessor, **video}) != pixel_settings(preprocessor):
        refuse("image_mean, image_std or resample", video, f"the same as in {PREPROCESSOR}", file=VIDEO_PREPROCESSOR)
    return {
        **patches,
        "min_pixels": least,
        "max_pixels": most,
        "hidden_size": model.text.hidden_size,
        "image_token_id": model.image_token_id,
        "video_token_id": model.video_token_id,
        "video_pixels": _areas(video, video_areas, VIDEO_PREPROCESSOR) if video else None,
        **pixel_settings(preprocessor),
    }


def _areas(preprocessor: dict[str, Any], default: tuple[int, int], file: str = PREPROCESSOR) -> tuple[int, int]:
    """The least and the most pixels: of each the first of its two keys that is set, else the default."""
    size = section(preprocessor, "size", optional=True, file=file)
    areas = []
    for key, size_key, area in (
        ("min_pixels", "shortest_edge", default[0]),
        ("max_pixels", "longest_edge", default[1]),
    ):
        given = {key: preprocessor.get(key), f"{key} (size.{size_key})": size.get(size_key)}
        found = next(((name, value) for name, value in given.items() if value is not None), (key, area))
        areas.append(positive_int(*found, file=file))
    least, most = areas
    if least > most:
        refuse("min_pixels", least, f"max_pixels, {most}, or less", file=file)
    return least, most


def request_config(cfg: Qwen2VLProcessing, **settings: Any) -> Qwen2VLProcessing:
    """cfg with a request's settings, which hold for its images and its videos."""
    low, high = cfg.video_pixels or (cfg.min_pixels, cfg.max_pixels)
    pixels = (settings.get("min_pixels", low), settings.get("max_pixels", high))
    return replace(cfg, video_pixels=cfg.video_pixels and pixels, **settings)


def smart_resize(cfg: Qwen2VLProcessing, height: int, width: int, field: str = FIELD) -> tuple[int, int]:
    """(height, width) with sides that are multiples of a merged patch and an area within the limits, the ratio about kept.

    Raises InvalidRequest for an aspect ratio over 200."""
    check_ratio(height, width, MAX_ASPECT_RATIO, field)
    factor = cfg.patch_size * cfg.merge_size
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > cfg.max_pixels:
        beta = math.sqrt(height * width / cfg.max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < cfg.min_pixels:
        beta = math.sqrt(cfg.min_pixels / (height * width))
        new_height, new_width = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return new_height, new_width


def layout(cfg: Qwen2VLProcessing, size: tuple[int, int]) -> MediaLayout:
    """The layout of an image of (height, width), from its size alone."""
    height, width = (side // cfg.patch_size for side in smart_resize(cfg, *size))
    return layout_of_grid(cfg, (1, height, width))


def video_layout(cfg: Qwen2VLProcessing, plan: VideoPlan) -> MediaLayout:
    """The layout of a video, from its plan alone; an odd number of frames counts as one more."""
    return layout_of_frames(cfg, plan, frame_size(cfg, plan))


def layout_of_frames(cfg: Qwen2VLProcessing, plan: VideoPlan, size: tuple[int, int]) -> MediaLayout:
    """The layout of a video whose frames are resized to (height, width)."""
    height, width = (side // cfg.patch_size for side in size)
    return layout_of_grid(cfg, (-(-plan.num_frames // cfg.temporal_patch_size), height, width))


def frame_size(cfg: Qwen2VLProcessing, plan: VideoPlan) -> tuple[int, int]:
    """(height, width) that a video's frames are resized to."""
    if cfg.video_pixels is not None:
        cfg = replace(cfg, min_pixels=cfg.video_pixels[0], max_pixels=cfg.video_pixels[1])
    return smart_resize(cfg, plan.height, plan.width, VIDEO_FIELD)


def layout_of_grid(cfg: Qwen2VLProcessing, grid_thw: tuple[int, int, int]) -> MediaLayout:
    """The layout of a grid of patches (time, height, width)."""
    t, height, width = grid_thw
    merged = (t, height // cfg.merge_size, width // cfg.merge_size)
    return MediaLayout(num_rows=math.prod(merged), grid=merged)


def vision_inputs(cfg: Qwen2VLProcessing, images: Iterable[Image.Image]) -> VisionInputs:
    """RGB images → their pixels and patches, one segment an image; a still image fills its temporal patch with copies."""
    return concat([*map(partial(image_inputs, cfg), images)])


def image_inputs(cfg: Qwen2VLProcessing, image: Image.Image) -> VisionInputs:
    """`vision_inputs` of one image."""
    pixels = resize(image, *smart_resize(cfg, image.height, image.width), cfg.resample)
    return _inputs(cfg, pixels[None])


def video_inputs(cfg: Qwen2VLProcessing, plan: VideoPlan, frames: Iterable[Image.Image]) -> VisionInputs:
    """A video's RGB frames → their pixels and patches, one segment a temporal patch; the last frame fills the last of them."""
    return inputs_of_frames(cfg, plan, frames, frame_size(cfg, plan))


def inputs_of_frames(
    cfg: Qwen2VLProcessing, plan: VideoPlan, frames: Iterable[Image.Image], size: tuple[int, int]
) -> VisionInputs:
    """`video_inputs` with frames resized to (height, width)."""
    pixels = torch.empty(plan.num_frames, *size, 3, dtype=torch.uint8)
    for i, frame in enumerate(frames):
        pixels[i] = resize(frame, *size, cfg.resample)
    return _inputs(cfg, pixels)


def _inputs(cfg: Qwen2VLProcessing, frames: Tensor) -> VisionInputs:
    """frames (n, height, width, 3) uint8 of one image or video, already resized → their patches, a segment for each T frames."""
    num_frames, height, width, _ = frames.shape
    offsets, row_stride = patch_offsets(
        [(num_frames, height, width)], cfg.patch_size, cfg.temporal_patch_size, cfg.merge_size
    )
    ids = patch_positions(height // cfg.patch_size, width // cfg.patch_size, cfg.merge_size)
    num_segments = len(offsets) // len(ids)
    return VisionInputs(
        pixels=frames.flatten(),
        patch_offsets=offsets,
        row_stride=row_stride,
        position_ids=ids.repeat(num_segments, 1),
        cu_seqlens=cumulative([len(ids)] * num_segments),
        mean=cfg.mean,
        std=cfg.std,
    )


def patch_positions(height: int, width: int, merge_size: int) -> Tensor:
    """(height·width, 2) int64 row and column of each patch, in merge-block order."""
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return by_block(torch.stack((rows, cols), -1), merge_size)


def embed_inputs(cfg: Qwen2VLProcessing, value: Any) -> tuple[Tensor, list[MediaLayout]]:
    """{"image_embeds": rows, "image_grid_thw": (n, 3)}, or a list of such → rows and layouts.

    The grid gives both the number of rows and their positions."""
    return joined(value, partial(_embed_inputs, cfg))


def _embed_inputs(cfg: Qwen2VLProcessing, value: Any) -> tuple[Tensor, list[MediaLayout]]:
    if not isinstance(value, dict) or "image_grid_thw" not in value or "image_embeds" not in value:
        raise InvalidRequest(
            "multi_modal_data.image",
            'embeddings came without their grid; pass {"image_embeds": rows, "image_grid_thw": grid}.',
        )
    rows = rows_of(value["image_embeds"], cfg.hidden_size)
    grids = _grids(cfg, value["image_grid_thw"])
    layouts = [layout_of_grid(cfg, grid) for grid in grids]
    expected = sum(item.num_rows for item in layouts)
    if expected != len(rows):
        raise InvalidRequest(
            "multi_modal_data.image.image_embeds",
            f"it has {len(rows)} rows but image_grid_thw {grids} asks for {expected}; pass the grid of these images.",
            found=len(rows),
            expected=expected,
        )
    return rows, layouts


def _grids(cfg: Qwen2VLProcessing, value: Any) -> list[tuple[int, int, int]]:
    """(time, height, width) in patches of each image. Raises InvalidRequest for what is no such table."""
    rows = [(t, height, width) for t, height, width in integer_table(value, columns=3)]
    if not rows:
        raise InvalidRequest(
            "multi_modal_data.image.image_grid_thw",
            f"it is {shown(value)}, expected integers of shape (images, 3); "
            "give time, height and width of each image in patches.",
            found=value,
        )
    for grid in rows:
        if min(grid) < 1 or grid[1] % cfg.merge_size or grid[2] % cfg.merge_size:
            raise InvalidRequest(
                "multi_modal_data.image.image_grid_thw",
                f"it holds {list(grid)}, expected time ≥ 1 and positive multiples of {cfg.merge_size} for height and "
                "width; count patches before merging.",
                found=grid,
            )
    return rows


def expand(cfg: Qwen2VLProcessing, tokenizer: Tokenizer, prompt: str | list[int], layouts: Layouts) -> Expanded:
    """The prompt with the token of each image and video repeated. Raises InvalidRequest when they differ in number from those."""
    ids = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt
    return expand_tokens(ids, {"image": cfg.image_token_id, "video": cfg.video_token_id}, layouts)


def frame_times(item: MediaLayout) -> Tensor:
    """The time of each frame of an image or video: its number."""
    return torch.arange(item.grid[0])


def positions(
    cfg: Qwen2VLProcessing,
    ids: Sequence[int],
    layouts: Layouts,
    times: Callable[[MediaLayout], Tensor] = frame_times,
) -> tuple[Tensor, int]:
    """M-RoPE positions (3, L) of expanded ids, and the position of the next token.

    Text counts up equally on all three rows. An image or video that starts at s has s + its frame's time, s + row, s + column;
    what follows starts one after the largest position so far."""
    parts: list[Tensor] = []
    at, start = 0, 0
    remaining = {
        cfg.image_token_id: iter(layouts.get("image", ())),
        cfg.video_token_id: iter(layouts.get("video", ())),
    }
    while at < len(ids):
        if ids[at] in remaining:
            item = next(remaining[ids[at]])
            grid = torch.meshgrid(times(item), *(torch.arange(n) for n in item.grid[1:]), indexing="ij")
            place = torch.stack([axis.flatten() for axis in grid]) + start
            parts.append(place)
            at, start = at + item.num_rows, int(place.max()) + 1
        else:
            end = at
            while end < len(ids) and ids[end] not in remaining:
                end += 1
            parts.append(torch.arange(start, start + end - at).expand(3, -1))
            at, start = end, start + end - at
    return torch.cat(parts, 1), start
