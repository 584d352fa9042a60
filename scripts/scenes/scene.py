"""What is in a picture, as plain data: the ground truth every answer is computed from."""

from __future__ import annotations

from dataclasses import dataclass

from scenes.vocabulary import POSITIONS

CLEAR_OF_BORDER = 0.03
CLEARLY_APART = 0.12
CLEARLY_LARGER = 1.35


@dataclass(frozen=True)
class Thing:
    """One drawn object; `box` is x0, y0, x1, y1 in pixels, the last two exclusive."""

    colour: str
    shape: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the box."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def sides(self) -> tuple[int, int]:
        """The box's width and height."""
        return self.box[2] - self.box[0], self.box[3] - self.box[1]

    @property
    def name(self) -> str:
        """Colour and shape: `red star`."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Glyph:
    """One printed character and the middle of its place, in pixels."""

    char: str
    x: float
    y: float


@dataclass(frozen=True)
class Bar:
    """One bar of a chart; `box` as a thing's; `column` is the bar's share of the axis, from its head to below its label."""

    value: int
    box: tuple[int, int, int, int]
    column: tuple[int, int, int, int]


@dataclass(frozen=True)
class Print:
    """A printed word, number or code; `panel` tells that a label lies between it and the background."""

    content: str
    kind: str
    colour: str
    box: tuple[int, int, int, int]
    panel: bool


@dataclass(frozen=True)
class Chart:
    """A bar chart's labels and values, from left to right."""

    labels: tuple[str, ...]
    values: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """One picture's content; `background` is None where its colour has no name.

    glyphs are all printed characters, on a chart its labels and numbers; no question is made from them or from bars: they
    teach the vision tower what lies where."""

    size: tuple[int, int]
    background: str | None
    things: tuple[Thing, ...] = ()
    text: Print | None = None
    chart: Chart | None = None
    glyphs: tuple[Glyph, ...] = ()
    bars: tuple[Bar, ...] = ()


def position(thing: Thing, size: tuple[int, int]) -> str | None:
    """The third of the picture that holds the thing's centre, None within 3 % of a third's border."""
    cell = []
    for middle, side in zip(thing.centre, size, strict=True):
        share = middle / side
        if min(abs(share - 1 / 3), abs(share - 2 / 3)) < CLEAR_OF_BORDER:
            return None
        cell.append(min(int(share * 3), 2))
    return POSITIONS[cell[1]][cell[0]]


def is_larger(first: Thing, second: Thing) -> bool:
    """Whether the first is at least 1.35 times the second, by the longer side and by the mean side."""
    (a_width, a_height), (b_width, b_height) = first.sides, second.sides
    return max(a_width, a_height) >= CLEARLY_LARGER * max(b_width, b_height) and (
        a_width + a_height >= CLEARLY_LARGER * (b_width + b_height)
    )


def relations(first: Thing, second: Thing, size: tuple[int, int]) -> set[str]:
    """Those of left, right, above and below that clearly hold of the first towards the second."""
    across = (first.centre[0] - second.centre[0]) / size[0]
    down = (first.centre[1] - second.centre[1]) / size[1]
    found = set()
    if abs(across) >= CLEARLY_APART:
        found.add("left" if across < 0 else "right")
    if abs(down) >= CLEARLY_APART:
        found.add("above" if down < 0 else "below")
    return found
