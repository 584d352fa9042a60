"""RGB frames from what a user gives as a video: container files and bytes, arrays (T, H, W, 3), lists of frames.

First a VideoPlan, from the header and one frame: which frames to take, and how large they are. Then those frames, one by one, so that
memory holds one frame of the source however long it is.

Sampling is vLLM's (vllm-project/vllm: vllm/multimodal/video.py): evenly, first and last frame included."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmfx.errors import InvalidRequest, shown
from vlmfx.processing import containers
from vlmfx.processing.embeds import is_plain
from vlmfx.processing.images import image_size, loaded

FIELD = "multi_modal_data.video"
SETTINGS = "media_io_kwargs"
DEFAULT_FRAMES = 32  # of a file, where the request says neither num_frames nor fps
MAX_FRAMES = 768  # of any video
MAX_FPS = 1000


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a request asks for: at most num_frames (−1: all), at fps; None where it says nothing.

    Frames that come decoded are all taken unless num_frames is given, and fps says how fast they follow each other."""

    num_frames: int | None = None
    fps: float | None = None


@dataclass(frozen=True, kw_only=True)
class VideoPlan:
    """frame_indices: the frames to take, ascending, of num_source_frames. fps: of the source, None where nobody says.

    height and width are those of a frame as it is shown, rotation (counterclockwise degrees) included."""

    frame_indices: tuple[int, ...]
    num_source_frames: int
    height: int
    width: int
    fps: float | None

    @property
    def num_frames(self) -> int:
        """Frames to take."""
        return len(self.frame_indices)

    @property
    def seconds_per_frame(self) -> float | None:
        """From one frame that is taken to the next, on average."""
        return None if self.fps is None else self.num_source_frames / (self.fps * self.num_frames)


def videos_of(value: Any) -> list[Any]:
    """The videos in multi_modal_data["video"]: a list of pictures is one video, a list of anything else holds one an item."""
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return []
    if isinstance(value, (list, tuple)):
        is_frame = isinstance(value[0], Image.Image) or (
            isinstance(value[0], (np.ndarray, Tensor)) and value[0].ndim < 4
        )
        return [value] if is_frame else list(value)
    is_batch = (isinstance(value, np.ndarray) or (isinstance(value, Tensor) and is_plain(value))) and value.ndim == 5
    return list(value) if is_batch else [value]


def sampling_of(settings: Any) -> Sampling:
    """media_io_kwargs, {"video": {"num_frames": …, "fps": …}}, as vLLM names it. Raises InvalidRequest."""
    settings = {} if settings is None else settings
    given = settings.get("video", {}) if isinstance(settings, Mapping) else None
    if not isinstance(given, Mapping) or set(settings) - {"video"} or set(given) - {"num_frames", "fps"}:
        expected = '{"video": {"num_frames": …, "fps": …}}'
        raise InvalidRequest(SETTINGS, f"it is {shown(settings)}; pass {expected}.", found=settings, expected=expected)
    num_frames, fps = given.get("num_frames"), given.get("fps")
    if num_frames is not None and (
        type(num_frames) is not int or not (1 <= num_frames <= MAX_FRAMES or num_frames == -1)
    ):
        message = (
            f"it is {shown(num_frames)}; use an integer from 1 to {MAX_FRAMES}, or -1 for all frames up to as many."
        )
        raise InvalidRequest(f"{SETTINGS}.video.num_frames", message, found=num_frames, expected=MAX_FRAMES)
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps <= MAX_FPS):
        message = f"it is {shown(fps)}; use a number over 0, up to {MAX_FPS}."
        raise InvalidRequest(f"{SETTINGS}.video.fps", message, found=fps, expected=MAX_FPS)
    return Sampling(num_frames=num_frames, fps=None if fps is None else float(fps))


def probe(source: Any, sampling: Sampling, *, field: str = FIELD) -> VideoPlan:
    """The plan of a video: path, bytes, uint8 (T, H, W, 3), or a list of pictures. Of a file one frame is decoded, none is converted.

    Raises InvalidRequest, and nothing else, for what is no video, has no frame, or is too large."""
    if not _is_container(source):
        return _probe_frames(source, sampling, field)
    with containers.opened(source, field) as (container, stream):
        # Of the streams' rotation PyAV tells by way of a frame only.
        first = next(containers.decoded(container, stream, field), None)
        if first is None:
            raise InvalidRequest(field, "none of its frames can be decoded; send a whole video file.", found=0)
        rate = stream.average_rate or stream.guessed_rate
        fps = float(rate) if rate else None
        total = containers.header_frames(container, stream, fps)
        size = (first.height, first.width)
        turned = containers.rotation(first) in (90, 270)
    if not total:  # a stream without an index or a duration
        with containers.opened(source, field) as (container, stream):
            total = max(1, sum(packet.size > 0 for packet in containers.packets(container, stream)))
    if sampling.fps is not None and fps is None:
        message = "fps was given, but the file does not say how fast its frames follow each other; use num_frames."
        raise InvalidRequest(f"{SETTINGS}.video.fps", message, found=sampling.fps)
    indices = sample(total, fps, sampling)
    if (indices[-1] + 1) * size[0] * size[1] > containers.MAX_DECODED_PIXELS:
        message = (
            f"it has {total} frames of {size[1]}x{size[0]} pixels, over {containers.MAX_DECODED_PIXELS:.0e} pixels to decode; "
            "send a shorter or a smaller video."
        )
        raise InvalidRequest(field, message, found=total * size[0] * size[1], expected=containers.MAX_DECODED_PIXELS)
    height, width = size[::-1] if turned else size
    return VideoPlan(frame_indices=indices, num_source_frames=total, height=height, width=width, fps=fps)


