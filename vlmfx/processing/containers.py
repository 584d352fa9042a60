"""Video files by PyAV: opened so that nothing else is, and decoded frame by frame.

FFmpeg reads from a file object only, with an allow-list of formats: a playlist or a concat script, which would make it open other files
and addresses, is no video here."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from PIL import Image

from vlmfx.errors import InvalidRequest, reason_of
from vlmfx.processing.images import MAX_PIXELS

FORMATS = ("mp4", "mov", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "gif")
CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg1video", "mpeg2video", "mpeg4", "flv1", "mjpeg", "gif")
MAX_DECODED_PIXELS = 2 * 10**10  # of all frames that are decoded of a file: 5 minutes of 1080p at 30 frames a second
MAX_FRAME_COUNT = 2**40  # that a damaged header may promise
NUM_THREADS = 4  # FFmpeg's default is one a core, each with frames of its own

_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


@contextmanager
def opened(source: Any, field: str) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream) in PyAV's terms; any exception of FFmpeg becomes an InvalidRequest."""
    try:
        import av
    except ImportError as error:
        message = (
            "video files are read by PyAV, which is not installed; run pip install 'vlmfx[video]', or pass frames."
        )
        raise InvalidRequest(field, message, expected="av") from error
    # Nothing but the file object is ever opened: no protocol is allowed, and what asks for a file is refused.
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
    try:
        with (
            _file(source, field) as file,
            av.open(file, container_options=options, metadata_errors="ignore", io_open=_refuse_to_open) as container,
        ):
            if not container.streams.video:
                raise InvalidRequest(field, "it holds no video stream; send a video file.", found=container.format.name)
            stream = container.streams.video[0]
            context = stream.codec_context
            if context is None:
                message = (
                    "its codec is not known, or the file is not whole; send all of an H.264 or VP9 file, or another."
                )
                raise InvalidRequest(field, message, found=None)
            codec = getattr(context.codec, "canonical_name", None) or context.codec.name
            if codec not in CODECS:
                message = f"its codec {codec} is not read; send one of {', '.join(CODECS)}."
                raise InvalidRequest(field, message, found=codec, expected=CODECS)
            check_size(context.width, context.height, field, MAX_PIXELS)
            context.options = {"max_pixels": str(MAX_PIXELS)}
            context.thread_type, context.thread_count = "AUTO", NUM_THREADS
            yield container, stream
    except InvalidRequest:
        raise
    except Exception as error:  # FFmpeg's errors come as OSError, ValueError, EOFError, LookupError, ...
        reason = reason_of(error)
        message = f"the video cannot be read ({reason}); send a whole {', '.join(FORMATS)} file."
        raise InvalidRequest(field, message, found=reason, expected=FORMATS) from error


def _file(source: Any, field: str) -> BinaryIO:
    if not isinstance(source, (str, os.PathLike)):
        if not len(source):
            raise InvalidRequest(field, "the video has 0 bytes; send the whole file.", found=0)
        return io.BytesIO(source)
    path = Path(source)
    if not path.is_file():  # also keeps pipes and devices, which never end, from being read
        what = "is a folder" if path.is_dir() else "is not a file"
        message = f"{str(source)[:200]!r} {what}; give the path of a video file."
        raise InvalidRequest(field, message, found=str(source))
    return path.open("rb")


def _refuse_to_open(url: str, flags: int, options: Any) -> NoReturn:
    raise PermissionError("it asks for another file")


def packets(container: Any, stream: Any) -> Iterator[Any]:
    """Every packet of a stream, up to where the file is cut off; the last one, which is empty, makes a decoder give what it holds back."""
    import av

    with suppress(av.FFmpegError, EOFError):
        yield from container.demux(stream)


def decoded(container: Any, stream: Any, field: str) -> Iterator[Any]:
    """Every frame of a stream that can be decoded; a damaged packet is passed over.

    Raises InvalidRequest for a frame that is too large, and once all so far have too many pixels, whatever the header says."""
    import av

    num_pixels = 0
    for packet in packets(container, stream):
        try:
            frames = packet.decode()
        except (av.FFmpegError, EOFError):
            continue
        for frame in frames:
            check_size(frame.width, frame.height, field, MAX_PIXELS)
            num_pixels += frame.width * frame.height
            if num_pixels > MAX_DECODED_PIXELS:
                message = f"its frames have over {MAX_DECODED_PIXELS:.0e} pixels to decode; send a shorter or a smaller video."
                raise InvalidRequest(field, message, found=num_pixels, expected=MAX_DECODED_PIXELS)
            yield frame


def header_frames(container: Any, stream: Any, fps: float | None) -> int:
    """How many frames the header promises, 0 where it does not say."""
    if stream.frames > 0:
        return int(stream.frames)
    seconds = container.duration / 1_000_000 if container.duration else 0.0
    if stream.duration and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    return min(max(0, round(seconds * (fps or 0))), MAX_FRAME_COUNT)


def rotation(frame: Any) -> int:
    """Counterclockwise degrees, a multiple of 90, by which a frame is turned to be shown."""
    return round((getattr(frame, "rotation", 0) or 0) / 90) * 90 % 360


def to_image(frame: Any) -> Image.Image:
    """A frame as it is shown, RGB."""
    turn = _TURNS.get(rotation(frame))
    image: Image.Image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    return image if turn is None else image.transpose(turn)


def check_size(width: int, height: int, field: str, max_pixels: int) -> None:
    """Raise InvalidRequest for frames of more than max_pixels."""
    if width * height > max_pixels:
        message = f"its frames have {width}x{height} pixels, expected at most {max_pixels}; send a smaller video."
        raise InvalidRequest(field, message, found=width * height, expected=max_pixels)
