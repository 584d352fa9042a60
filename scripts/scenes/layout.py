"""Places objects without overlap: a circle of its own for every one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from scenes.shapes import reach

Circle = tuple[float, float, float]
Box = tuple[int, int, int, int]

SMALLEST = 11.8
WIDEST_SHARE = (0.5, 0.48, 0.44, 0.38, 0.34, 0.3, 0.28, 0.26)
CELL_SHARE = 0.8
CLEAR = 0.04
GAP = 3.0
TRIES = 40


def place(
    rng: Random, size: tuple[int, int], shapes: Sequence[str], blocked: Sequence[Box] = ()
) -> list[tuple[int, int, float] | None]:
    """Centre and radius for every shape, None where no room was found."""
    widest = min(size) * WIDEST_SHARE[min(len(shapes), len(WIDEST_SHARE)) - 1] / 2
    taken: list[Circle] = []
    places: list[tuple[int, int, float] | None] = []
    for shape in shapes:
        found = find_room(rng, size, shape, widest, taken, blocked)
        places.append(found)
        if found:
            taken.append((found[0], found[1], reach(shape, found[2])))
    return places


def find_room(
    rng: Random, size: tuple[int, int], shape: str, widest: float, taken: Sequence[Circle], blocked: Sequence[Box]
) -> tuple[int, int, float] | None:
    """A free centre and radius for one shape, most often well inside some third of the picture."""
    for attempt in range(TRIES):
        limit = max(SMALLEST, widest * (1 - attempt / TRIES))
        radius = SMALLEST * (limit / SMALLEST) ** (rng.random() ** 0.75)
        in_cell = rng.random() < CELL_SHARE
        span = [axis_range(rng, side, reach(shape, radius) + 1.5, in_cell) for side in size]
        if any(low > high for low, high in span):
            continue
        x, y = (round(rng.uniform(low, high)) for low, high in span)
        if is_free((x, y, reach(shape, radius)), taken, blocked):
            return x, y, radius
    return None


def axis_range(rng: Random, side: int, margin: float, in_cell: bool) -> tuple[float, float]:
    """Where a centre may lie along one side: inside a random third, or anywhere in the picture."""
    if not in_cell:
        return margin, side - margin
    third = rng.randrange(3)
    return max(margin, (third / 3 + CLEAR) * side), min(side - margin, ((third + 1) / 3 - CLEAR) * side)


def is_free(circle: Circle, taken: Sequence[Circle], blocked: Sequence[Box]) -> bool:
    """Whether the circle keeps clear of the other circles and of the boxes."""
    x, y, radius = circle
    if any(math.hypot(x - a, y - b) < radius + other + GAP for a, b, other in taken):
        return False
    for left, top, right, bottom in blocked:
        if math.hypot(x - max(left, min(x, right)), y - max(top, min(y, bottom))) < radius + GAP:
            return False
    return True
