"""Qwen3-VL's images and videos: as Qwen2-VL's, with each patch's place among the tower's learned positions, and with the time of
a video's frames as text between them.

Source: huggingface/transformers: src/transformers/{vision_utils,models/qwen3_vl/{modeling,processing,video_processing}_qwen3_vl}.py."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmfx.models.qwen3_vl import Qwen3VLConfig
from vlmfx.models.vision_inputs import VisionInputs, concat
from vlmfx.processing import qwen2_vl
from vlmfx.processing.embeds import joined
from vlmfx.processing.inputs import Expanded, Layouts, MediaLayout, check_count, check_ratio
from vlmfx.processing.qwen2_vl import MAX_ASPECT_RATIO, PLACEHOLDERS, REQUEST_SETTINGS, layout
from vlmfx.processing.tokenizer import Tokenizer
from vlmfx.processing.video import FIELD as VIDEO_FIELD
from vlmfx.processing.video import VideoPlan

__all__ = ["PLACEHOLDERS", "REQUEST_SETTINGS", "layout"]

DEFAULT_FPS = 24.0  # of frames that come without, as in the reference
VIDEO_PIXELS = (128 * 32 * 32, 768 * 32 * 32)  # of all frames together, where the checkpoint gives no limits
START, PAD, END = "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"


@dataclass(frozen=True, kw_only=True)
class Qwen3VLProcessing(qwen2_vl.Qwen2VLProcessing):
    """hidden_size: the width of a feature row, text_size without its deepstack parts; positions_side: of the square of learned positions.

    video_pixels bound all frames of a video together; a request's min_pixels and max_pixels are those of its images."""

    text_size: int
    positions_side: int
    video_pixels: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Qwen3VideoLayout(MediaLayout):
    """timestamps: the second at which each temporal patch stands, the middle of its frames."""

    timestamps: tuple[float, ...]


def config(preprocessor: dict[str, Any], model: Qwen3VLConfig, tokenizer: Tokenizer) -> Qwen3VLProcessing:
    """The processing of a preprocessor_config.json."""
    settings = qwen2_vl.settings(preprocessor, model, VIDEO_PIXELS)
    settings |= {"hidden_size": model.row_size, "video_pixels": settings["video_pixels"] or VIDEO_PIXELS}
    return Qwen3VLProcessing(**settings, text_size=model.text.hidden_size, positions_side=model.vision.positions_side)


def video_layout(cfg: Qwen3VLProcessing, plan: VideoPlan) -> Qwen3VideoLayout:
    """The layout of a video, from its plan alone."""
    plain = qwen2_vl.layout_of_frames(cfg, plan, frame_size(cfg, plan))
    seconds = [index / (plan.fps or DEFAULT_FPS) for index in plan.frame_indices]
    length = cfg.temporal_patch_size
    groups = [seconds[i : i + length] for i in range(0, len(seconds), length)]
    return Qwen3VideoLayout(
        num_rows=plain.num_rows, grid=plain.grid, timestamps=tuple((group[0] + group[-1]) / 2 for group in groups)
    )


def frame_size(cfg: Qwen3VLProcessing, plan: VideoPlan) -> tuple[int, int]:
    """(height, width) that frames are resized to: multiples of a merged patch, all frames together within the limits."""
    factor, length = cfg.patch_size * cfg.merge_size, cfg.temporal_patch_size
    height, width, num_frames = plan.height, plan.width, max(plan.num_frames, length)
    if min(height, width) < factor:
        scale = factor / min(height, width)
        height, width = int(height * scale), int(width * scale)
    check_ratio(height, width, MAX_ASPECT_RATIO, VIDEO_FIELD)
    least, most = cfg.video_pixels
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    total = round(num_frames / length) * length * new_height * new_width
    if total > most:
        beta = math.sqrt(num_frames * height * width / most)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif total < least:
        beta = math.sqrt(least / (num_frames * height * width))
        new_height, new_width = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return new_height, new_width


def vision_inputs(cfg: Qwen3VLProcessing, images: Iterable[Image.Image]) -> VisionInputs:
    """RGB images → packed patches, one segment an image; position_ids are row, column and four learned positions."""
    plain = map(partial(qwen2_vl.image_inputs, cfg), images)
    return concat([with_learned_positions(cfg, inputs) for inputs in plain])


def video_inputs(cfg: Qwen3VLProcessing, plan: VideoPlan, frames: Iterable[Image.Image]) -> VisionInputs:
    """A video's RGB frames → packed patches, one segment a temporal patch."""
    inputs = qwen2_vl.inputs_of_frames(cfg, plan, frames, frame_size(cfg, plan))
    return with_learned_positions(cfg, inputs)


