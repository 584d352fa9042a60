"""Paints backgrounds: a colour, plain or with a low-contrast pattern."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from scenes.paint import Rgb

Field = np.ndarray[Any, Any]

BANK_SIDE = 512


@lru_cache(maxsize=1)
def speckle_bank() -> Field:
    """A fixed field of uniform noise that pictures cut their speckles from."""
    return np.random.default_rng(1).integers(0, 256, (BANK_SIDE, BANK_SIDE), dtype=np.uint8)


def axes(width: int, height: int) -> tuple[Field, Field]:
    """The x and y of every pixel, as a row and a column."""
    return np.arange(width, dtype=np.float32)[None, :], np.arange(height, dtype=np.float32)[:, None]


def ramp(rng: Random, width: int, height: int) -> Field:
    """A gradient along one of eight directions."""
    x, y = axes(width, height)
    turn = rng.randrange(8) * math.pi / 4
    slope = x * math.cos(turn) + y * math.sin(turn)
    low, high = float(slope.min()), float(slope.max())
    return np.broadcast_to((slope - low) * (255 / (high - low)), (height, width))


def speckle(rng: Random, width: int, height: int) -> Field:
    """Fine noise, one to three pixels coarse."""
    coarse = rng.randint(1, 3)
    columns, rows = -(-width // coarse), -(-height // coarse)
    x, y = rng.randrange(BANK_SIDE - columns), rng.randrange(BANK_SIDE - rows)
    grain = speckle_bank()[y : y + rows, x : x + columns]
    return grain.repeat(coarse, 0).repeat(coarse, 1)[:height, :width]


def stripes(rng: Random, width: int, height: int) -> Field:
    """Bands of two shades in one of eight directions."""
    x, y = axes(width, height)
    turn = rng.randrange(8) * math.pi / 8
    period = rng.uniform(8, 40)
    wave = (x * math.cos(turn) + y * math.sin(turn)) / period + rng.random()
    return (wave % 1 < 0.5) * np.uint8(255)


def checker(rng: Random, width: int, height: int) -> Field:
    """Squares of two shades."""
    x, y = axes(width, height)
    side = rng.uniform(6, 30)
    return ((x // side + y // side) % 2 < 1) * np.uint8(255)


def clouds(rng: Random, width: int, height: int) -> Field:
    """Smooth low-frequency noise."""
    cells = rng.randint(3, 9)
    x, y = rng.randrange(BANK_SIDE - cells), rng.randrange(BANK_SIDE - cells)
    grain = Image.fromarray(np.ascontiguousarray(speckle_bank()[y : y + cells, x : x + cells]))
    return np.asarray(grain.resize((width, height), Image.Resampling.BICUBIC))


def grid(rng: Random, width: int, height: int) -> Field:
    """Grid paper."""
    x, y = axes(width, height)
    period, line = rng.randint(9, 30), rng.randint(1, 2)
    return ((x % period < line) | (y % period < line)) * np.uint8(255)


def dots(rng: Random, width: int, height: int) -> Field:
    """A lattice of dots."""
    x, y = axes(width, height)
    period = rng.uniform(10, 26)
    radius = period * rng.uniform(0.18, 0.34)
    return ((x % period - period / 2) ** 2 + (y % period - period / 2) ** 2 < radius**2) * np.uint8(255)


def rings(rng: Random, width: int, height: int) -> Field:
    """Concentric rings about some point."""
    x, y = axes(width, height)
    far = np.sqrt((x - rng.uniform(0, width)) ** 2 + (y - rng.uniform(0, height)) ** 2)
    return (far / rng.uniform(10, 36) % 1 < 0.5) * np.uint8(255)


Pattern = Callable[[Random, int, int], Field]

PATTERNS: dict[str, tuple[Pattern, ...]] = {
    "train": (ramp, ramp, speckle, stripes, checker, clouds, clouds, grid),
    "heldout": (dots, rings),
}
PLAIN_SHARE = 0.28
STRENGTH = 15


def paint(rng: Random, size: tuple[int, int], ground: Rgb, split: str) -> Image.Image:
    """A picture of the ground colour, plain or patterned in the split's manner; held-out ones are all patterned."""
    if split == "train" and rng.random() < PLAIN_SHARE:
        return Image.new("RGB", size, ground)
    field = rng.choice(PATTERNS[split])(rng, *size)
    picture = Image.fromarray(np.ascontiguousarray(field, dtype=np.uint8))
    shared = rng.uniform(0.4, 1.0) * STRENGTH * rng.choice((-1, 1))
    swing = [shared + rng.uniform(-0.15, 0.15) * STRENGTH for _ in range(3)]
    shares = np.arange(256)[:, None] / 255 - 0.5
    palette = (np.array(ground) + shares * np.array(swing)).round().clip(0, 255).astype(np.uint8)
    picture.putpalette(palette.tobytes())
    return picture.convert("RGB")
