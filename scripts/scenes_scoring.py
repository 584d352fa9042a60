"""Scores answers of `scenes`, 0 to 1 each, task by task as docs/scenes-tasks.md states the answers, and bounds the accuracy."""

from __future__ import annotations

import re
from collections import Counter
from math import sqrt

from scenes.vocabulary import COLOURS, POSITIONS, SHAPES

BOX = re.compile(r"\[(\d+), ?(\d+), ?(\d+), ?(\d+)\]")
PLACES = "|".join(sorted((place for row in POSITIONS for place in row), key=len, reverse=True))
OBJECT = re.compile(rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) (?:at|in) the ({PLACES})\b", re.IGNORECASE)
CLOSED = frozenset({"first", "second", "yes", "no", *COLOURS, *SHAPES})  # of task two; its other answers are texts
SAME_BOX = 0.5


def score(task: str, answer: str, expected: str) -> float:
    """1 for a right answer of the task, else 0: a box overlaps by half, texts, chart labels and sentences keep their case."""
    if task == "box":
        return float(iou(answer, expected) >= SAME_BOX)
    if task in ("text", "chart", "describe") or (task == "two" and expected not in CLOSED):
        return float(answer.strip() == expected)
    return ignoring_case(answer, expected)


def ignoring_case(answer: str, expected: str) -> float:
    """1 where the two are the same but for upper and lower case and the space around them."""
    return float(answer.strip().lower() == expected.strip().lower())


def iou(answer: str, expected: str) -> float:
    """Intersection over union of two boxes `[x0, y0, x1, y1]`, the last two exclusive; 0 for what is no box."""
    a, b = (_box(text) for text in (answer, expected))
    if a is None or b is None:
        return 0.0
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    shared = max(0, width) * max(0, height)
    return shared / (_area(a) + _area(b) - shared)


def objects_right(answer: str, expected: str) -> float | None:
    """Of the objects a description names or should name, whichever are more, those right in colour, shape and place.

    None where none is expected: a text or a chart."""
    told, there = (
        Counter(tuple(word.lower() for word in found) for found in OBJECT.findall(text)) for text in (answer, expected)
    )
    return (told & there).total() / max(told.total(), there.total()) if there else None


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson interval of a share of n."""
    middle, spread = share + z * z / (2 * n), z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def _box(text: str) -> tuple[int, ...] | None:
    found = BOX.fullmatch(text.strip())
    box = tuple(int(side) for side in found.groups()) if found else ()
    return box if box and box[0] < box[2] and box[1] < box[3] else None


def _area(box: tuple[int, ...]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])
