"""From one prompt, in any of the forms a user may write it, to ModelInputs.

First a Plan, from text and the headers of images and videos alone: it is the one truth about placeholders, and enough to count tokens
and to refuse what cannot work. Then the pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vlmfx.errors import InvalidRequest, shown
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.processing import containers, video
from vlmfx.processing.conversation import KEYS as CHAT_KEYS
from vlmfx.processing.conversation import render as render_conversation
from vlmfx.processing.embed_files import read_files
from vlmfx.processing.embeds import is_plain
from vlmfx.processing.images import image_size, loaded
from vlmfx.processing.inputs import Expanded, Layouts, MediaItem, MediaLayout, ModelInputs, num_rows
from vlmfx.processing.limits import limits_of
from vlmfx.processing.media import MediaPolicy, load_all
from vlmfx.processing.messages import Media
from vlmfx.processing.tokenizer import Tokenizer

IMAGE_FIELD = "multi_modal_data.image"
PROMPT_KEYS = {"prompt", "prompt_token_ids", "messages", "multi_modal_data", "mm_processor_kwargs", "media_io_kwargs"}


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What turns prompts into ModelInputs: a family's functions with their config, the tokenizer, the chat template (or None).

    vocab_size is the model's, padded rows included; max_model_len counts prompt and answer together. limit_mm_per_prompt: the most
    images and videos a prompt may hold, by "image" and "video"; no limit where it says nothing. media_io_kwargs and
    mm_processor_kwargs: how videos are sampled, and the settings of the family, where a prompt does not say.
    media: what may be fetched and read for messages."""

    functions: ModuleType
    config: Any
    tokenizer: Tokenizer
    chat_template: str | None
    vocab_size: int
    max_model_len: int
    limit_mm_per_prompt: Mapping[str, int] = field(default_factory=dict)
    media_io_kwargs: Mapping[str, Any] = field(default_factory=dict)
    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    media: MediaPolicy = field(default_factory=MediaPolicy)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A prompt whose tokens are known and whose pixels are not: config is the family's with the request's settings, layouts those of
    its images and videos, whose sources wait in images and videos, the latter beside the frames to take; embeds (rows, hidden) stand
    in the images' place where they came ready."""

    prompt: str | None
    config: Any
    expanded: Expanded
    layouts: Layouts
    images: list[Any]
    videos: list[tuple[Any, video.VideoPlan]]
    embeds: Tensor | None


def plan(processor: Processor, prompt: Any) -> Plan:
    """ "text" | {"prompt" | "prompt_token_ids" | "messages", "multi_modal_data", "mm_processor_kwargs", "media_io_kwargs"} → Plan.

    No image is decoded, and of a video file one frame. Raises InvalidRequest for anything about the prompt that cannot work."""
    request = _checked_request({"prompt": prompt} if isinstance(prompt, str) else prompt)
    functions, cfg = processor.functions, _request_config(processor, request.get("mm_processor_kwargs", {}))
    text: str | None = request.get("prompt")
    media = request.get("multi_modal_data", {})
    given, given_videos = read_files(media.get("image"), IMAGE_FIELD), video.videos_of(media.get("video"))
    if "messages" in request:
        text, chat_media = chat_prompt(processor, request)
        given, given_videos = chat_media["image"], chat_media["video"]
    elif text is not None:
        check_text(processor, text)
    source: str | list[int] = text if text is not None else _ids_of(processor, request["prompt_token_ids"])
    images, embeds, image_layouts = _images(functions, cfg, given, processor.media.max_image_pixels)
    videos = _videos(processor, given_videos, request.get("media_io_kwargs"))
    if videos and embeds is not None:
        raise InvalidRequest(
            "multi_modal_data", "it has both image embeddings and a video; pass the image itself, or two prompts."
        )
    layouts = {"image": image_layouts, "video": [functions.video_layout(cfg, made) for _, made in videos]}
    check_count_of(processor, "image", len(image_layouts))
    _check_length(processor, sum(num_rows(items) for items in layouts.values()), at_least=True)
    expanded = functions.expand(cfg, processor.tokenizer, source, layouts)
    _check_length(processor, len(expanded.token_ids))
    return Plan(
        prompt=text, config=cfg, expanded=expanded, layouts=layouts, images=images, videos=videos, embeds=embeds
    )


def prepare(processor: Processor, prompt: Any) -> ModelInputs:
    """A prompt, as `plan` takes it → ModelInputs. Raises InvalidRequest before any compute of the model's."""
    return complete(processor, plan(processor, prompt))


