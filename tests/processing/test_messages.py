"""messages: placeholders that a text writes itself are not written again, however many there are; too many are refused first."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.golden_cases import TINY, load_model
from vlmfx.errors import InvalidRequest
from vlmfx.processing import messages
from vlmfx.processing.messages import messages_for_template
from vlmfx.processing.prompt import plan, with_options

MARKS = {"image": "<image>", "video": "<video>"}
NUMBERED = {"image": "<|image_{number}|>"}
IMAGE = {"type": "image", "image": "a.png"}
VIDEO = {"type": "video", "video": "a.mp4"}


def text(*parts: Any, marks: dict[str, str] = MARKS) -> str:
    (message,), _ = messages_for_template([{"role": "user", "content": list(parts)}], False, marks)
    return str(message["content"])


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((IMAGE, "Hi"), "<image>\nHi"),
        (("Hi", IMAGE), "Hi\n<image>"),
        ((IMAGE, "See <image>."), "See <image>."),
        ((IMAGE, IMAGE, "See <image>."), "<image>\nSee <image>."),
        ((IMAGE, "See <image><image>.", IMAGE), "See <image><image>."),
        ((IMAGE, VIDEO, "See <image> and <video>."), "See <image> and <video>."),
        ((VIDEO, IMAGE, "See <image>."), "<video>\nSee <image>."),
        (("a <image>", IMAGE, "b"), "a <image>\nb"),
        (("a <ima", IMAGE, "ge> b"), "a <ima\n<image>\nge> b"),
    ],
)
def test_a_placeholder_comes_once(parts, expected):
    assert text(*parts) == expected


def test_numbered_placeholders_are_told_apart():
    assert text(IMAGE, IMAGE, "See <|image_2|>.", marks=NUMBERED) == "<|image_1|>\nSee <|image_2|>."
    assert text(IMAGE, "See <|image_01|>.", marks=NUMBERED) == "<|image_1|>\nSee <|image_01|>."


def test_numbers_go_on_from_message_to_message():
    both, _ = messages_for_template([{"role": "user", "content": [IMAGE]}] * 2, False, NUMBERED)
    assert [message["content"] for message in both] == ["<|image_1|>", "<|image_2|>"]


@pytest.mark.parametrize("marks", [MARKS, NUMBERED], ids=["alike", "numbered"])
@pytest.mark.parametrize("is_split", [False, True], ids=["one message", "a message each"])
def test_many_images_and_a_long_text_take_little_time(marks, is_split):
    parts = [IMAGE] * 20_000
    contents: list[list[Any]] = [[part] for part in parts] if is_split else [parts]
    contents[-1] = [*contents[-1], "word " * 200_000]
    start = time.process_time()
    messages_for_template([{"role": "user", "content": content} for content in contents], False, marks)
    assert time.process_time() - start < 10  # a quadratic scan took longer


def test_too_many_images_are_refused_before_a_text_is_put_together(monkeypatch):
    def fail(*args: Any) -> None:
        raise AssertionError("a text was put together")

    monkeypatch.setattr(messages, "_joined", fail)
    processor = with_options(load_model(TINY["minicpm_v"]).processor, {"image": 2}, {})
    with pytest.raises(InvalidRequest, match="3 were given but limit_mm_per_prompt allows 2 images a prompt"):
        plan(
            processor,
            {"messages": [{"role": "user", "content": [IMAGE] * 3}], "chat_template_content_format": "string"},
        )
