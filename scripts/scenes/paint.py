"""Chooses drawn colours: names near their anchors, and which names stand out from which ground."""

from __future__ import annotations

from random import Random

from scenes.vocabulary import COLOURS, NEUTRAL, distance, lightness

Rgb = tuple[int, int, int]

CLEAR_DISTANCE = 110
READABLE_LIGHTNESS = 70


def clip(value: float) -> int:
    """The value rounded into a byte."""
    return max(0, min(255, round(value)))


def drawn(rng: Random, colour: str) -> Rgb:
    """A colour near the name's anchor, at most 20 away in each channel."""
    shared = rng.uniform(-16, 16) if colour in NEUTRAL else rng.uniform(-11, 11)
    own = 4 if colour in NEUTRAL else 9
    red, green, blue = (clip(channel + shared + rng.uniform(-own, own)) for channel in COLOURS[colour])
    return red, green, blue


def visible_on(ground: Rgb) -> list[str]:
    """The colour names that are easy to tell from a ground."""
    return [name for name, rgb in COLOURS.items() if distance(rgb, ground) >= CLEAR_DISTANCE]


def readable_on(ground: Rgb) -> list[str]:
    """The colour names in which text is easy to read on a ground."""
    return [
        name for name in visible_on(ground) if abs(lightness(COLOURS[name]) - lightness(ground)) > READABLE_LIGHTNESS
    ]
