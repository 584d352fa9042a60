"""Replay: a recording is run again, and the first step that goes another way is told; or each of its requests is run alone."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlmfx.compile.buckets import Plan
from vlmfx.engine.drain import drain
from vlmfx.engine.recorder import Line, Recorder, Tensors, request_of
from vlmfx.engine.recording import load_tensors, read_recording
from vlmfx.engine.request import RequestOutput
from vlmfx.engine.sequence import Request
from vlmfx.errors import InternalError, InvalidRequest, reason_of
from vlmfx.llm import LLM

GIVEN = ("request", "end", "reset")  # lines of what the engine was given; the others are what it did
VECTOR_TOLERANCE = 1e-3  # of the numbers of a unit vector
IDLE_STEPS = 3  # that a replay may take between two lines: a step may read the one before it and plan nothing
Drawn = dict[tuple[int, int], list[int]]  # (which request, index of its text) → its tokens


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """num_steps and num_requests were run; differences: in words, none where all went as recorded."""

    num_steps: int
    num_requests: int
    differences: Sequence[str] = ()

    def __str__(self) -> str:
        ran = f"{self.num_steps} steps of {self.num_requests} requests"
        return "\n".join(self.differences) + f"\n{ran} until there" if self.differences else f"{ran}: all as recorded"


def replay(
    path: str | Path, *, model: str | Path | None = None, alone: bool = False, use_tqdm: bool = True, **options: Any
) -> Replayed:
    """Run a recording again, to the first difference; alone: each request by itself instead, and all whose tokens differ are told.

    model and options stand in for those that were recorded: device="cpu", backend="eager" (either without the recorded plan), dtype.
    On the same machine and with the same options every step and token is to be as recorded. Raises InvalidRequest."""
    lines = read_recording(path)
    header = next(lines, None)
    if header is None:
        raise InvalidRequest("file", f"{path} is empty; name a file that --record wrote.", found=str(path))
    llm = _llm_of(header, model, options)
    load = partial(load_tensors, path)
    shown = tqdm(lines, desc="replay", unit="line", disable=not use_tqdm)
    try:
        return _alone(llm, shown, load) if alone else _Replay(llm, load).run(shown)
    finally:
        llm.engine.close()


def _llm_of(header: Line, model: str | Path | None, options: dict[str, Any]) -> LLM:
    name = header["model"] if model is None else model
    if name is None:
        raise InvalidRequest("model", "the recording is of a model that had no name; say which it was.")
    recorded = dict(header["options"])
    if options.keys() & {"device", "backend"}:
        recorded |= {"device": None, "backend": "auto", "plan": None}
    if recorded["plan"] is not None:
        recorded["plan"] = Plan.from_dict(recorded["plan"])
    return LLM(name, **recorded | options)


class _Replay:
    """Drives an engine by the lines of a recording, and holds what it does beside them."""

    def __init__(self, llm: LLM, load: Any) -> None:
        self.engine, self._load = llm.engine, load
        self._made: deque[Line] = deque()
        self._requests: dict[int, Request] = {}
        self._num_steps = 0
        self.engine.observer = Recorder(self._write, _ignore)

    def run(self, lines: Iterator[Line]) -> Replayed:
        for line in lines:
            if (kind := next(iter(line))) in GIVEN:
                self._give(kind, line)
            elif difference := self._difference(kind, line):
                return self._result(difference)
            self._num_steps += kind == "step"
        return self._result()

    def _result(self, *differences: str) -> Replayed:
        return Replayed(num_steps=self._num_steps, num_requests=len(self._requests), differences=differences)

    def _write(self, line: Line) -> None:
        if next(iter(line)) not in GIVEN:
            self._made.append(line)

    def _give(self, kind: str, line: Line) -> None:
        if kind == "request":
            request = self._requests[line["request"]] = request_of(line, self._load)
            self.engine.begin(request)
        elif kind == "reset":
            self.engine.reset_prefix_cache()
        elif line["error"] is None:
            self.engine.abort(line["end"])
        elif line["end"] in self._requests:
            self.engine.end(self._requests[line["end"]], InternalError(line["error"]))

    def _difference(self, kind: str, line: Line) -> str | None:
        """What is another way than a line of the recording says, in words."""
        where = f"step {line.get('step', line.get('of', self._num_steps))}"
        for _ in range(IDLE_STEPS):
            if self._made:
                break
            try:
                self.engine.step()
            except Exception as error:
                return f"{where}: it fails with {type(error).__name__} ({reason_of(error)}), which is not recorded"
        if not self._made:
            return f"{where}: nothing is done, but recorded is {_short(line)}"
        made = self._made.popleft()
        if next(iter(made)) != kind:
            return f"{where}: {_short(made)}, but recorded is {_short(line)}"
        if kind == "drawn":
            return _first_token(made, line, where)
        if kind == "vectors":
            return _first_vector(made, line)
        unlike = [name for name in line if made[name] != line[name]]
        return f"{where}: {unlike[0]} {_short(made[unlike[0]])}, recorded {_short(line[unlike[0]])}" if unlike else None


def _first_token(made: Line, line: Line, where: str) -> str | None:
    for (number, index, token), recorded in zip(made["drawn"], line["drawn"], strict=False):
        if [number, index, token] != recorded:
            other = "{2} of text {1} of request {0}".format(*recorded)
            return f"{where}: text {index} of request {number} draws {token}, recorded is {other}"
    counts = len(made["drawn"]), len(line["drawn"])
    return None if counts[0] == counts[1] else f"{where}: {counts[0]} texts draw, recorded are {counts[1]}"


def _first_vector(made: Line, line: Line) -> str | None:
    for (number, vector), (recorded_number, recorded) in zip(made["vectors"], line["vectors"], strict=False):
        if number != recorded_number or (vector is None) != (recorded is None):
            return f"vectors: of request {number}, recorded is request {recorded_number}, or one of them failed"
        off = max((abs(a - b) for a, b in zip(vector or (), recorded or (), strict=True)), default=0.0)
        if off > VECTOR_TOLERANCE:
            return f"vectors: that of request {number} is off by {off:.2g}"
    counts = len(made["vectors"]), len(line["vectors"])
    return None if counts[0] == counts[1] else f"vectors: {counts[0]} in one pass, recorded are {counts[1]}"


def _alone(llm: LLM, lines: Iterator[Line], load: Any) -> Replayed:
    """Each request for texts by itself in an engine that remembers nothing, its tokens held beside those that were recorded."""
    asked: list[Line] = []
    drawn: Drawn = defaultdict(list)
    newest: dict[int, int] = {}  # request number, which may come again → place in asked
    num_steps = 0
    for line in lines:
        if "request" in line:
            newest[line["request"]] = len(asked)
            asked.append(line)
        for number, index, token in line.get("drawn", ()):
            drawn[newest[number], index].append(token)
        num_steps += "step" in line
    differences: list[str] = []
    for place, line in enumerate(asked):
        if not line["pools"]:
            llm.engine.reset_prefix_cache()
            (output,) = drain(llm.engine, [request_of(line, load)], lambda number, text: None)
            assert isinstance(output, RequestOutput)
            differences += _unlike(
                line["request"], output, [drawn[place, index] for index in range(len(output.outputs))]
            )
    return Replayed(num_steps=num_steps, num_requests=len(asked), differences=differences)


def _unlike(number: int, output: RequestOutput, drawn: Sequence[Sequence[int]]) -> Iterator[str]:
    """Texts that are unlike those that were recorded, in words. What was recorded may end before, or a token after a text's end."""
    if output.error is not None:
        yield f"request {number} fails alone: {output.error}"
        return
    for text, recorded in zip(output.outputs, drawn, strict=True):
        pairs = zip(text.token_ids, recorded, strict=False)
        place = next((place for place, (token, other) in enumerate(pairs) if token != other), None)
        if place is not None:
            what = f"{text.token_ids[place]} at place {place}, recorded is {recorded[place]}"
            yield f"text {text.index} of request {number} draws alone {what}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _ignore(name: str, tensors: Tensors) -> None:
    """The recording has them."""
