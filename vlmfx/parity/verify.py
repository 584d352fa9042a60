"""verify: a model against goldens or against transformers, as a Report."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmfx import checkpoint
from vlmfx.checkpoint import Model
from vlmfx.device import resolve_device, resolve_dtype
from vlmfx.errors import InvalidRequest, VlmfxError
from vlmfx.hub import SCENES, resolve
from vlmfx.parity import goldens
from vlmfx.parity.reference import Reference
from vlmfx.parity.report import NARROW_SHARE, Comparison, Report, compare
from vlmfx.parity.stages import STAGES, greedy, stage_of, stages
from vlmfx.processing.chat import template_takes_parts
from vlmfx.processing.images import load_image
from vlmfx.processing.inputs import ModelInputs
from vlmfx.processing.prompt import Processor, plan, prepare

DEMO = SCENES.parent / "demo.png"
NUM_GREEDY = 16


def verify(
    model: str | Path | Model,
    *,
    golden: str | Path | None = None,
    against: str | None = None,
    images: Sequence[str | Path | Image.Image] = (),
    prompt: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
) -> Report:
    """Every stage of a model beside a reference's: ids, pixels, vision, projected, merged, positions, logits, greedy.

    golden: a folder with a golden case, or with cases that name this model. against: "transformers", run here on the same folder,
    asked `prompt` about `images` (the shipped picture and a question about it where neither is given). A Model given loaded keeps
    its own dtype and device. Raises InvalidRequest or CheckpointError where there is nothing to compare."""
    if (golden is None) == (against is None) or against not in (None, "transformers"):
        raise InvalidRequest("against", 'pass either golden=DIR or against="transformers".', found=against)
    if golden is not None:
        if images or prompt is not None:
            raise InvalidRequest("golden", "a golden case brings its prompt and images; leave out prompt and images.")
        return _verify_goldens(model, golden, dtype, device)
    return _verify_transformers(model, images, prompt, dtype, device)


def _loaded(model: str | Path | Model, dtype: str | torch.dtype, device: str | torch.device | None) -> Model:
    return model if isinstance(model, Model) else checkpoint.load(model, dtype=dtype, device=device)


def _folder(model: str | Path | Model) -> Path:
    return resolve(model.name if isinstance(model, Model) else model)


def _report(model: Model, reference: str, comparisons: Iterator[Comparison]) -> Report:
    return Report(
        model=model.name,
        reference=reference,
        dtype=str(model.dtype).removeprefix("torch."),
        comparisons=tuple(comparisons),
    )


def _verify_goldens(
    model: str | Path | Model, root: str | Path, dtype: str | torch.dtype, device: str | torch.device | None
) -> Report:
    cases = goldens.find(root, _folder(model))
    loaded = _loaded(model, dtype, device)

    def run() -> Iterator[Comparison]:
        for case in cases:
            yield from _same_prompt(loaded.processor, case)
            yield from _compared(loaded, case.case, case.request(), case.values, case)

    return _report(loaded, str(root), run())


def _same_prompt(processor: Processor, case: goldens.GoldenPrompt) -> Iterator[Comparison]:
    """Whether the chat template renders the case's messages as the reference did; nothing where it took no messages."""
    chat = case.chat()
    if chat is None or "greedy_ids" not in case.values:  # embeddings have templates of their own
        return
    try:
        text = plan(processor, {**chat, "mm_processor_kwargs": case.request()["mm_processor_kwargs"]}).prompt
    except VlmfxError as error:
        yield Comparison(case=case.case, stage="ids", name="prompt", is_ok=False, note=str(error))
        return
    yield compare(case.case, "ids", "prompt", _code_points(text or ""), _code_points(case.text), is_narrow=False)


