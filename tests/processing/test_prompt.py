"""prompt: every form of a prompt becomes the same ModelInputs; ids and text agree with transformers' templates."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from PIL import Image

from tests.golden_cases import TINY, load_model
from tests.pictures import about, encoded, picture, placeholder
from tests.versions import transformers_from
from vlmfx.processing import images
from vlmfx.processing.chat import template_takes_parts
from vlmfx.processing.images import load_image
from vlmfx.processing.prompt import prepare


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest):
    return load_model(TINY[request.param])


def test_a_string_is_a_prompt(model):
    as_text, as_dict = prepare(model.processor, "Hi there"), prepare(model.processor, {"prompt": "Hi there"})
    assert as_text.token_ids == as_dict.token_ids
    assert as_text.prompt == as_dict.prompt == "Hi there"
    assert as_text.vision is None
    assert as_text.embeds is None
    assert (as_text.feature_index == -1).all()


def test_keys_that_hold_none_are_as_if_absent(model):
    keys = {"prompt_token_ids": None, "messages": None, "multi_modal_data": None, "mm_processor_kwargs": None}
    assert prepare(model.processor, {"prompt": "Hi", **keys}).token_ids == prepare(model.processor, "Hi").token_ids
    assert prepare(model.processor, {"prompt": "Hi", "multi_modal_data": {"image": None}}).vision is None
    assert prepare(model.processor, {"prompt": "Hi", "multi_modal_data": {"image": []}}).vision is None


def test_bos_is_not_doubled(model):
    bos = model.processor.tokenizer.bos_token
    if bos is None:
        pytest.skip("this tokenizer has no bos token")
    ids = model.processor.tokenizer.encode_prompt(f"{bos}Hi")
    assert ids.count(model.processor.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("turns", [1, 3])
def test_messages_render_as_transformers_renders_them(model, turns):
    transformers = transformers_from(4, 46, "is older than the oldest promised")
    image = picture(40, 50)
    messages: list[dict[str, Any]] = []
    for turn in range(turns):
        parts = [{"type": "image", "image": image}] * (turn % 2 == 0) + [{"type": "text", "text": f"Question {turn}?"}]
        messages.append({"role": "user", "content": parts})
        if turn < turns - 1:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": "An answer."}]})
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(model.name)  # Auto… wants remote code for some
    plain = [
        {**m, "content": [{k: v for k, v in part.items() if k != "image"} for part in m["content"]]} for m in messages
    ]
    if not template_takes_parts(model.processor.chat_template):
        lines = [[part.get("text", placeholder(model)) for part in m["content"]] for m in messages]
        plain = [{**m, "content": "\n".join(texts)} for m, texts in zip(messages, lines, strict=True)]
    expected = tokenizer.apply_chat_template(
        plain, chat_template=model.processor.chat_template, tokenize=False, add_generation_prompt=True
    )
    inputs = prepare(model.processor, {"messages": messages})
    assert inputs.prompt == expected
    num_images = sum(part["type"] == "image" for m in messages for part in m["content"])
    assert inputs.vision is not None
    assert inputs.vision.num_segments == num_images


def test_one_image_is_alive_at_a_time(model, monkeypatch):
    """Decoded in full; resized, they may pile up."""
    made: list[weakref.ref[Image.Image]] = []
    most = []

    def load(*args: Any, **kwargs: Any) -> Image.Image:
        image = load_image(*args, **kwargs)
        made.append(weakref.ref(image))
        most.append(sum(known() is not None for known in made))
        return image

    monkeypatch.setattr(images, "load_image", load)
    prepare(model.processor, about(model, *[encoded(picture(40, 30, seed)) for seed in range(4)]))
    assert most == [1, 1, 1, 1]


def test_the_order_of_images_is_the_order_of_their_rows(model):
    first, second = picture(40, 50, 1), picture(40, 50, 2)
    together = prepare(model.processor, about(model, first, second)).vision
    apart = [prepare(model.processor, about(model, image)).vision for image in (first, second)]
    assert together is not None
    assert torch.equal(together.pixels, torch.cat([v.pixels for v in apart if v is not None]))
