"""Draws one object: an antialiased mask of a shape in its own small tile."""

from __future__ import annotations

import math
from random import Random

from PIL import Image, ImageDraw

Point = tuple[float, float]

REACH: dict[str, float] = {
    "circle": 1.0,
    "square": 1.32,
    "triangle": 1.3,
    "star": 1.1,
    "cross": 1.1,
    "ring": 1.0,
    "heart": 1.16,
    "diamond": 1.05,
    "hexagon": 1.08,
}
TURN: dict[str, float] = {"square": 12, "cross": 12, "diamond": 12, "heart": 20}
INK = [0] * 128 + [255] * 128


def reach(shape: str, radius: float) -> float:
    """The radius of the circle that holds a shape about `2 * radius` across."""
    return REACH[shape] * radius


def draw_mask(rng: Random, shape: str, radius: float) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """The mask of a shape in a square tile centred on it, and the box of its ink within the tile."""
    outer = reach(shape, radius)
    scale = 4 if outer < 36 else 2
    side = math.ceil(outer) * 2 + 2
    mask = Image.new("L", (side * scale, side * scale))
    pen = ImageDraw.Draw(mask)
    middle, far = side * scale / 2, outer * scale
    if shape in ("circle", "ring"):
        pen.ellipse((middle - far, middle - far, middle + far, middle + far), fill=255)
        if shape == "ring":
            hole = far * rng.uniform(0.48, 0.7)
            pen.ellipse((middle - hole, middle - hole, middle + hole, middle + hole), fill=0)
    else:
        limit = TURN.get(shape, 180)
        angle = math.radians(rng.uniform(-limit, limit))
        cos, sin = math.cos(angle) * far, math.sin(angle) * far
        points = outline(rng, shape)
        pen.polygon([(middle + x * cos - y * sin, middle + x * sin + y * cos) for x, y in points], fill=255)
    tile = mask.reduce(scale)
    box = tile.point(INK).getbbox()
    assert box is not None
    return tile, box


def outline(rng: Random, shape: str) -> list[Point]:
    """The corners of a shape inside the unit circle, y downwards, of slightly varied proportions."""
    if shape == "square":
        return circle_points(4, turn=45)
    if shape == "hexagon":
        return circle_points(6, turn=rng.choice((0, 30)))
    if shape == "triangle":
        spread = rng.uniform(50, 66)
        return [at_angle(-90), at_angle(90 - spread), at_angle(90 + spread)]
    if shape == "star":
        inner = rng.uniform(0.38, 0.5)
        return [at_angle(36 * i - 90, inner if i % 2 else 1.0) for i in range(10)]
    if shape == "diamond":
        width = rng.uniform(0.66, 0.98)
        return [(0, -1), (width, 0), (0, 1), (-width, 0)]
    if shape == "cross":
        return cross_points(rng.uniform(0.26, 0.4))
    return heart_points()


def at_angle(degrees: float, radius: float = 1.0) -> Point:
    """The point of a circle at an angle from the x axis."""
    return radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))


def circle_points(count: int, turn: float) -> list[Point]:
    """The corners of a regular polygon."""
    return [at_angle(turn + 360 * i / count) for i in range(count)]


def cross_points(thin: float) -> list[Point]:
    """The corners of a plus whose arms are `thin` times as wide as it is long."""
    tip = 1 / math.hypot(1, thin)
    arm = thin * tip
    quarter = [(arm, -tip), (arm, -arm), (tip, -arm)]
    points: list[Point] = []
    for _ in range(4):
        points += quarter
        quarter = [(-y, x) for x, y in quarter]
    return points


def heart_points() -> list[Point]:
    """A heart's curve, from the usual sine formula."""
    points = []
    for i in range(40):
        t = 2 * math.pi * i / 40
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3 * 16 / 17.3, -(y + 2.5) / 17.3))
    return points
