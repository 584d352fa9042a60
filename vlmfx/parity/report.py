"""What a comparison found: one row a value, a table, and the first stage that departs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfx.parity.stages import STAGES

# Integers are exact. In float32 these are held to (atol, rtol) element by element. Hidden states to a share
# of the reference's largest element: a tower may amplify rounding in its small ones far beyond their own size (seen: 1e-3 between
# float32 and float64 on a random CLIP). Of narrower types a larger share of the range is allowed.
LOGITS = (2e-3, 1e-3)
ELEMENTS = {
    "pixel_values": (1e-5, 0.0), "pixel_values_videos": (1e-5, 0.0), "embedding": (1e-5, 0.0),
    "prompt_logits": LOGITS, "last_logits": LOGITS, "greedy_margins": LOGITS,
}  # fmt: skip
SHARE = 1e-4
NARROW_SHARE = 0.04  # 2 percent a side


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A tensor of which every step-th element of the flattened value is kept."""

    shape: tuple[int, ...]
    step: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One value on both sides. is_ok is None where it could not be compared, and note says why, or what is wrong beyond the difference.

    largest is the largest absolute difference, where its index in the whole value; where a value departs, the index that is furthest
    beyond the tolerance, and for integers the first that differs."""

    case: str
    stage: str
    name: str
    shape: tuple[int, ...] = ()
    largest: float | None = None
    where: tuple[int, ...] = ()
    tolerance: str = ""
    is_ok: bool | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All comparisons of one model with one reference, in the order of the stages, prompt after prompt."""

    model: str
    reference: str
    dtype: str
    comparisons: tuple[Comparison, ...]

    @property
    def first_departure(self) -> Comparison | None:
        """What departs in the earliest stage, of all prompts; None when all is well."""
        departed = [c for c in self.comparisons if c.is_ok is False]
        return min(departed, key=lambda c: list(STAGES).index(c.stage), default=None)

    @property
    def is_ok(self) -> bool:
        """Whether every value that could be compared agrees."""
        return self.first_departure is None

    def __str__(self) -> str:
        return table(self)


def compare(
    case: str, stage: str, name: str, mine: Tensor, theirs: Tensor, *, is_narrow: bool, sample: Sample | None = None
) -> Comparison:
    """One row of the report; theirs may be the kept elements of a sample. A value that is not finite on one side only departs."""
    mine, theirs = mine.detach().cpu(), theirs.detach().cpu()
    shape, full = tuple(mine.shape), sample.shape if sample else tuple(theirs.shape)
    atol, rtol = _tolerance(name, theirs, is_narrow)
    row = {"case": case, "stage": stage, "name": name, "shape": shape}
    told = "exact" if atol == rtol == 0 else f"{atol:.0e}" + (f" + {rtol:.0e}·|x|" if rtol else "")
    if shape != full:
        where = _first_mismatch(mine.flatten(), theirs.flatten()) if mine.dim() <= 2 and not sample else ()
        note = f"its shape is {_shown(shape)}, the reference's {_shown(full)}"
        return Comparison(**row, tolerance=told, where=where, is_ok=False, note=note)  # type: ignore[arg-type]
    a = (mine.flatten()[:: sample.step] if sample else mine.flatten()).double()
    b = theirs.flatten().double()
    difference = (a - b).abs()
    difference[(a == b) | (a.isnan() & b.isnan())] = 0.0
    difference[difference.isnan()] = torch.inf
    excess = difference - (atol + rtol * b.abs().nan_to_num(0.0))
    is_ok = bool((excess <= 0).all())
    largest = float(difference.max()) if len(difference) else 0.0
    is_exact = not theirs.is_floating_point()
    # Of what is exact the first that differs; else the largest, or where it is furthest beyond the tolerance.
    ranked = (difference > 0).int() if is_exact else difference if is_ok else excess
    at = int(ranked.argmax()) if largest else 0
    where = _unravel(at * (sample.step if sample else 1), shape) if largest else ()
    note = "" if is_ok else f"found {a[at]:.6g}, expected {b[at]:.6g}"
    return Comparison(**row, largest=largest, where=where, tolerance=told, is_ok=is_ok, note=note)  # type: ignore[arg-type]


def _tolerance(name: str, theirs: Tensor, is_narrow: bool) -> tuple[float, float]:
    if not theirs.is_floating_point() or not theirs.numel():
        return 0.0, 0.0
    plain = re.sub(r"^(image|slice)\d+\.|_\d+$", "", name)
    if is_narrow and not plain.startswith("pixel_values"):
        finite = theirs[theirs.isfinite()].float()
        return NARROW_SHARE * float(finite.max() - finite.min()) if len(finite) else 0.0, 0.0
    if plain in ELEMENTS:
        return ELEMENTS[plain]
    return SHARE * max(1.0, float(theirs.abs().nan_to_num(0.0, 0.0).max())), 0.0


def _first_mismatch(a: Tensor, b: Tensor) -> tuple[int, ...]:
    n = min(len(a), len(b))
    different = (a[:n] != b[:n]).nonzero()
    return (int(different[0]) if len(different) else n,)


def _unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    where: list[int] = []
    for size in reversed(shape):
        index, rest = divmod(index, size)
        where.append(rest)
    return tuple(reversed(where))


def _shown(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def table(report: Report) -> str:
    """The report as text: a line a value, and in the end the first stage that departs, or that none does."""
    head = ("case", "stage", "value", "shape", "largest", "where", "tolerance", "ok")
    cells = [head, *(_cells(c) for c in report.comparisons)]
    if not any(c.case for c in report.comparisons):
        cells = [row[1:] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    notes = ["", *(c.note for c in report.comparisons)]
    lines = [f"{report.model} in {report.dtype} against {report.reference}", ""]
    for row, note in zip(cells, notes, strict=True):
        text = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append((text + ("  " + note if note else "")).rstrip())
    counts = _counts(report)
    first = report.first_departure
    if first is None:
        return "\n".join([*lines, "", f"No stage departs: {counts['ok']} values agree, {counts['not']} not compared."])
    at = f" at {list(first.where)}" if first.where else ""
    size = f", largest difference {first.largest:.3g}{at}" if first.largest is not None else at
    case = f" of {first.case}" if first.case else ""
    said = f"first departs: {first.stage} ({first.name}{case}{size})"
    return "\n".join([*lines, "", f"{said}; {counts['departed']} values depart, {counts['ok']} agree."])


def _counts(report: Report) -> Mapping[str, int]:
    names = {True: "ok", False: "departed", None: "not"}
    return {name: sum(c.is_ok is state for c in report.comparisons) for state, name in names.items()}


def _cells(c: Comparison) -> tuple[str, ...]:
    ok = {True: "ok", False: "DEPARTS", None: "–"}[c.is_ok]
    largest = "" if c.largest is None else "0" if not c.largest else f"{c.largest:.1e}"
    shape = _shown(c.shape) if c.shape else ""
    return c.case, c.stage, c.name, shape, largest, str(list(c.where)) if c.where else "", c.tolerance, ok
