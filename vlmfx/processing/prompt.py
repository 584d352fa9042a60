"""From one prompt, in any of the forms a user may write it, to ModelInputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vlmfx.errors import InvalidRequest
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.processing.chat import render_chat, template_takes_parts
from vlmfx.processing.images import MAX_PIXELS, load_image
from vlmfx.processing.inputs import ImageLayout, ModelInputs, expand_placeholders, expanded_length, index_features
from vlmfx.processing.messages import messages_for_template
from vlmfx.processing.tokenizer import Tokenizer

IMAGE_FIELD = "multi_modal_data.image"
PROMPT_KEYS = {"prompt", "prompt_token_ids", "messages", "multi_modal_data", "mm_processor_kwargs"}
REQUEST_SETTINGS = ("min_pixels", "max_pixels")


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What turns prompts into ModelInputs: a family's functions with their config, the tokenizer, the chat template (or None).

    vocab_size is the model's, padded rows included; max_model_len counts prompt and answer together."""

    functions: ModuleType
    config: Any
    tokenizer: Tokenizer
    chat_template: str | None
    vocab_size: int
    max_model_len: int


def prepare(processor: Processor, prompt: Any) -> ModelInputs:
    """ "text" | {"prompt" | "prompt_token_ids" | "messages", "multi_modal_data", "mm_processor_kwargs"} → ModelInputs.

    Raises InvalidRequest for anything about the prompt that cannot work, before any compute."""
    request = _checked_request({"prompt": prompt} if isinstance(prompt, str) else prompt)
    functions, cfg = processor.functions, _request_config(processor, request.get("mm_processor_kwargs", {}))
    text: str | None = request.get("prompt")
    images: Any = request.get("multi_modal_data", {}).get("image")
    if "messages" in request:
        text, images = chat_prompt(processor, request["messages"])
    ids = _ids_of(request["prompt_token_ids"]) if text is None else encode_text(processor, text)
    _check_ids(processor, ids)
    vision, embeds, layouts = _images(functions, cfg, images)
    length = expanded_length(ids, cfg.image_token_id, layouts)
    if not 0 < length < processor.max_model_len:
        raise InvalidRequest(
            "prompt",
            f"it is {length} tokens long, expected 1 to {processor.max_model_len - 1} (max_model_len − 1); "
            + ("shorten it or use fewer or smaller images." if length else "write something."),
            found=length,
            expected=processor.max_model_len - 1,
        )
    expanded = expand_placeholders(ids, cfg.image_token_id, layouts)
    positions, next_position = functions.positions(cfg, expanded, layouts)
    return ModelInputs(
        prompt=text,
        token_ids=expanded,
        positions=positions,
        next_position=next_position,
        feature_index=index_features(expanded, cfg.image_token_id),
        vision=vision() if vision is not None else None,
        embeds=embeds,
    )


def chat_prompt(processor: Processor, messages: Sequence[dict[str, Any]]) -> tuple[str, list[Any]]:
    """The rendered chat prompt with one placeholder an image, and the images in order."""
    if processor.chat_template is None:
        raise InvalidRequest(
            "chat_template", "the checkpoint has none; pass chat_template=… with a Jinja text or a file's path."
        )
    takes_parts = template_takes_parts(processor.chat_template)
    rendered, images = messages_for_template(messages, takes_parts, processor.functions.PLACEHOLDER)
    return render_chat(processor.chat_template, rendered, special_tokens=processor.tokenizer.special_tokens), images


def encode_text(processor: Processor, text: str) -> list[int]:
    """Token ids; a text that begins with the bos token already, as some chat templates write it, does not get a second one."""
    tokenizer = processor.tokenizer
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer.encode(text, add_special_tokens=not has_bos)


