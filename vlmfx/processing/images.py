"""RGB images from what a user gives: PIL images, uint8 arrays, files and bytes.

Files and bytes are checked by their header before a pixel is decoded: format, size, decompression bombs. They get
their EXIF orientation, and alpha is laid on white. Images already in memory get `.convert("RGB")` and no more, as the
reference processors do.
"""

from __future__ import annotations

import ctypes
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlmfx.errors import InvalidRequest, reason_of

ImageSource = Image.Image | str | os.PathLike[str] | bytes | np.ndarray

MAX_PIXELS = 178_956_970  # Pillow's own limit; kept apart so that its process-wide setting stays untouched
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # an allow-list: others (EPS, PDF) start programs
FIELD = "multi_modal_data.image"
LARGE_PIXELS = 2**25  # 4 bytes each, and as much again while they are converted
LARGE = Lock()  # of images of more pixels: files of a megabyte can hold them
BAND_PIXELS = 2**22
LAZY = Lock()  # of images that are opened and not decoded: Pillow's own cannot be decoded by two threads at once

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: ImageSource, *, field: str = FIELD, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB PIL image; of an animation the first frame.

    Array: uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); a fourth channel is dropped, as for a PIL image.
    16-bit grey is scaled to 8 bits (v / 257, rounded), never clipped. 32-bit grey ("I") holding 0..255 is taken as
    8-bit, 0..65535 as 16-bit, anything else is an error. Float ("F") is an error: its range is not known.
    A PNG's orientation counts only where it precedes the pixels, since it must be known from the header.
    Raises InvalidRequest, and nothing else, whatever the bytes are; more than twice Pillow's own limit is refused
    even under a larger max_pixels.
    """
    with _opened(source, field) as (image, decoded):
        _check_size(image.size, field, max_pixels)
        if not decoded:
            with LAZY:
                image.load()
            return _to_8_bit(image, field).convert("RGB")
        turn = _turn(image)
        image.load()
        image = _to_8_bit(image, field)
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = _on_white(image)
        else:
            image = image.convert("RGB")
        return image if turn is None else image.transpose(turn)


@contextmanager
def loaded(source: ImageSource, *, field: str = FIELD, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """What load_image gives. Of large images there is one at a time in the process, from when it is decoded until the block ends, so
    that memory is bounded however many threads load them; a block must not begin another. Raises as load_image does."""
    height, width = image_size(source, field=field, max_pixels=max_pixels)
    if height * width <= LARGE_PIXELS:
        yield load_image(source, field=field)
        return
    with LARGE:
        try:
            yield load_image(source, field=field)
        finally:
            _trim_memory()


def image_size(source: ImageSource, *, field: str = FIELD, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of what load_image gives, read from the header alone; no pixel is decoded.

    Raises InvalidRequest for what is not an image or too large; damage behind the header shows only in load_image.
    """
    with _opened(source, field) as (image, decoded):
        _check_size(image.size, field, max_pixels)
        width, height = image.size
        return (width, height) if decoded and _swaps_sides(image) else (height, width)