def _verify_transformers(
    model: str | Path | Model,
    images: Sequence[str | Path | Image.Image],
    prompt: str | None,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
) -> Report:
    if not images and prompt is None:
        images = [DEMO]
    question = DEMO.with_suffix(".txt").read_text(encoding="utf-8").splitlines()[0] if prompt is None else prompt
    pictures = [load_image(image, field="image") for image in images]
    if isinstance(model, Model):
        processor, compute, target = model.processor, model.dtype, model.device
    else:
        processor, target = checkpoint.load_only_processor(model), resolve_device(device)
        compute = resolve_dtype(dtype, target, torch.float32)
    # The reference first, and gone before our weights come, so that memory need not hold both.
    reference = Reference(_folder(model), dtype=compute, device=target)
    parts = [{"type": "image", "image": picture} for picture in pictures]
    request: dict[str, Any] = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]}
    if processor.chat_template is None:
        text = _plain_text(processor, len(pictures), question)
        request = {"prompt": text, "multi_modal_data": {"image": pictures}}
    else:
        text = reference.render([_message(processor, len(pictures), question)], processor.chat_template)
    theirs = reference.values(text, pictures, num_greedy=NUM_GREEDY)
    name, reference = reference.name, None  # type: ignore[assignment]
    loaded = _loaded(model, compute, target)
    return _report(loaded, name, _compared(loaded, "", request, theirs, None, text))


def _message(processor: Processor, num_images: int, question: str) -> dict[str, Any]:
    """A user's message as the template takes it: parts, or one text with placeholders."""
    assert processor.chat_template is not None
    if template_takes_parts(processor.chat_template):
        parts: list[dict[str, Any]] = [{"type": "image"}] * num_images
        return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    return {"role": "user", "content": _plain_text(processor, num_images, question)}


def _plain_text(processor: Processor, num_images: int, question: str) -> str:
    mark = processor.functions.PLACEHOLDERS["image"]
    return "".join(mark.format(number=i) + "\n" for i in range(1, num_images + 1)) + question


def _compared(
    model: Model,
    case: str,
    request: dict[str, Any],
    theirs: Mapping[str, Tensor],
    golden: goldens.GoldenPrompt | None,
    text: str | None = None,
) -> Iterator[Comparison]:
    """One request on our side against a reference's values, stage by stage, with a row for each stage that is not compared."""
    is_narrow = model.dtype != torch.float32
    seen: set[str] = set()
    try:
        inputs = prepare(model.processor, request)
    except VlmfxError as error:
        yield Comparison(case=case, stage="ids", name="input_ids", is_ok=False, note=str(error))
        return
    if text is not None and inputs.prompt is not None:
        yield compare(case, "ids", "prompt", _code_points(inputs.prompt), _code_points(text), is_narrow=is_narrow)
    rows: dict[str, list[Comparison]] = {stage: [] for stage in STAGES}
    for name, value in _mine(model, inputs, theirs):
        seen.add(name)
        stage = stage_of(name)
        assert stage is not None, f"{name} has no stage"
        if name not in theirs:
            continue
        if name == "greedy_margins" and is_narrow:
            continue
        row = compare(
            case, stage, name, value, theirs[name], is_narrow=is_narrow, sample=golden.sample(name) if golden else None
        )
        rows[stage].append(_excused(row, value, theirs) if name == "greedy_ids" and is_narrow else row)
    for name in theirs.keys() - seen:
        stage = stage_of(name) or "logits"
        rows[stage].append(Comparison(case=case, stage=stage, name=name, note="vlmfx shows no such value"))
    for stage, found in rows.items():
        yield from found or [Comparison(case=case, stage=stage, name="–", note=_why_not(stage, inputs, golden))]


def _mine(model: Model, inputs: ModelInputs, theirs: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from stages(model, inputs, [int(name[10:]) for name in theirs if re.fullmatch(r"embedding_\d+", name)])
    if "greedy_ids" in theirs:
        yield from greedy(model, inputs, len(theirs["greedy_ids"]))


def _excused(row: Comparison, mine: Tensor, theirs: Mapping[str, Tensor]) -> Comparison:
    """In a narrow type the first other token is no fault where the reference itself was about as sure of two."""
    if row.is_ok or not row.where or "greedy_margins" not in theirs:
        return row
    step = row.where[0]
    spread = float(theirs["last_logits"].max() - theirs["last_logits"].min())
    margin = float(theirs["greedy_margins"][step])
    if margin > 2 * NARROW_SHARE * spread:
        return row
    return replace(row, is_ok=True, note=f"other tokens from step {step} on, where the margin is {margin:.3g}")


def _why_not(stage: str, inputs: ModelInputs, golden: goldens.GoldenPrompt | None) -> str:
    if stage in ("pixels", "vision", "projected") and inputs.vision is None:
        return "no pixels in this prompt"
    return "the golden does not hold it" if golden else "the reference does not expose it"


def _code_points(text: str) -> Tensor:
    return torch.tensor([ord(c) for c in text], dtype=torch.int64)
