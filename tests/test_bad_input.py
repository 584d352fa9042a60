"""What cannot work is refused in one sentence before any compute, and the other prompts of a batch are not harmed."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import invariants
from tests.golden_cases import EVERY, TINY, load_model
from tests.pictures import about, encoded, mixed, picture, placeholder
from vlmfx import LLM, InvalidRequest, SamplingParams
from vlmfx.checkpoint import Model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PNG = encoded(picture(40, 30))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


# 60,000 x 60,000 pixels in 70 bytes
BOMB = (
    PNG[:8]
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(b""))
    + chunk(b"IEND", b"")
)


def embeds(model: Model, rows: int, width: int | None = None, fill: float = 0.5) -> torch.Tensor:
    return torch.full((rows, width or model.config.text.hidden_size), fill)


def with_image(model: Model, value: Any, count: int = 1) -> dict[str, Any]:
    return {
        "prompt": "".join(placeholder(model, n + 1) for n in range(count)) + "What?",
        "multi_modal_data": {"image": value},
    }


def text(model: Model, **keys: Any) -> dict[str, Any]:
    return {"prompt": "What?", **keys}


def message(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


HUGE = 10**5000  # more digits than str() gives


class Mute:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


Build = Callable[[Model], Any]
IMAGE = "multi_modal_data.image"

# name → the prompt, the field of the error, what its message says (found, and what to do)
ANY_FAMILY: dict[str, tuple[Build, str, str]] = {
    "more placeholders than images": (
        lambda m: with_image(m, picture(40, 30), 2),
        "prompt",
        "2 image placeholders but 1 image was given; add an image or remove a placeholder",
    ),
    "fewer placeholders than images": (
        lambda m: with_image(m, [picture(40, 30)] * 3, 1),
        "prompt",
        "1 image placeholder but 3 images were given; add a placeholder or remove an image",
    ),
    "a placeholder and no image": (placeholder, "prompt", "but 0 images were given"),
    "an image and no placeholder": (
        lambda m: text(m, multi_modal_data={"image": picture(9, 9)}),
        "prompt",
        "0 image placeholders but 1 image was given",
    ),
    "half of an image": (lambda m: about(m, PNG[: len(PNG) // 2]), IMAGE, "cannot be read .*; send a whole PNG"),
    "the header of an image": (lambda m: about(m, PNG[:20]), IMAGE, "cannot be read .*; send a whole PNG"),
    "an empty image": (lambda m: about(m, b""), IMAGE, "0 bytes; send the whole file"),
    "bytes that are no image": (lambda m: about(m, b"<html>" * 99), IMAGE, "cannot be read"),
    "a decompression bomb": (lambda m: about(m, BOMB), IMAGE, "decompression bomb"),
    "a file that is not there": (lambda m: about(m, "no/such/picture.png"), IMAGE, "is not a file; give the path"),
    "a number as image": (lambda m: about(m, 7), IMAGE, "type int is not supported; give a PIL image"),
    "None as image": (lambda m: about(m, None), IMAGE, "type NoneType is not supported"),
    "a float array as image": (lambda m: about(m, np.zeros((4, 4, 3))), IMAGE, "float64 .*; give uint8"),
    "a PDF": (lambda m: about(m, b"%PDF-1.4\n" + bytes(99)), IMAGE, "cannot be read"),
    "a line 300 pixels long": (lambda m: about(m, Image.new("RGB", (300, 1))), IMAGE, "300 x 1, a ratio over .*; crop"),
    "a line 300 pixels high": (lambda m: about(m, Image.new("RGB", (1, 300))), IMAGE, "1 x 300, a ratio over .*; crop"),
    "a prompt over the context": (
        lambda m: "word " * m.max_model_len,
        "prompt",
        r"tokens long, expected 1 to \d+ .*; shorten it",
    ),
    "images over the context": (
        lambda m: about(m, *[picture(84, 84)] * (m.max_model_len // 9)),
        "prompt",
        "tokens long, .*; shorten it or use fewer or smaller images",
    ),
    "an empty prompt": (lambda m: "", "prompt", "it is empty; pass a string"),
    "an empty prompt in a dict": (lambda m: {"prompt": ""}, "prompt", "it is empty; pass a string"),
    "no ids": (lambda m: {"prompt_token_ids": []}, "prompt", "0 tokens long, .*; write something"),
    "no messages": (lambda m: {"messages": []}, "messages", "at least one message is expected"),
    "nothing": (lambda m: {}, "prompt", 'it has none of "prompt"'),
    "None": (lambda m: None, "prompt", "it is a NoneType; pass a string or a dict"),
    "a number": (lambda m: 5, "prompt", "it is a int; pass a string or a dict"),
    "a number in a dict": (lambda m: {"prompt": 5}, "prompt", "it is a int; pass a string"),
    "two prompts in one": (
        lambda m: text(m, prompt_token_ids=[1]),
        "prompt",
        r"\['prompt', 'prompt_token_ids'\] of .*; give exactly one",
    ),
    "an unknown key": (lambda m: text(m, images=[1]), "prompt", r"unknown keys \['images'\]; use "),
    "keys of several types": (lambda m: text(m, **{"a": 1}) | {3: 4}, "prompt", r"unknown keys \['a', 3\]; use "),
    "an unknown modality": (
        lambda m: text(m, multi_modal_data={"audio": 1}),
        "multi_modal_data",
        'pass "image" and "video" only',
    ),
    "images beside the dict": (
        lambda m: text(m, multi_modal_data=[picture(4, 4)]),
        "multi_modal_data",
        "it is a list; pass a dict",
    ),
    "images beside messages": (
        lambda m: message("Hi") | {"multi_modal_data": {"image": picture(4, 4)}},
        "multi_modal_data",
        "it stands beside messages; put the images into the messages",
    ),
    "an id beyond the vocabulary": (
        lambda m: {"prompt_token_ids": [1, 448]},
        "prompt_token_ids",
        "it holds 448; use integers from 0 to 447",
    ),
    "a negative id": (lambda m: {"prompt_token_ids": [-1]}, "prompt_token_ids", "it holds -1; use integers"),
    "ids that are floats": (lambda m: {"prompt_token_ids": [1.5]}, "prompt_token_ids", "it holds 1.5; use integers"),
    "ids that are a bool": (lambda m: {"prompt_token_ids": [True]}, "prompt_token_ids", "it holds True; use integers"),
    "a batch of ids": (
        lambda m: {"prompt_token_ids": [[1, 2]]},
        "prompt_token_ids",
        r"it holds \[1, 2\]; use integers",
    ),
    "an id alone": (lambda m: {"prompt_token_ids": 5}, "prompt_token_ids", "it is a int; pass a list"),
    "an unknown setting": (lambda m: text(m, mm_processor_kwargs={"crops": 1}), "mm_processor_kwargs", "'crops'; this"),
    "settings that are no dict": (lambda m: text(m, mm_processor_kwargs=[1]), "mm_processor_kwargs", "pass a dict"),
    "an unknown setting of 5001 digits": (
        lambda m: text(m, mm_processor_kwargs={HUGE: 1}),
        "mm_processor_kwargs",
        "this model knows",
    ),
    "an unknown key of 5001 digits": (lambda m: text(m) | {HUGE: 1}, "prompt", "unknown keys .*; use"),
    "an unknown modality of 5001 digits": (
        lambda m: text(m, multi_modal_data={HUGE: 1}),
        "multi_modal_data",
        'pass "image" and "video" only',
    ),
    "an id of 5001 digits": (lambda m: {"prompt_token_ids": [HUGE]}, "prompt_token_ids", "it holds .*; use integers"),
    "an id that cannot be shown": (
        lambda m: {"prompt_token_ids": [Mute()]},
        "prompt_token_ids",
        "it holds .*Mute.*; use integers",
    ),
    "ids 5000 lists deep": (
        lambda m: {"prompt_token_ids": deep(5000)},
        "prompt_token_ids",
        "it holds .*; use integers",
    ),
    "ids without values": (
        lambda m: {"prompt_token_ids": torch.ones(2, dtype=torch.int64, device="meta")},
        "prompt_token_ids",
        "it is a Tensor; pass a list of integers",
    ),
    "a list that holds itself as image": (lambda m: with_image(m, itself()), IMAGE, "type list is not supported"),
    "an image 5000 lists deep": (lambda m: with_image(m, deep(5000)), IMAGE, "type list is not supported"),
    "a list that holds itself in a part": (
        lambda m: message([{"type": "image", "image": itself()}]),
        IMAGE,
        "type list is not supported",
    ),
    "a sampling of 5001 digits": (
        lambda m: text(m, media_io_kwargs={"video": {"num_frames": HUGE}}),
        "media_io_kwargs.video.num_frames",
        "use an integer from 1 to",
    ),
    "a content format of 5001 digits": (
        lambda m: message("Hi") | {"chat_template_content_format": HUGE},
        "chat_template_content_format",
        "use one of auto",
    ),
    "a flag of 5001 digits": (
        lambda m: message("Hi") | {"add_generation_prompt": HUGE},
        "add_generation_prompt",
        "pass True or False",
    ),
    "a part whose type has 5001 digits": (lambda m: message([{"type": HUGE}]), "messages[0].content[0]", "use one of"),
    "half a surrogate pair": (lambda m: "\ud83d", "prompt", "not valid Unicode .*; remove it|remove it"),
    "an unknown part": (
        lambda m: message([{"type": "audio", "audio": b""}]),
        r"messages[0].content[0]",
        "'audio' are not known; use one of",
    ),
    "a web address": (
        lambda m: message([{"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}]),
        r"messages[0].content[0]",
        "its host has no public address; use a public host or send the file itself",
    ),
    "embeddings of another width": (
        lambda m: with_image(m, embeds(m, 36, 7)),
        IMAGE,
        r"shape \(36, 7\), expected \(rows, (48|32)\).*; pass features that are projected|came without their grid; pass",
    ),
    "embeddings that are integers": (
        lambda m: with_image(m, torch.ones(36, 48, dtype=torch.int64)),
        IMAGE,
        "a tensor of torch.int64; pass a floating-point tensor|came without their grid; pass",
    ),
}

LLAVA: dict[str, tuple[Build, str, str]] = {
    "embeddings with too few rows": (
        lambda m: with_image(m, embeds(m, 35)),
        IMAGE,
        "have 35 rows but an image fills 36; pass all rows",
    ),
    "no rows": (lambda m: with_image(m, embeds(m, 0)), IMAGE, "have 0 rows but an image fills 36"),
    "embeddings of two images for one": (
        lambda m: with_image(m, embeds(m, 72)),
        "prompt",
        "1 image placeholder but 2 images were given",
    ),
    "embeddings with NaN": (
        lambda m: with_image(m, embeds(m, 36, fill=float("nan"))),
        IMAGE,
        "not finite; check what made them",
    ),
    "infinite embeddings": (lambda m: with_image(m, embeds(m, 36, fill=float("inf"))), IMAGE, "not finite"),
    "embeddings of four dimensions": (lambda m: with_image(m, embeds(m, 36)[None, None]), IMAGE, "expected"),
    "an embedding and an image": (
        lambda m: with_image(m, [embeds(m, 36), picture(4, 4)], 2),
        IMAGE,
        "embeddings are Image; pass a floating-point tensor",
    ),
    "an image and an embedding": (
        lambda m: with_image(m, [picture(4, 4), embeds(m, 36)], 2),
        IMAGE,
        "type Tensor is not supported",
    ),
}


def grid(model: Model, rows: torch.Tensor, value: Any) -> dict[str, Any]:
    return with_image(model, {"image_embeds": rows, "image_grid_thw": value})


QWEN2_VL: dict[str, tuple[Build, str, str]] = {
    "embeddings without a grid": (
        lambda m: with_image(m, embeds(m, 4)),
        IMAGE,
        'came without their grid; pass {"image_embeds": rows, "image_grid_thw": grid}',
    ),
    "a dict without a grid": (lambda m: with_image(m, {"image_embeds": embeds(m, 4)}), IMAGE, "without their grid"),
    "a grid without embeddings": (
        lambda m: with_image(m, {"image_grid_thw": [[1, 4, 4]]}),
        IMAGE,
        "without their grid",
    ),
    "rows that the grid does not ask for": (
        lambda m: grid(m, embeds(m, 5), [[1, 4, 4]]),
        f"{IMAGE}.image_embeds",
        r"5 rows but image_grid_thw \[\(1, 4, 4\)\] asks for 4; pass the grid of these images",
    ),
    "embeddings of another width": (
        lambda m: grid(m, embeds(m, 4, 9), [[1, 4, 4]]),
        IMAGE,
        r"shape \(4, 9\), expected",
    ),
    "embeddings with NaN": (
        lambda m: grid(m, embeds(m, 4, fill=float("nan")), [[1, 4, 4]]),
        IMAGE,
        "not finite; check what made them",
    ),
    "an odd grid": (
        lambda m: grid(m, embeds(m, 4), [[1, 3, 4]]),
        f"{IMAGE}.image_grid_thw",
        "multiples of 2 .*; count",
    ),
    "an empty image in the grid": (lambda m: grid(m, embeds(m, 4), [[0, 4, 4]]), f"{IMAGE}.image_grid_thw", "time ≥ 1"),
    "a negative grid": (lambda m: grid(m, embeds(m, 4), [[1, -4, -4]]), f"{IMAGE}.image_grid_thw", "multiples of 2"),
    "a grid of two numbers": (
        lambda m: grid(m, embeds(m, 4), [[4, 4]]),
        f"{IMAGE}.image_grid_thw",
        "expected integers",
    ),
    "a grid of floats": (
        lambda m: grid(m, embeds(m, 4), [[1.0, 4, 4]]),
        f"{IMAGE}.image_grid_thw",
        "expected integers",
    ),
    "a grid of words": (lambda m: grid(m, embeds(m, 4), "1x4x4"), f"{IMAGE}.image_grid_thw", "expected integers"),
    "no grid": (lambda m: grid(m, embeds(m, 4), None), f"{IMAGE}.image_grid_thw", "expected integers"),
    "a ratio over 200": (
        lambda m: about(m, Image.new("RGB", (2001, 10))),
        IMAGE,
        "2001 x 10, a ratio over 200; crop it",
    ),
    "pixels below one": (
        lambda m: about(m, picture(9, 9)) | {"mm_processor_kwargs": {"max_pixels": 0}},
        "mm_processor_kwargs.max_pixels",
        "it is 0; use an integer from 1 to",
    ),
    "a number of pixels beyond any float": (
        lambda m: about(m, picture(9, 9)) | {"mm_processor_kwargs": {"max_pixels": 10**400}},
        "mm_processor_kwargs.max_pixels",
        "use an integer from 1 to",
    ),
    "a grid of 5001 digits": (
        lambda m: grid(m, embeds(m, 4), [[HUGE, 4, 4]]),
        f"{IMAGE}.image_grid_thw",
        "expected integers",
    ),
    "embeddings and nothing": (
        lambda m: with_image(m, [{"image_embeds": embeds(m, 4), "image_grid_thw": [[1, 4, 4]]}, []]),
        f"{IMAGE}[1]",
        "it is an empty list; give the embeddings of each image",
    ),
    "at least more pixels than at most": (
        lambda m: about(m, picture(9, 9)) | {"mm_processor_kwargs": {"min_pixels": 10**6, "max_pixels": 784}},
        "mm_processor_kwargs",
        "make min_pixels the smaller",
    ),
    "enough pixels to fill the memory": (
        lambda m: about(m, picture(9, 9)) | {"mm_processor_kwargs": {"min_pixels": 10**8, "max_pixels": 10**8}},
        "prompt",
        "use fewer or smaller images",
    ),
}

CASES = [
    pytest.param(family, build, field, says, id=f"{family}-{name}")
    for family, own in (("llava", LLAVA), ("qwen2_vl", QWEN2_VL), ("phi3_v", {}))
    for name, (build, field, says) in {**ANY_FAMILY, **own}.items()
]


def short(family: str) -> Model:
    """The model with a context of 512 tokens, so that it is soon full; one of Phi-3.5's images alone takes more."""
    model = load_model(EVERY[family])
    return replace(model, processor=replace(model.processor, max_model_len=3000 if family == "phi3_v" else 512))


