"""The shipped chat templates: their text by hand, the goldens' prompts, and how they are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.golden_cases import SHARED, TINY, find_embeddings, load_model
from tests.invariants import is_one_sentence
from tests.pictures import picture
from vlmfx import InvalidRequest, embed
from vlmfx.checkpoint import load_processor
from vlmfx.processing.chat import load_chat_template, render_chat, shipped_templates, template_takes_parts
from vlmfx.processing.prompt import prepare

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
IMAGE: dict[str, Any] = {"type": "image"}
VLM2VEC = [case for case in find_embeddings(SHARED) if case.name.startswith("vlm2vec")]


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def say(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def render(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return render_chat(load_chat_template("", f"template_{name}.jinja"), messages, special_tokens=SPECIAL, **options)


def test_these_are_shipped():
    assert shipped_templates() == ["template_dse_qwen2_vl.jinja", "template_llava.jinja", "template_vlm2vec.jinja"]
    parts = [template_takes_parts(load_chat_template("", name)) for name in shipped_templates()]
    assert parts == [True, False, True]


CHAT = [say("user", "<image>\nWhat is it?"), say("assistant", "A cat."), say("user", "Sure?")]


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        (CHAT[:1], {}, "<s>USER: <image>\nWhat is it?\nASSISTANT:"),
        (CHAT, {}, "<s>USER: <image>\nWhat is it?\nASSISTANT: A cat.</s>\nUSER: Sure?\nASSISTANT:"),
        ([say("system", "Be brief. "), CHAT[2]], {}, "<s>Be brief. USER: Sure?\nASSISTANT:"),
        (CHAT[:1], {"add_generation_prompt": False}, "<s>USER: <image>\nWhat is it?\n"),
        (
            CHAT[:2],
            {"add_generation_prompt": False, "continue_final_message": True},
            "<s>USER: <image>\nWhat is it?\nASSISTANT: A cat.",
        ),
    ],
)
def test_llava(messages, options, expected):
    assert render("llava", messages, **options) == expected


@pytest.mark.parametrize("messages", [CHAT[1:], [CHAT[0], CHAT[2]], [say("tool", "x")]])
def test_llava_wants_turns(messages):
    with pytest.raises(InvalidRequest, match="messages must go user, assistant, user"):
        render("llava", messages)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([IMAGE, text("Represent the given image.")], "<s><|image_1|> Represent the given image."),
        ([text("A"), IMAGE, text("B"), IMAGE], "<s>A <|image_1|> B <|image_2|>"),
        ([text("A cat"), text("and a dog")], "<s>A cat and a dog"),
        ([IMAGE], "<s><|image_1|>"),
        ([], "<s>"),
        ("A cat", "<s>A cat"),
    ],
)
def test_vlm2vec(content, expected):
    for options in ({}, {"add_generation_prompt": False}):
        assert render("vlm2vec", [say("user", content)], **options) == expected


def test_vlm2vec_embeds_one_message():
    with pytest.raises(InvalidRequest, match="an embedding is of one message"):
        render("vlm2vec", [say("system", "x"), say("user", "y")])
    with pytest.raises(InvalidRequest, match="not parts of type video"):
        render("vlm2vec", [say("user", [{"type": "video"}])])


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (
            [say("user", [IMAGE, text("Query: a cat")])],
            f"{SYSTEM}<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Query: a cat<|im_end|>\n",
        ),
        (
            [say("system", "Be."), say("user", "x"), say("assistant", "y")],
            "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\ny<|im_end|>\n",
        ),
        (
            [say("user", [{"type": "video"}])],
            f"{SYSTEM}<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n",
        ),
    ],
)
def test_dse(messages, expected):
    assert render("dse_qwen2_vl", messages) == f"{expected}<|im_start|>assistant\n<|endoftext|>"
    assert render("dse_qwen2_vl", messages, add_generation_prompt=False) == f"{expected}<|endoftext|>"


def test_dse_is_qwen2_vls_own_chat_and_an_end():
    """For messages of any kind: the checkpoint's template, as it is published, and the token that is pooled."""
    own = load_chat_template(TINY["qwen2_vl"])
    for messages in (
        [say("user", [IMAGE, text("a"), IMAGE, {"type": "video"}, text(" b ")])],
        [say("system", [text("S")]), say("user", "x"), say("assistant", "y"), say("user", [text("z")])],
        [say("system", "S")],
    ):
        for flag in (True, False):
            published = render_chat(own, messages, special_tokens={}, add_generation_prompt=flag)
            assert render("dse_qwen2_vl", messages, add_generation_prompt=flag) == f"{published}<|endoftext|>"


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in VLM2VEC] or [
    pytest.param(None, marks=pytest.mark.skip(reason="the larger set of goldens is not here"))
])  # fmt: skip
def test_vlm2vec_gives_the_goldens_prompts(case):
    """The golden prompts, written as parts: the same ids, one bos and no more, and so the same vector."""
    (prompt,) = case.prompts()
    template = load_chat_template(case.model_folder, case.chat_template)
    model = load_model(case.model_folder)
    model = replace(model, processor=replace(model.processor, chat_template=template))
    pictures = [{"type": "image", "image": str(path)} for path in prompt.images]
    message = say("user", [*pictures, text(prompt.text.removeprefix("<|image_1|> "))])
    bare = prepare(model.processor, prompt.request()).token_ids
    chatted = prepare(model.processor, {"messages": [message]})
    assert chatted.prompt == f"<s>{prompt.text}"
    assert chatted.token_ids == bare
    prompt.difference("embedding", embed(model, {"messages": [message]})[0], atol=1e-5)