def with_learned_positions(cfg: Qwen3VLProcessing, inputs: VisionInputs) -> VisionInputs:
    """The inputs of one image or video with the four learned positions around each patch, and their bilinear shares.

    The square of learned positions is stretched over the image, corner on corner."""
    last = cfg.positions_side - 1
    places = inputs.position_ids.float() * last / inputs.position_ids.amax(0).clamp(min=1)
    low = places.floor().long()
    high = (low + 1).clamp(max=last)
    share = places - low
    ids, weights = [], []
    for row, row_share in ((low[:, 0], 1 - share[:, 0]), (high[:, 0], share[:, 0])):
        for col, col_share in ((low[:, 1], 1 - share[:, 1]), (high[:, 1], share[:, 1])):
            ids.append(row * cfg.positions_side + col)
            weights.append(row_share * col_share)
    return replace(
        inputs,
        position_ids=torch.cat((inputs.position_ids, torch.stack(ids, 1)), 1),
        position_weights=torch.stack(weights, 1),
    )


def embed_inputs(cfg: Qwen3VLProcessing, value: Any) -> tuple[Tensor, list[MediaLayout]]:
    """As Qwen2-VL's; rows may come without their deepstack parts, which are 0 then, as where transformers takes inputs_embeds."""
    return joined(value, partial(_embed_inputs, cfg))


def _embed_inputs(cfg: Qwen3VLProcessing, value: Any) -> tuple[Tensor, list[MediaLayout]]:
    embeds = value.get("image_embeds") if isinstance(value, dict) else None
    first = embeds[0] if isinstance(embeds, (list, tuple)) and embeds else embeds
    is_short = tuple(getattr(first, "shape", ()))[-1:] == (cfg.text_size,)
    rows, layouts = qwen2_vl.embed_inputs(replace(cfg, hidden_size=cfg.text_size) if is_short else cfg, value)
    return F.pad(rows, (0, cfg.hidden_size - rows.shape[1])), layouts


def expand(cfg: Qwen3VLProcessing, tokenizer: Tokenizer, prompt: str | list[int], layouts: Layouts) -> Expanded:
    """As Qwen2-VL's, but a video becomes "<0.3 seconds>" and a vision block for each of its temporal patches.

    They are written out before a text is tokenized, as in the reference, where "<" may join the character before it."""
    videos, frames = layouts.get("video", ()), _by_frame(layouts)
    written = ["".join(f"<{t:.1f} seconds>{START}{PAD}{END}" for t in _timestamps(video)) for video in videos]
    if isinstance(prompt, str) and prompt.count(PAD) == len(videos):
        pieces = prompt.replace(START + PAD + END, PAD).split(PAD)
        prompt = pieces[0] + "".join(block + piece for block, piece in zip(written, pieces[1:], strict=True))
    elif isinstance(prompt, list) and prompt.count(cfg.video_token_id) == len(videos):
        blocks = [tokenizer.encode(block, add_special_tokens=False) for block in written]
        prompt = _replaced(
            prompt, cfg.video_token_id, [tokenizer.token_to_id(START), tokenizer.token_to_id(END)], blocks
        )
    ids = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt
    found = ids.count(cfg.video_token_id)
    if found not in (len(frames["video"]), sum(video.num_rows for video in videos)):
        check_count(found, len(videos), "video")
    return qwen2_vl.expand(cfg, tokenizer, ids, frames)


def _replaced(ids: list[int], pad: int, around: list[int | None], blocks: list[list[int]]) -> list[int]:
    """ids with each pad, and the vision tokens around it, replaced by the next of blocks."""
    out: list[int] = []
    at, remaining = 0, iter(blocks)
    while at < len(ids):
        is_wrapped = ids[at + 1 : at + 2] == [pad] and [ids[at], *ids[at + 2 : at + 3]] == around
        if is_wrapped or ids[at] == pad:
            out.extend(next(remaining))
        else:
            out.append(ids[at])
        at += 3 if is_wrapped else 1
    return out


def positions(cfg: Qwen3VLProcessing, ids: Sequence[int], layouts: Layouts) -> tuple[Tensor, int]:
    """M-RoPE positions (3, L) as Qwen2-VL's, with each temporal patch of a video as an image of its own."""
    return qwen2_vl.positions(cfg, ids, _by_frame(layouts))


def _by_frame(layouts: Layouts) -> dict[str, Sequence[MediaLayout]]:
    """layouts with each video as the blocks its temporal patches have in the prompt."""
    frames: list[MediaLayout] = []
    for video in layouts.get("video", ()):
        t, height, width = video.grid
        frames += [MediaLayout(num_rows=height * width, grid=(1, height, width))] * t
    return {**layouts, "video": frames}


def _timestamps(video: MediaLayout) -> tuple[float, ...]:
    assert isinstance(video, Qwen3VideoLayout), "video_layout made it"
    return video.timestamps
