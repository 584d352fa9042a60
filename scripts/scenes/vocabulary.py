"""The words of the pictures: colours, shapes, positions, sizes, and which of them are held out of training."""

from __future__ import annotations

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 50),
    "green": (45, 160, 70),
    "blue": (45, 95, 215),
    "purple": (130, 60, 175),
    "pink": (245, 140, 190),
    "brown": (125, 75, 40),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
    "gray": (130, 130, 130),
}
NEUTRAL = frozenset({"black", "white", "gray"})

UNNAMED_BACKGROUNDS: tuple[tuple[int, int, int], ...] = (
    (250, 238, 212),
    (205, 220, 240),
    (208, 234, 210),
    (24, 34, 72),
)

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond", "hexagon")

POSITIONS: tuple[tuple[str, str, str], ...] = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)

HELDOUT_PAIRS: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "hexagon"),
        ("orange", "heart"),
        ("yellow", "cross"),
        ("green", "star"),
        ("blue", "triangle"),
        ("purple", "square"),
        ("pink", "ring"),
        ("brown", "circle"),
        ("black", "diamond"),
        ("white", "heart"),
        ("gray", "star"),
        ("green", "circle"),
    }
)

SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "train": (
        (112, 112),
        (140, 140),
        (168, 168),
        (196, 196),
        (224, 224),
        (252, 252),
        (280, 280),
        (224, 168),
        (168, 224),
        (280, 196),
        (196, 280),
        (252, 140),
        (140, 252),
        (224, 140),
        (112, 168),
        (280, 224),
    ),
    "heldout": ((196, 168), (168, 252), (224, 252), (140, 196)),
}


def plural(shape: str) -> str:
    """The plural of a shape's name: `circles`, `crosses`."""
    return shape + ("es" if shape.endswith("s") else "s")


def with_article(noun: str) -> str:
    """The noun with `a` or `an` before it."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def at_position(position: str) -> str:
    """How a sentence places something: `at the top left`, `in the center`."""
    return "in the center" if position == "center" else f"at the {position}"


def distance(first: tuple[int, int, int], second: tuple[int, int, int]) -> float:
    """The Euclidean distance of two RGB colours."""
    return float(sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) ** 0.5)


def lightness(rgb: tuple[int, int, int]) -> float:
    """The luma of an RGB colour, 0 to 255."""
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