def complete(processor: Processor, made: Plan) -> ModelInputs:
    """A plan with its pixels decoded. Raises InvalidRequest for an image or video that is damaged behind its header."""
    functions = processor.functions
    ids = made.expanded.token_ids
    positions, next_position = functions.positions(made.config, ids, made.layouts)
    vision = []
    for source in made.images:  # each is let go before the next is decoded
        with loaded(source, field=IMAGE_FIELD) as image:
            vision.append(functions.vision_inputs(made.config, [image]))
            del image
    vision += [
        functions.video_inputs(made.config, chosen, video.frames(source, chosen)) for source, chosen in made.videos
    ]
    rows = [layout.num_rows for kind in ("image", "video") for layout in made.layouts.get(kind, ())]
    return ModelInputs(
        prompt=made.prompt,
        token_ids=ids,
        positions=positions,
        next_position=next_position,
        feature_index=made.expanded.feature_index,
        num_features=sum(rows),
        media=tuple(MediaItem(num_rows=n, vision=v) for n, v in zip(rows, vision, strict=True)) if vision else (),
        embeds=made.embeds,
    )


def example_vision(processor: Processor) -> VisionInputs:
    """What encode is given for a small picture."""
    mark = processor.functions.PLACEHOLDERS["image"].format(number=1)
    prompt = {"prompt": mark, "multi_modal_data": {"image": Image.new("RGB", (56, 56))}}
    vision = prepare(processor, prompt).vision
    assert vision is not None
    return vision


def count_tokens(processor: Processor, prompt: Any) -> int:
    """The length of a prompt in tokens, placeholders expanded, from headers as in `plan`. Raises InvalidRequest as `plan` does."""
    return len(plan(processor, prompt).expanded.token_ids)


def chat_prompt(processor: Processor, request: Mapping[str, Any]) -> tuple[str, dict[str, list[Any]]]:
    """The rendered chat prompt of a request with "messages", one placeholder an image or video, and those by modality in order.

    URLs are fetched, once it is known that there are not too many and that the text is not too long."""

    def check(media: Sequence[Media]) -> None:
        for modality in ("image", "video"):
            check_count_of(processor, modality, sum(m.modality == modality for m in media))
        _check_length(processor, len(media), at_least=True)

    text, media = render_conversation(
        request,
        template=processor.chat_template,
        placeholders=processor.functions.PLACEHOLDERS,
        special_tokens=processor.tokenizer.special_tokens,
        reads_files=processor.media.allow_paths,
        check=check,
    )
    check_text(processor, text)
    loaded: dict[str, list[Any]] = {"image": [], "video": []}
    for item, value in zip(media, load_all(media, processor.media), strict=True):
        loaded[item.modality].append(value)
    return text, loaded


def with_options(
    processor: Processor,
    limit_mm_per_prompt: Any,
    media: Mapping[str, Any],
    media_io_kwargs: Any = None,
    mm_processor_kwargs: Any = None,
) -> Processor:
    """The processor with other limits, sampling of videos, settings (None leaves what there is) and fields of its MediaPolicy.

    Raises InvalidRequest."""
    settings = processor.mm_processor_kwargs if mm_processor_kwargs is None else check_settings(mm_processor_kwargs)
    _request_config(processor, settings)
    limits = processor.limit_mm_per_prompt if limit_mm_per_prompt is None else limits_of(limit_mm_per_prompt)
    sampling = processor.media_io_kwargs if media_io_kwargs is None else media_io_kwargs
    video.sampling_of(sampling)
    return replace(
        processor,
        limit_mm_per_prompt=limits,
        media=replace(processor.media, **media),
        media_io_kwargs=sampling,
        mm_processor_kwargs=settings,
    )


def check_settings(value: Any) -> Mapping[str, Any]:
    """mm_processor_kwargs, once it is known to be a mapping; what it may hold is the family's to say. Raises InvalidRequest."""
    if not isinstance(value, Mapping):
        found = type(value).__name__
        raise InvalidRequest("mm_processor_kwargs", f"it is a {found}; pass a dict.", found=found, expected="dict")
    return value


def _checked_request(request: Any) -> dict[str, Any]:
    """The request without the keys that hold None. Raises InvalidRequest for anything but one prompt and what goes with it."""
    if not isinstance(request, dict):
        raise InvalidRequest(
            "prompt", f"it is a {type(request).__name__}; pass a string or a dict.", found=type(request).__name__
        )
    unknown = [key for key in request if key not in PROMPT_KEYS | CHAT_KEYS]
    if unknown:
        remedy = 'put messages into {"messages": [...]}' if "role" in request else f"use {sorted(PROMPT_KEYS)}"
        raise InvalidRequest("prompt", f"unknown keys {shown(unknown)}; {remedy}.", found=unknown)
    request = {key: value for key, value in request.items() if value is not None}
    sources = [key for key in ("prompt", "prompt_token_ids", "messages") if key in request]
    if len(sources) != 1:
        raise InvalidRequest(
            "prompt",
            f'it has {sources or "none"} of "prompt", "prompt_token_ids" and "messages"; give exactly one.',
            found=sources,
        )
    alone = sorted(CHAT_KEYS & set(request)) if "messages" not in request else []
    if alone:
        raise InvalidRequest("prompt", f"it has {alone} without messages; remove them, or give messages.", found=alone)
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
    others = [key for key in media if key not in ("image", "video")]
    if others:
        raise InvalidRequest(
            "multi_modal_data", f'it has {shown(others)}; pass "image" and "video" only.', found=others
        )
    return request