@pytest.mark.parametrize(("family", "build", "field", "says"), CASES)
def test_is_refused_before_any_compute(family, build, field, says):
    model = short(family)
    llm = LLM(invariants.without_compute(model))
    with pytest.raises(InvalidRequest, match=says) as caught:
        llm.generate(build(model))
    assert caught.value.field == field
    assert invariants.is_one_sentence(caught.value)


@pytest.mark.parametrize("family", EVERY)
def test_others_of_the_batch_are_not_harmed(family):
    """All wrong prompts at once, among valid ones."""
    model = short(family)
    bad = [param.values[1](model) for param in CASES if param.values[0] == family]  # type: ignore[operator]
    good = mixed(model)
    params = SamplingParams.greedy(max_tokens=4, ignore_eos=True)
    expected = invariants.token_ids(LLM(model).generate(good, params, use_tqdm=False))
    outputs = LLM(model).generate([*bad[::2], *good, *bad[1::2]], params, use_tqdm=False)
    at = len(bad[::2])
    assert invariants.token_ids(outputs[at : at + len(good)]) == expected
    assert all(isinstance(o.error, InvalidRequest) for o in [*outputs[:at], *outputs[at + len(good) :]])


def test_the_prompt_may_fill_all_but_one_token_of_the_context():
    llm = LLM(TINY["llava"], max_model_len=8)
    (output,) = llm.generate({"prompt_token_ids": [5] * 7})
    assert len(output.outputs[0].token_ids) == 1
    with pytest.raises(InvalidRequest, match="it is 8 tokens long, expected 1 to 7"):
        llm.generate({"prompt_token_ids": [5] * 8})


def test_a_model_without_a_chat_template_says_what_to_pass():
    model = load_model(TINY["llava"])
    bare = replace(model, processor=replace(model.processor, chat_template=None))
    with pytest.raises(InvalidRequest, match="the checkpoint has none; pass chat_template=") as caught:
        LLM(bare).generate(message("Hi"))
    assert caught.value.field == "chat_template"
    LLM(bare).generate("Hi", SamplingParams(max_tokens=1))
