"""Disturbs finished pictures a little: light, tint, blur, noise and JPEG artefacts."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageFilter

CLEAN_SHARE = 0.35
NOISE_SIDE = 640
NOISE_LEVELS = (2, 4, 6, 9)


@lru_cache(maxsize=len(NOISE_LEVELS))
def noise_bank(level: int) -> Image.Image:
    """A fixed large picture of gaussian noise about the middle gray, that pictures cut their noise from."""
    noise = np.random.default_rng(level).normal(128, level, (NOISE_SIDE, NOISE_SIDE, 3))
    return Image.fromarray(noise.round().clip(0, 255).astype(np.uint8))


def relight(rng: Random, picture: Image.Image) -> Image.Image:
    """The picture with slightly other brightness, contrast and tint."""
    gain, lift = rng.uniform(0.86, 1.08), rng.uniform(-7, 7)
    tints = np.array([rng.uniform(-4, 4) for _ in range(3)])[:, None]
    table = ((np.arange(256) - 128) * gain + 128 + lift + tints).round().clip(0, 255).astype(int)
    return picture.point(table.ravel().tolist())


def add_noise(rng: Random, picture: Image.Image) -> Image.Image:
    """The picture with gaussian noise."""
    bank = noise_bank(rng.choice(NOISE_LEVELS))
    x, y = rng.randrange(NOISE_SIDE - picture.width), rng.randrange(NOISE_SIDE - picture.height)
    return ImageChops.add(picture, bank.crop((x, y, x + picture.width, y + picture.height)), 1, -128)


def recompress(rng: Random, picture: Image.Image, lowest: int) -> Image.Image:
    """The picture after a JPEG round trip of quality `lowest` to 95."""
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=rng.randint(lowest, 95))
    return Image.open(buffer).convert("RGB")


def disturb(rng: Random, picture: Image.Image, *, delicate: bool) -> Image.Image:
    """The picture after none to all of the disturbances; weaker ones where small detail must stay legible."""
    if rng.random() < CLEAN_SHARE:
        return picture
    if rng.random() < 0.5:
        picture = relight(rng, picture)
    if rng.random() < 0.35:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.6 if delicate else 1.2)))
    if rng.random() < 0.5:
        picture = add_noise(rng, picture)
    if rng.random() < 0.45:
        picture = recompress(rng, picture, 60 if delicate else 35)
    return picture