def sample(total: int, fps: float | None, sampling: Sampling) -> tuple[int, ...]:
    """The frames to take of total frames that follow each other at fps, which may be None where sampling.fps is."""
    count = sampling.num_frames or (DEFAULT_FRAMES if sampling.fps is None else -1)
    count = total if count == -1 else min(count, total)
    if sampling.fps is not None and fps is not None:
        count = min(count, math.floor(total / fps * sampling.fps))
    return tuple(np.linspace(0, total - 1, max(1, min(count, MAX_FRAMES)), dtype=np.int64).tolist())


def frames(source: Any, plan: VideoPlan, *, field: str = FIELD) -> Iterator[Image.Image]:
    """The plan's frames in order, RGB, each as large as the plan says (a container whose frames change size may depart from that).

    A container that ends early repeats its last frame. Raises InvalidRequest."""
    if not _is_container(source):
        for index in plan.frame_indices:
            with loaded(_array_of(source[index], field), field=field) as picture:
                yield picture
        return
    wanted = iter(plan.frame_indices)
    index = next(wanted)
    image: Image.Image | None = None
    with containers.opened(source, field) as (container, stream):
        last = None
        for number, frame in enumerate(containers.decoded(container, stream, field)):
            last = frame
            if number == index:
                image, last = _image_of(frame, plan, field), None
                yield image
                following = next(wanted, None)
                if following is None:
                    return
                index = following
        if last is not None:
            image = _image_of(last, plan, field)
    if image is None:
        raise InvalidRequest(field, "none of its frames can be decoded; send a whole video file.", found=0)
    yield image
    for _ in wanted:
        yield image


def _image_of(frame: Any, plan: VideoPlan, field: str) -> Image.Image:
    """A frame of a container, converted. Raises InvalidRequest where it has more pixels than the plan's."""
    if frame.width * frame.height > plan.width * plan.height:
        message = (
            f"it begins with frames of {plan.width}x{plan.height} pixels but has one of {frame.width}x{frame.height}; "
        )
        raise InvalidRequest(
            field, message + "send a video whose frames have one size.", found=(frame.width, frame.height)
        )
    return containers.to_image(frame)


def _is_container(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview))


def _probe_frames(source: Any, sampling: Sampling, field: str) -> VideoPlan:
    """The plan of frames that came decoded, or each in a file of its own."""
    if isinstance(source, (np.ndarray, Tensor)):
        if isinstance(source, Tensor) and not is_plain(source):
            raise InvalidRequest(
                field, "it is a tensor that is sparse, nested or on the meta device; give frames as dense uint8."
            )
        if source.ndim != 4 or source.shape[-1] != 3 or str(source.dtype).rpartition(".")[2] != "uint8":
            found = f"{source.dtype} of shape {tuple(source.shape)}"
            raise InvalidRequest(field, f"it is {found}; give frames as uint8 (T, H, W, 3).", found=found)
    elif not isinstance(source, (list, tuple)):
        kind = type(source).__name__
        expected = "a path, bytes, a uint8 array (T, H, W, 3) or a list of PIL images"
        raise InvalidRequest(field, f"a video of type {kind} is not supported; give {expected}.", found=kind)
    total = len(source)
    if not total:
        raise InvalidRequest(field, "it has 0 frames; give at least one.", found=0)
    if sampling.num_frames is None and total > MAX_FRAMES:
        message = f"it has {total} frames, expected at most {MAX_FRAMES}; set num_frames in {SETTINGS}, or pass fewer."
        raise InvalidRequest(field, message, found=total, expected=MAX_FRAMES)
    indices = sample(total, None, Sampling(num_frames=sampling.num_frames or -1))
    sizes = {
        image_size(_array_of(source[i], field), field=field)
        for i in (indices if isinstance(source, Sequence) else indices[:1])
    }
    if len(sizes) > 1:
        message = f"its frames have {len(sizes)} sizes, {sorted(sizes)[:2]} among them; resize them to one."
        raise InvalidRequest(field, message, found=len(sizes), expected=1)
    ((height, width),) = sizes
    num_pixels = len(indices) * height * width
    if num_pixels > containers.MAX_DECODED_PIXELS:
        message = (
            f"it has {len(indices)} frames of {width}x{height} pixels, over {containers.MAX_DECODED_PIXELS:.0e} in all; "
            "send fewer or smaller ones."
        )
        raise InvalidRequest(field, message, found=num_pixels, expected=containers.MAX_DECODED_PIXELS)
    return VideoPlan(frame_indices=indices, num_source_frames=total, height=height, width=width, fps=sampling.fps)


def _array_of(value: Any, field: str) -> Any:
    """A tensor as an array, without its gradient and on the CPU; all else as it is. Raises InvalidRequest."""
    if not isinstance(value, Tensor):
        return value
    if not is_plain(value) or value.dtype != torch.uint8:
        what = f"a tensor of {value.dtype}" + (
            "" if is_plain(value) else " that is sparse, nested or on the meta device"
        )
        raise InvalidRequest(field, f"it has {what}; give frames as dense uint8.", found=what, expected="uint8")
    return value.detach().cpu().numpy()
