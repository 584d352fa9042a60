"""Traces: the sizes of requests that were served, and the steps that they make."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfx.compile.buckets import MAX_SIZE, check_size
from vlmfx.errors import InvalidRequest, reason_of, shown


@dataclass(frozen=True, kw_only=True)
class TraceRequest:
    """One request: tokens of its prompt, placeholders included; patches of its images; the most tokens it may be answered with.

    max_tokens is None where the trace does not say, and 0 for a request that wants an embedding."""

    num_tokens: int
    num_patches: int = 0
    max_tokens: int | None = None

    @property
    def is_embedding(self) -> bool:
        return self.max_tokens == 0


LEAST = {"num_tokens": 1, "num_patches": 0, "max_tokens": 0}


def read_trace(path: str | Path) -> list[TraceRequest]:
    """The requests of a file with one JSON object a line; empty lines are passed over. Raises InvalidRequest, which names the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            "trace", f"{path} cannot be read ({reason_of(error)}); name a file of JSON lines."
        ) from None
    requests = [_request(line, f"trace, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not requests:
        raise InvalidRequest("trace", f"{path} holds no request; write one JSON object a line.")
    return requests


def steps(requests: Sequence[TraceRequest], max_num_batched_tokens: int) -> dict[str, list[int]]:
    """The size of each step by program, each request in steps of its own; a program that none of them needs is left out.

    A prompt of more than max_num_batched_tokens is prefilled in chunks. decode has an empty list: how many sequences run together is not
    in a trace. Raises PlanError."""
    check_size("plan: max_num_batched_tokens", max_num_batched_tokens)
    found: dict[str, list[int]] = {"encode": [], "prefill": [], "pool": []}
    for request in requests:
        if request.num_patches:
            found["encode"].append(request.num_patches)
        if request.is_embedding:
            found["pool"].append(request.num_tokens)
        else:
            num_chunks, rest = divmod(request.num_tokens, max_num_batched_tokens)
            found["prefill"] += [max_num_batched_tokens] * num_chunks + [rest] * (rest > 0)
    present = {program: sizes for program, sizes in found.items() if sizes}
    return present | ({"decode": []} if "prefill" in present else {})


def num_requests(requests: Sequence[TraceRequest], program: str) -> int:
    """How many requests need a program."""
    if program == "encode":
        return sum(request.num_patches > 0 for request in requests)
    return sum(request.is_embedding == (program == "pool") for request in requests)


def _request(line: str, at: str) -> TraceRequest:
    """The request of one line."""
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(at, f"it is not JSON ({reason_of(error)}); write one object a line.", found=line) from None
    if not isinstance(value, dict):
        raise InvalidRequest(at, f'it is {shown(value)}, expected an object; write {{"num_tokens": 700}}.', found=value)
    if "num_tokens" not in value:
        raise InvalidRequest(at, "num_tokens is missing; add the number of tokens of the prompt.", found=value)
    for name, size in value.items():
        if name not in LEAST:
            raise InvalidRequest(at, f"it has no field {shown(name)}; use {', '.join(LEAST)}.", found=value)
        if type(size) is not int or not LEAST[name] <= size <= MAX_SIZE:
            expected = f"a whole number from {LEAST[name]} to {MAX_SIZE}"
            raise InvalidRequest(
                at, f"{name} is {shown(size)}, expected {expected}; change it.", found=size, expected=expected
            )
    return TraceRequest(**value)