@contextmanager
def _opened(source: ImageSource, field: str) -> Iterator[tuple[Image.Image, bool]]:
    """The image, its header read, and whether it came as file or bytes; turns any exception into InvalidRequest."""
    try:
        if isinstance(source, Image.Image):
            yield source, False
        elif isinstance(source, np.ndarray):
            yield _from_array(source, field), False
        elif isinstance(source, (bytes, bytearray, memoryview)):
            if not len(source):
                raise InvalidRequest(field, "the image has 0 bytes; send the whole file.", found=0)
            with Image.open(io.BytesIO(source), formats=FORMATS) as image:
                yield image, True
        elif isinstance(source, (str, os.PathLike)):
            path = Path(source)
            if not path.is_file():  # also keeps pipes and devices, which never end, from being read
                what = "is a folder" if path.is_dir() else "is not a file"
                raise InvalidRequest(
                    field, f"{str(source)[:200]!r} {what}; give the path of an image file.", found=str(source)
                )
            with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
                yield image, True
        else:
            expected = "a PIL image, a path, bytes or a uint8 array"
            message = f"an image of type {type(source).__name__} is not supported; give {expected}."
            raise InvalidRequest(field, message, found=type(source).__name__, expected=expected)
    except InvalidRequest:
        raise
    except UnidentifiedImageError as error:
        message = f"the image cannot be read (it is none of {', '.join(FORMATS)}); send a whole PNG or JPEG file."
        raise InvalidRequest(field, message, expected=FORMATS) from error
    # Damaged files raise SyntaxError, struct.error, OSError, ValueError, DecompressionBombError, ... from Pillow.
    except Exception as error:
        reason = reason_of(error)
        message = f"the image cannot be read ({reason}); send a whole {', '.join(FORMATS)} file."
        raise InvalidRequest(field, message, found=reason, expected=FORMATS) from error


def _trim_memory() -> None:
    """Have the C library give back what is free: glibc keeps hundreds of megabytes for each thread that has decoded a large image."""
    with suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _on_white(image: Image.Image) -> Image.Image:
    """An image with alpha or a transparent colour, laid on white: in bands, each of which takes five times the memory of its pixels."""
    width, height = image.size
    out, rows = Image.new("RGB", image.size), max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height))).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        out.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return out


def _check_size(size: tuple[int, int], field: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InvalidRequest(field, f"the image is {width}x{height}; both sides must be at least 1 pixel.", found=size)
    if width * height > max_pixels:
        message = f"the image has {width}x{height} pixels but at most {max_pixels} are allowed; send a smaller one."
        raise InvalidRequest(field, message, found=width * height, expected=max_pixels)


def _from_array(array: np.ndarray, field: str) -> Image.Image:
    shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not shape_fits:
        expected = "uint8 with shape (H, W), (H, W, 3) or (H, W, 4)"
        found = f"{array.dtype} with shape {array.shape}"
        raise InvalidRequest(field, f"the array is {found}; give {expected}.", found=found, expected=expected)
    if not array.size:
        raise InvalidRequest(field, f"the array of shape {array.shape} has no pixels; give at least one.", found=0)
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _to_8_bit(image: Image.Image, field: str) -> Image.Image:
    """The image itself, or grey ("L") where it holds more than 8 bits a sample."""
    if image.mode == "F":
        message = "the image holds floats (mode F), whose range is not known; convert it to uint8 first."
        raise InvalidRequest(field, message, found="F", expected="8- or 16-bit samples")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    grey = np.asarray(image).astype(np.int64)
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        message = f"32-bit grey holds {low}..{high}, but 0..65535 is what can be scaled; convert it to uint8 first."
        raise InvalidRequest(field, message, found=(low, high), expected=(0, 65535))
    # Pillow opens a 16-bit PPM (and some PNGs) as mode "I": there the file says what the values mean, not their range.
    if image.mode != "I" or high > 255 or image.format in ("PNG", "PPM"):
        grey = (grey + 128) // 257
    return Image.fromarray(grey.astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    try:
        # The base class's getexif: PngImageFile's decodes the pixels to look behind them.
        value = Image.Image.getexif(image).get(0x0112, 1)
    except Exception:  # damaged EXIF: the pixels may still be whole
        return 1
    return value if isinstance(value, int) else 1


def _turn(image: Image.Image) -> Image.Transpose | None:
    return None if image.format == "TIFF" else _TURNS.get(_orientation(image))  # Pillow turns TIFF when it loads


def _swaps_sides(image: Image.Image) -> bool:
    """Whether image.size, as the header gives it, is still to be swapped."""
    turned_by_pillow: Any = image.format == "TIFF" and hasattr(image, "_tile_size")  # Pillow >= 11
    return not turned_by_pillow and 5 <= _orientation(image) <= 8
