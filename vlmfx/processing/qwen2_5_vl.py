"""Qwen2.5-VL's images and videos: as Qwen2-VL's, packed window by window for the tower, and with positions in time by the second.

Source: huggingface/transformers: src/transformers/{vision_utils,models/qwen2_5_vl/{modeling,processing}_qwen2_5_vl}.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmfx.models.qwen2_5_vl import Qwen25VLConfig
from vlmfx.models.vision_inputs import VisionInputs, concat, cumulative
from vlmfx.processing import qwen2_vl
from vlmfx.processing.inputs import Layouts, MediaLayout
from vlmfx.processing.qwen2_vl import PLACEHOLDERS, REQUEST_SETTINGS, embed_inputs, expand, layout, request_config
from vlmfx.processing.tokenizer import Tokenizer
from vlmfx.processing.video import VideoPlan

__all__ = ["PLACEHOLDERS", "REQUEST_SETTINGS", "embed_inputs", "expand", "layout", "request_config"]

DEFAULT_FPS = 2.0  # of frames that come without; at which videos are sampled for these models


@dataclass(frozen=True, kw_only=True)
class Qwen25VLProcessing(qwen2_vl.Qwen2VLProcessing):
    """window: the side of an attention window in merged patches. tokens_per_second: how far time positions move in a second."""

    window: int
    tokens_per_second: int


@dataclass(frozen=True, kw_only=True)
class Qwen25VideoLayout(MediaLayout):
    """time_step: how far time positions move from one temporal patch to the next."""

    time_step: float


def config(preprocessor: dict[str, Any], model: Qwen25VLConfig, tokenizer: Tokenizer) -> Qwen25VLProcessing:
    """The processing of a preprocessor_config.json."""
    return Qwen25VLProcessing(
        **qwen2_vl.settings(preprocessor, model),
        window=model.vision.window,
        tokens_per_second=model.vision.tokens_per_second,
    )


def video_layout(cfg: Qwen25VLProcessing, plan: VideoPlan) -> Qwen25VideoLayout:
    """The layout of a video, from its plan alone."""
    plain = qwen2_vl.video_layout(cfg, plan)
    seconds = plan.seconds_per_frame or 1 / DEFAULT_FPS
    step = cfg.tokens_per_second * cfg.temporal_patch_size * seconds
    return Qwen25VideoLayout(num_rows=plain.num_rows, grid=plain.grid, time_step=step)


def positions(cfg: Qwen25VLProcessing, ids: Sequence[int], layouts: Layouts) -> tuple[Tensor, int]:
    """M-RoPE positions (3, L) as Qwen2-VL's, but the time of a video's frames counts seconds, not frames."""
    return qwen2_vl.positions(cfg, ids, layouts, frame_times)


def frame_times(item: MediaLayout) -> Tensor:
    """The time of each frame, rounded down."""
    times = qwen2_vl.frame_times(item)
    return (times * item.time_step).long() if isinstance(item, Qwen25VideoLayout) else times


def vision_inputs(cfg: Qwen25VLProcessing, images: Iterable[Image.Image]) -> VisionInputs:
    """RGB images → their pixels and patches, window by window, one segment an image."""
    return concat([in_windows(cfg, inputs) for inputs in map(partial(qwen2_vl.image_inputs, cfg), images)])


def video_inputs(cfg: Qwen25VLProcessing, plan: VideoPlan, frames: Iterable[Image.Image]) -> VisionInputs:
    """A video's RGB frames → their pixels and patches, window by window, one segment a temporal patch."""
    return in_windows(cfg, qwen2_vl.video_inputs(cfg, plan, frames))


def in_windows(cfg: Qwen25VLProcessing, inputs: VisionInputs) -> VisionInputs:
    """The inputs of one image or video in the order of its windows, frame by frame; windows at the right and lower edge are smaller.

    Merged patches stay whole, and row_index says where in the new order each of the old is."""
    block = cfg.merge_size**2
    rows, cols = (inputs.position_ids[::block] // (cfg.merge_size * cfg.window)).unbind(1)
    frames = torch.arange(inputs.num_segments).repeat_interleave(len(rows) // inputs.num_segments)
    window = (frames * (rows.max() + 1) + rows) * (cols.max() + 1) + cols
    order = window.argsort(stable=True)

    assert inputs.patch_offsets is not None, "pixels of images come as they are"

    def arranged(values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, block))[order].flatten(0, 1)

    return replace(
        inputs,
        patch_offsets=arranged(inputs.patch_offsets),  # row_stride is the same for all
        position_ids=arranged(inputs.position_ids),
        cu_window_seqlens=cumulative((window.bincount() * block).tolist()),
        row_index=order.argsort(),
    )
