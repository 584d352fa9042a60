"""Recorder: what an engine is given and what it does, as plain data in order, so that it can be done again (`vlmfx.replay`).

Requests appear when they begin, with their tensors kept beside, each under the hash of its content; a step's plan before it is launched,
so that it is there when the step brings the process down, and its tokens when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from vlmfx.engine.launched import Drawn, Failure
from vlmfx.engine.observer import Observer
from vlmfx.engine.prefix import media_key, rows_key
from vlmfx.engine.request import SamplingParams
from vlmfx.engine.scheduler import StepPlan
from vlmfx.engine.sequence import Request
from vlmfx.engine.sequence import Sequence as Text
from vlmfx.engine.structured_outputs import StructuredOutputsParams
from vlmfx.errors import VlmfxError
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.processing.inputs import MediaItem, ModelInputs

Line = dict[str, Any]  # by what it is: its first key
Tensors = dict[str, Tensor]


class Recorder(Observer):
    """write takes each line; keep a name and the tensors of that name, which may come again."""

    def __init__(self, write: Callable[[Line], None], keep: Callable[[str, Tensors], None]) -> None:
        self.write, self._keep = write, keep
        self._num_planned = self._num_read = 0

    def began(self, request: Request, inputs: ModelInputs) -> None:
        self.write({
            "request": request.number,
            "prompt": inputs.prompt,
            "token_ids": inputs.token_ids,
            "positions": None if _is_plain(inputs) else inputs.positions.tolist(),
            "next_position": inputs.next_position,
            "feature_index": inputs.feature_index.tolist() if inputs.num_features else None,
            "num_features": inputs.num_features,
            "media": [[item.num_rows, self._kept_vision(item.vision)] for item in inputs.media],
            "embeds": None if inputs.embeds is None else self._kept(rows_key(inputs.embeds), {"embeds": inputs.embeds}),
            "params": _params(request.params),
            **{name: getattr(request, name) for name in ("seed", "priority", "salt", "pools", "dimensions")},
        })  # fmt: skip

    def ended(self, number: int, error: VlmfxError | None) -> None:
        self.write({"end": number, "error": None if error is None else f"{type(error).__name__}: {error}"})

    def forgot(self) -> None:
        self.write({"reset": True})

    def planned(self, plan: StepPlan) -> None:
        self.write({
            "step": self._num_planned,
            "copies": [[*pair] for pair in plan.copies],
            "encode": [item.key.hex() for item in plan.encode],
            "prefill": [[*_name(c.sequence), c.start, c.end, len(c.draws)] for c in plan.prefill],
            "decode": [_name(text) for text in plan.decode],
        })  # fmt: skip
        self._num_planned += 1

    def failed(self, failures: Sequence[Failure]) -> None:
        if failures:
            self.write({"failed": [request.number for request, _ in failures], "of": self._num_planned - 1})

    def read(self, drawn: Sequence[Drawn]) -> None:
        self.write({"drawn": [[*_name(text), token] for text, token, _ in drawn], "of": self._num_read})
        self._num_read += 1

    def pooled(self, requests: Sequence[Request], vectors: Sequence[Tensor | VlmfxError]) -> None:
        rows = [None if isinstance(vector, VlmfxError) else vector.tolist() for vector in vectors]
        self.write({"vectors": [[request.number, row] for request, row in zip(requests, rows, strict=True)]})

    def _kept_vision(self, vision: VisionInputs) -> str:
        tensors = {f.name: getattr(vision, f.name) for f in fields(vision)}
        tensors |= {name: torch.tensor(tensors[name], dtype=torch.float64) for name in ("mean", "std")}
        return self._kept(media_key(vision), {name: tensor for name, tensor in tensors.items() if tensor is not None})

    def _kept(self, key: bytes, tensors: Tensors) -> str:
        self._keep(key.hex(), tensors)
        return key.hex()


def request_of(line: Mapping[str, Any], load: Callable[[str], Tensors]) -> Request:
    """The request that `Recorder.began` wrote, ready to begin. load gives the tensors of a name."""
    ids = line["token_ids"]
    plain = torch.arange(len(ids))
    index = line["feature_index"]
    inputs = ModelInputs(
        prompt=line["prompt"],
        token_ids=ids,
        positions=plain if line["positions"] is None else torch.tensor(line["positions"]),
        next_position=line["next_position"],
        feature_index=torch.full((len(ids),), -1) if index is None else torch.tensor(index),
        num_features=line["num_features"],
        media=tuple(MediaItem(num_rows=num, vision=_vision(load(name))) for num, name in line["media"]),
        embeds=None if line["embeds"] is None else load(line["embeds"])["embeds"],
    )
    form = line["params"]["structured_outputs"]
    params = SamplingParams(
        **line["params"] | {"structured_outputs": None if form is None else StructuredOutputsParams(**form)}
    )
    return Request(
        number=line["request"],
        num_tokens=len(ids),
        load=lambda: inputs,
        params=params,
        arrival=0.0,
        is_ready=True,
        **{name: line[name] for name in ("prompt", "seed", "priority", "salt", "pools", "dimensions")},
    )


def _is_plain(inputs: ModelInputs) -> bool:
    positions = inputs.positions
    return positions.dim() == 1 and torch.equal(positions, torch.arange(len(inputs.token_ids)))


def _params(params: SamplingParams) -> dict[str, Any]:
    found = asdict(params)
    form = params.structured_outputs
    if form is not None:
        found["structured_outputs"] = {form.kind: getattr(form, form.kind)}
    return found


def _vision(tensors: Tensors) -> VisionInputs:
    values: dict[str, Any] = dict(tensors)
    return VisionInputs(**values | {name: tuple(tensors[name].tolist()) for name in ("mean", "std")})


def _name(text: Text) -> list[int]:
    """Of a text: its request's number and which of its texts it is."""
    return [text.request.number, text.completion.index]
