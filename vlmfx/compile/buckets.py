"""Plans: which sizes of each program are compiled. What runs is padded to the smallest of them that covers it."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlmfx.errors import PlanError, reason_of, shown

UNITS = {"encode": "patches", "prefill": "tokens", "decode": "sequences", "pool": "tokens"}
MAX_GRAPHS = 48
MAX_SIZE = 2**31 - 1  # what counts rows is int32


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes that are compiled: for each program increasing rungs, () where it is not wanted.

    encode counts the patches of a step, prefill its new tokens, packed, decode its sequences, pool its tokens, packed. Other dimensions are
    padded to one maximum: max_segments of encode, max_seqs of prefill and pool. max_graphs bounds the rungs of all programs
    together. Raises PlanError."""

    encode: tuple[int, ...] = ()
    prefill: tuple[int, ...] = ()
    decode: tuple[int, ...] = ()
    pool: tuple[int, ...] = ()
    max_segments: int
    max_seqs: int
    max_graphs: int = MAX_GRAPHS

    def __post_init__(self) -> None:
        for name in ("max_segments", "max_seqs", "max_graphs"):
            check_size(f"plan: {name}", getattr(self, name))
        for program in UNITS:
            _check_rungs(program, getattr(self, program))
        if self.num_graphs > self.max_graphs:
            raise PlanError(
                f"plan: it has {self.num_graphs} rungs in all, expected at most {self.max_graphs}; remove some or raise max_graphs."
            )

    @property
    def programs(self) -> tuple[str, ...]:
        """The names of those that have rungs."""
        return tuple(program for program in UNITS if self.rungs(program))

    @property
    def num_graphs(self) -> int:
        return sum(len(self.rungs(program)) for program in UNITS)

    def rungs(self, program: str) -> tuple[int, ...]:
        """The sizes compiled for a program, by its name."""
        check_program(program)
        rungs: tuple[int, ...] = getattr(self, program)
        return rungs

    def bucket(self, program: str, size: int) -> int:
        """The smallest rung of a program that covers size. Raises PlanError where none does: nothing is compiled for it."""
        rungs = self.rungs(program)
        if not rungs:
            raise PlanError(f"{program}: the plan has no rungs for it; use a plan with some.")
        if not 1 <= size <= rungs[-1]:
            raise PlanError(
                f"{program}: a step of {size} {UNITS[program]} has no bucket, as the plan goes from 1 to {rungs[-1]}; "
                "change the step or use a plan that covers it."
            )
        return rungs[bisect_left(rungs, size)]

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON has it: a list of rungs for each program, and the maxima."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def to_json(self) -> str:
        """The plan as JSON text, one field a line."""
        return (
            "{\n" + ",\n".join(f'  "{name}": {json.dumps(value)}' for name, value in self.as_dict().items()) + "\n}\n"
        )

    @classmethod
    def from_dict(cls, value: Any) -> Plan:
        """The plan that `as_dict` gave; a program that is left out has no rungs. Raises PlanError."""
        if not isinstance(value, dict):
            raise PlanError(f"plan: it is {shown(value)}, expected an object; write one with `vlmfx plan --out`.")
        known = [field.name for field in fields(cls)]
        for name in value:
            if name not in known:
                raise PlanError(f"plan: it has no field {shown(name)}; use {', '.join(known)}.")
        for name in ("max_segments", "max_seqs"):
            if name not in value:
                raise PlanError(f"plan: {name} is missing; add it, a whole number of 1 or more.")
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in value.items()}
        return cls(**given)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan of JSON text. Raises PlanError."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"plan: it is not JSON ({error}); write one with `vlmfx plan --out`.") from None
        return cls.from_dict(value)


def check_size(name: str, value: Any) -> None:
    """Raise PlanError for what is no whole number from 1 to MAX_SIZE; True and 1.0 are none."""
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        raise PlanError(f"{name} is {shown(value)}, expected a whole number from 1 to {MAX_SIZE}; change it to one.")


def read_plan(path: str | Path) -> Plan:
    """The plan in a JSON file, as `vlmfx plan --out` writes it. Raises PlanError."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(
            f"plan: {path} cannot be read ({reason_of(error)}); write one with `vlmfx plan --out`."
        ) from None
    return Plan.from_dict(value)


def plan_for(given: Plan | str | Path, programs: Collection[str], patch_multiple: int) -> Plan:
    """A Plan, or that of a file, for these programs of a model that takes patches in such multiples; others lose their rungs.

    Raises PlanError for a plan without rungs for one of them, or with rungs of encode that the model cannot fill."""
    plan = given if isinstance(given, Plan) else read_plan(given)
    for name in programs:
        if not plan.rungs(name):
            raise PlanError(f"plan: it has no rungs for {name}, which the task needs; use a plan with some.")
    for size in plan.encode:
        if size % patch_multiple:
            raise PlanError(
                f"plan: encode has a rung of {size} patches, expected multiples of {patch_multiple}, as this model takes them; round it up."
            )
    unwanted: dict[str, Any] = {name: () for name in UNITS if name not in programs}
    return replace(plan, **unwanted)


def check_program(program: Any) -> None:
    """Raise PlanError for what is not the name of a program."""
    if program not in tuple(UNITS):
        raise PlanError(f"plan: there is no program {shown(program)}; use one of {', '.join(UNITS)}.")


def _check_rungs(program: str, rungs: Any) -> None:
    if not isinstance(rungs, tuple):
        raise PlanError(f"plan: {program} is {shown(rungs)}, expected a list of sizes; use [] to leave {program} out.")
    for size in rungs:
        check_size(f"plan: a rung of {program}", size)
    for before, after in pairwise(rungs):
        if after <= before:
            raise PlanError(f"plan: {program} has {after} after {before}, expected increasing rungs; sort them.")
