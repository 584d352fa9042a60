"""Images for tests: noise of a given size, and requests around them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from vlmfx.checkpoint import Model


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Noise; the seed decides which."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def placeholder(model: Model, number: int = 1) -> str:
    """What stands for a prompt's image of that number, counted from 1."""
    mark: str = model.processor.functions.PLACEHOLDERS["image"]
    return mark.format(number=number)


def about(model: Model, *images: Any, text: str = "What is it?") -> dict[str, Any]:
    """A prompt with a placeholder for each image."""
    marks = "".join(placeholder(model, number) for number in range(1, len(images) + 1))
    return {"prompt": marks + text, "multi_modal_data": {"image": list(images)}}


def mixed(model: Model) -> list[Any]:
    """Prompts of many lengths and kinds, all of them valid."""
    return [
        "Hello there",
        about(model, picture(60, 40)),
        "A long question about nothing at all. " * 6,
        about(model, picture(30, 90, 1), picture(64, 64, 2), text="Compare the two."),
        {"prompt_token_ids": [5, 6, 7]},
        about(model, picture(33, 100, 3), text="Why?"),
        "x",
    ]