def _checked_request(request: Any) -> dict[str, Any]:
    """The request without the keys that hold None. Raises InvalidRequest for anything but one prompt and what goes with it."""
    if not isinstance(request, dict):
        raise InvalidRequest(
            "prompt", f"it is a {type(request).__name__}; pass a string or a dict.", found=type(request).__name__
        )
    unknown = [key for key in request if key not in PROMPT_KEYS]
    if unknown:
        remedy = 'put messages into {"messages": [...]}' if "role" in request else f"use {sorted(PROMPT_KEYS)}"
        raise InvalidRequest("prompt", f"unknown keys {unknown}; {remedy}.", found=unknown)
    request = {key: value for key, value in request.items() if value is not None}
    sources = [key for key in ("prompt", "prompt_token_ids", "messages") if key in request]
    if len(sources) != 1:
        raise InvalidRequest(
            "prompt",
            f'it has {sources or "none"} of "prompt", "prompt_token_ids" and "messages"; give exactly one.',
            found=sources,
        )
    text = request.get("prompt", "not given")
    if not isinstance(text, str) or not text:
        found = "empty" if text == "" else f"a {type(text).__name__}"
        raise InvalidRequest("prompt", f"it is {found}; pass a string of at least one character.", found=text)
    for key in ("multi_modal_data", "mm_processor_kwargs"):
        if not isinstance(request.get(key, {}), dict):
            found = type(request[key]).__name__
            raise InvalidRequest(key, f"it is a {found}; pass a dict.", found=found, expected="dict")
    media = request.get("multi_modal_data", {})
    if "messages" in request and media:
        raise InvalidRequest(
            "multi_modal_data", "it stands beside messages; put the images into the messages as parts."
        )
    others = [key for key in media if key != "image"]
    if others:
        raise InvalidRequest("multi_modal_data", f'it has {others}; pass "image" only.', found=others)
    return request


def _ids_of(value: Any) -> list[Any]:
    """The ids of a list, tuple, array or tensor, as Python numbers."""
    ids = value.tolist() if isinstance(value, (np.ndarray, Tensor)) else value
    if not isinstance(ids, (list, tuple)):
        kind = type(value).__name__
        raise InvalidRequest("prompt_token_ids", f"it is a {kind}; pass a list of integers.", found=kind)
    return [int(i) if isinstance(i, np.integer) else i for i in ids]


def _check_ids(processor: Processor, ids: Sequence[Any]) -> None:
    vocab_size = processor.vocab_size
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise InvalidRequest(
                "prompt_token_ids", f"it holds {i!r}; use integers from 0 to {vocab_size - 1}.", found=i
            )


def _request_config(processor: Processor, settings: dict[str, Any]) -> Any:
    """The family's config with a request's mm_processor_kwargs."""
    known = {f.name for f in fields(processor.config)} & set(REQUEST_SETTINGS)
    for key, value in settings.items():
        if key not in known:
            raise InvalidRequest(
                "mm_processor_kwargs", f'it has "{key}"; this model knows {sorted(known) or "none"}.', found=key
            )
        if type(value) is not int or not 1 <= value <= MAX_PIXELS:
            raise InvalidRequest(
                f"mm_processor_kwargs.{key}", f"it is {value!r}; use 1 to {MAX_PIXELS} pixels.", found=value
            )
    changed = replace(processor.config, **settings) if settings else processor.config
    if settings and changed.min_pixels > changed.max_pixels:
        raise InvalidRequest(
            "mm_processor_kwargs",
            f"min_pixels is {changed.min_pixels} but max_pixels {changed.max_pixels}; make min_pixels the smaller.",
            found=(changed.min_pixels, changed.max_pixels),
        )
    return changed


def _images(functions: ModuleType, cfg: Any, value: Any) -> tuple[Any, Tensor | None, list[ImageLayout]]:
    """(a function that makes the VisionInputs, or None), ready embeddings or None, layouts; pixels are resized only once all is checked."""
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return None, None, []
    if _is_embeds(value):
        rows, layouts = functions.embed_inputs(cfg, value)
        return None, rows, layouts
    images = [load_image(item, field=IMAGE_FIELD) for item in (value if isinstance(value, (list, tuple)) else [value])]
    layouts = [functions.layout(cfg, (image.height, image.width)) for image in images]

    def vision() -> VisionInputs:
        return functions.vision_inputs(cfg, images)

    return vision, None, layouts


def _is_embeds(value: Any) -> bool:
    """Tensors and dicts are embeddings, and so is a list of tensors; PIL images, paths, bytes and uint8 arrays are images."""
    first = value[0] if isinstance(value, (list, tuple)) else value
    return isinstance(first, (Tensor, dict)) and not isinstance(first, Image.Image)