def _ids_of(processor: Processor, value: Any) -> list[int]:
    """The ids of a list, tuple, array or tensor, as Python numbers, each in the vocabulary."""
    is_array = isinstance(value, np.ndarray) or (isinstance(value, Tensor) and is_plain(value))
    ids = value.tolist() if is_array else value
    if not isinstance(ids, (list, tuple)):
        kind = type(value).__name__
        raise InvalidRequest("prompt_token_ids", f"it is a {kind}; pass a list of integers.", found=kind)
    ids = [int(i) if isinstance(i, np.integer) else i for i in ids]
    for i in ids:
        if type(i) is not int or not 0 <= i < processor.vocab_size:
            raise InvalidRequest(
                "prompt_token_ids", f"it holds {shown(i)}; use integers from 0 to {processor.vocab_size - 1}.", found=i
            )
    return ids


def check_count_of(processor: Processor, modality: str, count: int) -> None:
    """Raise InvalidRequest for more images or videos than limit_mm_per_prompt allows."""
    limit = processor.limit_mm_per_prompt.get(modality)
    if limit is not None and count > limit:
        raise InvalidRequest(
            f"multi_modal_data.{modality}",
            f"{count} were given but limit_mm_per_prompt allows {limit} {modality}{'s' * (limit != 1)} a prompt; remove some.",
            found=count,
            expected=limit,
        )


def check_text(processor: Processor, text: str) -> None:
    """Refuse a text that is too long for the model, before it is tokenized, where that can be told; none that would fit."""
    _check_length(processor, processor.tokenizer.least_tokens(text, processor.max_model_len - 1), at_least=True)


def _check_length(processor: Processor, length: int, *, at_least: bool = False) -> None:
    """Refuse a prompt of `length` tokens, or of at least so many, that does not leave room for one more."""
    most = processor.max_model_len - 1
    if length > most or not (length or at_least):
        raise InvalidRequest(
            "prompt",
            f"it is {'at least ' if at_least else ''}{length} tokens long, expected 1 to {most} (max_model_len − 1); "
            + ("shorten it or use fewer or smaller images." if length else "write something."),
            found=length,
            expected=most,
        )


def _request_config(processor: Processor, settings: Mapping[str, Any]) -> Any:
    """The family's config with a request's mm_processor_kwargs, which win over the processor's."""
    settings = {**processor.mm_processor_kwargs, **settings}
    known: Mapping[str, range] = processor.functions.REQUEST_SETTINGS
    for key, value in settings.items():
        if key not in known:
            raise InvalidRequest(
                "mm_processor_kwargs", f"it has {shown(key)}; this model knows {sorted(known) or 'none'}.", found=key
            )
        is_switch = known[key] == range(2) and type(value) is bool
        if not is_switch and (type(value) is not int or value not in known[key]):
            raise InvalidRequest(
                f"mm_processor_kwargs.{key}",
                f"it is {shown(value)}; use an integer from {known[key][0]} to {known[key][-1]}.",
                found=value,
            )
    # A family has its own where settings are not plain fields.
    change = getattr(processor.functions, "request_config", replace)
    return change(processor.config, **settings) if settings else processor.config


def _images(
    functions: ModuleType, cfg: Any, value: Any, max_pixels: int
) -> tuple[list[Any], Tensor | None, list[MediaLayout]]:
    """(images, still as they were given; ready embeddings or None; layouts)."""
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return [], None, []
    if _is_embeds(value):
        rows, layouts = functions.embed_inputs(cfg, value)
        return [], rows, layouts
    images = list(value) if isinstance(value, (list, tuple)) else [value]
    sizes = (image_size(item, field=IMAGE_FIELD, max_pixels=max_pixels) for item in images)
    return images, None, [functions.layout(cfg, size) for size in sizes]


def _videos(processor: Processor, given: list[Any], settings: Any) -> list[tuple[Any, video.VideoPlan]]:
    """Each video as it was given, with the frames to take. Raises InvalidRequest."""
    if given and not hasattr(processor.functions, "video_layout"):
        raise InvalidRequest(video.FIELD, "this model takes no videos; pass some of its frames as images.")
    sampling = video.sampling_of(processor.media_io_kwargs if settings is None else settings)
    check_count_of(processor, "video", len(given))
    made = [(item, video.probe(item, sampling)) for item in given]
    for _, chosen in made:
        containers.check_size(chosen.width, chosen.height, video.FIELD, processor.media.max_image_pixels)
    return made


def _is_embeds(value: Any) -> bool:
    """Tensors and dicts are embeddings, and so is a list of tensors; PIL images, paths, bytes and uint8 arrays are images."""
    first = value[0] if isinstance(value, (list, tuple)) else value
    return isinstance(first, (Tensor, dict)) and not isinstance(first, Image.Image)