def test_llava_gives_one_bos():
    model = load_model(TINY["llava"])
    processor = replace(model.processor, chat_template=load_chat_template("", "template_llava.jinja"))
    message = say("user", [{"type": "image", "image": picture(20, 20)}, text("What?")])
    inputs = prepare(processor, {"messages": [message]})
    assert inputs.prompt == "<s>USER: <image>\nWhat?\nASSISTANT:"
    bos = model.processor.tokenizer.bos_token_id
    assert inputs.token_ids[0] == bos
    assert bos not in inputs.token_ids[1:]
    bare = {"prompt": "USER: <image>\nWhat?\nASSISTANT:", "multi_modal_data": {"image": picture(20, 20)}}
    assert inputs.token_ids == prepare(processor, bare).token_ids


def test_a_template_is_a_text_a_file_or_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = load_chat_template(TINY["llava"], "template_llava.jinja")
    assert shipped is not None
    assert "USER" in shipped
    (tmp_path / "template_llava").mkdir()  # a folder is no template
    assert load_chat_template(TINY["llava"], "template_llava") == shipped
    (tmp_path / "own.jinja").write_text("own", encoding="utf-8")
    assert load_chat_template(TINY["llava"], "own.jinja") == "own"
    assert load_chat_template(TINY["llava"], Path("own.jinja")) == "own"
    assert load_chat_template(TINY["llava"], "{{ messages }}") == "{{ messages }}"
    (tmp_path / "template_llava.jinja").write_text("a file of that name comes first", encoding="utf-8")
    assert load_chat_template(TINY["llava"], "template_llava.jinja") == "a file of that name comes first"
    for wrong in ("template_other.jinja", "../templates/template_llava.jinja", ""):
        with pytest.raises(InvalidRequest, match=r"a shipped one: template_dse_qwen2_vl\.jinja, ") as caught:
            load_chat_template(TINY["llava"], wrong)
        assert is_one_sentence(caught.value)


@pytest.mark.parametrize("name", ["template_llava", "template_llava.jinja"])
def test_a_request_takes_a_shipped_name_where_no_file_is_read(name):
    processor = load_model(TINY["llava"]).processor
    processor = replace(processor, media=replace(processor.media, allow_paths=False))
    made = prepare(processor, {"messages": CHAT[2:], "chat_template": name})
    bare = "<s>USER: Sure?\nASSISTANT:"
    assert made.token_ids == prepare(processor, {"prompt": bare}).token_ids
    for wrong in ("template_other", "../templates/template_llava"):
        with pytest.raises(InvalidRequest, match="shipped one's name"):
            prepare(processor, {"messages": CHAT[2:], "chat_template": wrong})


def test_load_takes_a_shipped_name():
    model = load_model(TINY["llava"])
    processor = load_processor(TINY["llava"], "llava", model.config, chat_template="template_llava.jinja")
    assert processor.chat_template == load_chat_template("", "template_llava.jinja")
