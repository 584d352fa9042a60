"""Videos for tests: small container files whose frames show their number, and arrays of noise."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmfx.checkpoint import Model


def noise(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """(T, H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def container(
    frames: np.ndarray | Sequence[np.ndarray],
    *,
    format: str = "mp4",
    codec: str = "mpeg4",
    rate: int = 10,
    rotation: int = 0,
    **options: str,
) -> bytes:
    """The bytes of a video file with these frames (H, W, 3)."""
    av = pytest.importorskip("av")
    with tempfile.TemporaryDirectory() as folder:  # not a buffer: "faststart" reads the file again by its name
        path = Path(folder) / "video"
        with av.open(str(path), "w", format=format, options=options) as file:
            stream = file.add_stream(codec, rate=rate)
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
            if rotation:
                if not hasattr(stream, "set_display_rotation"):
                    pytest.skip("this PyAV cannot write a rotation")
                stream.set_display_rotation(rotation)
            for frame in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode())
        return path.read_bytes()


def numbered(count: int, height: int = 32, width: int = 48) -> list[np.ndarray]:
    """Frame i shows i in binary, the lowest bit at the left: six bars, white for 1."""
    bits = [(np.arange(width) * 6 // width, i) for i in range(count)]
    return [np.broadcast_to(((i >> bar) % 2 * 255).astype(np.uint8)[:, None], (height, width, 3)) for bar, i in bits]


def number_of(frame: Image.Image) -> int:
    """What a frame of `numbered` shows, whatever a codec made of it."""
    bars = np.asarray(frame).mean((0, 2)).reshape(6, -1).mean(1)
    return sum(int(bar > 127) << i for i, bar in enumerate(bars))


def about_video(model: Model, *videos: Any, text: str = "What happens?", **keys: Any) -> dict[str, Any]:
    """A prompt with a placeholder for each video."""
    mark: str = model.processor.functions.PLACEHOLDERS["video"]
    return {"prompt": mark * len(videos) + text, "multi_modal_data": {"video": list(videos)}, **keys}
