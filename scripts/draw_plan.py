"""Writes docs/images/plan.svg, the buckets of a plan and what they waste, and docs/images/merge.svg, the merge inside prefill.

Run `python scripts/draw_plan.py [plan.json]` after a change of the default plan; a test compares the committed pictures with it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from draw_merge import draw_merge
from svg import BLUE, FAINT, ORANGE, area, document, line, text

from vlmfx.compile.buckets import UNITS, Plan
from vlmfx.compile.ladders import default_plan

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
WIDTH, LEFT, RIGHT = 860, 48, 836
TOP, PANEL, ROW = 34, 70, 136  # above a chart, of a chart, and from one to the next
POINTS = 24  # of the curve between two rungs


def draw_plan(plan: Plan) -> str:
    """The picture: for each program its rungs on one log axis, and above each size the share of its bucket that is padding."""
    programs = [program for program in UNITS if plan.rungs(program)]
    axis = Axis(max((plan.rungs(program)[-1] for program in programs), default=1))
    bottom = ROW * len(programs)
    parts = [part for i, program in enumerate(programs) for part in _chart(plan, program, ROW * i + TOP, axis)]
    legend = "filled: the share of a bucket that is padding"
    parts += [
        text(LEFT, bottom + 14, "size of a step, on a log scale →", font_size=11),
        text((LEFT + RIGHT) / 2, bottom + 14, "line: a bucket, one graph", anchor="middle", font_size=11, fill=BLUE),
        text(RIGHT, bottom + 14, legend, anchor="end", font_size=11, fill=ORANGE),
    ]
    return document(WIDTH, bottom + 24, "The buckets of a plan and what they waste", parts)


class Axis:
    """Where a size is from left to right: 1 at LEFT, `most` at RIGHT, equal ratios equally far."""

    def __init__(self, most: int) -> None:
        self.most = max(most, 2)

    def __call__(self, size: float) -> float:
        return LEFT + (RIGHT - LEFT) * math.log(size) / math.log(self.most)


def _chart(plan: Plan, program: str, top: float, axis: Axis) -> list[str]:
    """One program: title, an example, the padding of every size, a line and a number for each rung."""
    rungs, base = plan.rungs(program), top + PANEL

    def at(size: int, bucket: int) -> tuple[float, float]:
        return axis(size), base - PANEL * (1 - size / bucket)

    most = max((1 - (low + 1) / high for low, high in pairwise(rungs)), default=0)
    title = f"{len(rungs)} graphs by {UNITS[program]}; above the first, at most {most:.0%} of a bucket is padding"
    parts = [
        text(LEFT, top - 14, program, font_weight="bold", font_size=14),
        text(LEFT + 72, top - 14, title),
        *(
            text(LEFT - 6, base - PANEL * share + 4, f"{share:.0%}", anchor="end", font_size=10)
            for share in (0, 0.5, 1)
        ),
        *(
            line(LEFT, base - PANEL * share, RIGHT, base - PANEL * share, FAINT, stroke_width=0.4)
            for share in (0, 0.5, 1)
        ),
    ]
    for low, high in pairwise((0, *rungs)):
        sizes = _between(low + 1, high)
        start = axis(max(low, 1))
        parts.append(area([(start, base), (start, at(low + 1, high)[1]), *(at(s, high) for s in sizes)], ORANGE, 0.5))
    parts += [line(axis(rung), base - PANEL, axis(rung), base + 4, BLUE, stroke_width=0.8) for rung in rungs]
    parts += [text(x, base + 16, words, anchor="middle", font_size=10, fill=BLUE) for x, words in _labels(rungs, axis)]
    return parts


def _between(first: int, last: int) -> list[int]:
    """Sizes from first to last, all of them or POINTS at equal ratios."""
    return sorted({round(first * (last / first) ** (i / POINTS)) for i in range(POINTS + 1)})


def _labels(rungs: Sequence[int], axis: Axis) -> list[tuple[float, str]]:
    """Where a rung's number fits, and the number; from the largest on, those that would touch one already there go without."""
    labels, free = [], math.inf
    for rung in reversed(rungs):
        half = 3.2 * len(str(rung))  # of the width, in a font of 10
        if axis(rung) + half < free:
            labels.append((axis(rung), str(rung)))
            free = axis(rung) - half - 3
    return labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "plan", nargs="?", type=Path, help="JSON that `vlmfx plan --out` wrote; the default plan without"
    )
    parser.add_argument("--out", type=Path, default=IMAGES, help="the folder to write to")
    args = parser.parse_args()
    plan = Plan.from_json(args.plan.read_text(encoding="utf-8")) if args.plan else default_plan()
    for name, picture in (("plan", draw_plan(plan)), ("merge", draw_merge())):
        (args.out / f"{name}.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
