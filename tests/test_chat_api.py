"""LLM.chat: messages in every form become the prompt that is meant, with the pictures in their places; what is wrong fails alone."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from tests import invariants
from tests.golden_cases import EVERY, TINY, load_model
from tests.invariants import token_ids
from tests.pictures import encoded, picture, placeholder
from tests.versions import transformers_from
from vlmfx import LLM, BatchError, InvalidRequest, SamplingParams, load
from vlmfx.checkpoint import Model
from vlmfx.cli import main
from vlmfx.engine import runner
from vlmfx.processing.chat import template_takes_parts
from vlmfx.processing.media import MediaPolicy
from vlmfx.processing.prompt import plan, prepare

STRINGS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"
)
# Images as the mark's text, whatever the family writes for one.
PARTS = (
    "{% set seen = namespace(images=0) %}{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% else %}{% set seen.images = seen.images + 1 %}MARK{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[answer]{% endif %}"
)
FEW = SamplingParams.greedy(max_tokens=6, ignore_eos=True)


@pytest.fixture(params=EVERY)
def model(request: pytest.FixtureRequest) -> Model:
    return load_model(EVERY[request.param])


@pytest.fixture
def llm(model: Model) -> LLM:
    return LLM(model)


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def data_url(image: Any, format: str = "PNG") -> str:
    return f"data:image/{format.lower()};base64,{base64.b64encode(encoded(image, format)).decode()}"


def image_url(url: str, **others: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **others}}


def written(model: Model, template: str) -> str:
    mark: str = model.processor.functions.PLACEHOLDERS["image"]
    return template.replace("MARK", mark.replace("{number}", "{{ seen.images }}"))


# ---- the prompt


@pytest.mark.parametrize("kind", ["strings", "parts"])
def test_text_and_images_are_interleaved_in_order(llm, kind):
    """Pictures of three sizes and contents, whose places show in the ids and in what is answered."""
    pictures = [picture(40, 60, 1), picture(90, 50, 2), picture(64, 64, 3)]
    messages = [
        {"role": "system", "content": "Be brief."},
        user(text("First"), {"type": "image", "image": pictures[0]}, text("then"), image_url(data_url(pictures[1]))),
        {"role": "assistant", "content": "Seen."},
        user({"type": "image_pil", "image_pil": pictures[2], "uuid": "p3"}, text("and?")),
    ]
    line = "\n" if kind == "strings" else ""
    numbered = [placeholder(llm.model, number) for number in (1, 2, 3)]
    prompt = (
        f"[system]Be brief.[user]First{line}{numbered[0]}{line}then{line}{numbered[1]}"
        f"[assistant]Seen.[user]{numbered[2]}{line}and?[answer]"
    )
    template = STRINGS if kind == "strings" else written(llm.model, PARTS)
    (chatted,) = llm.chat(messages, FEW, chat_template=template)
    (generated,) = llm.generate([{"prompt": prompt, "multi_modal_data": {"image": pictures}}], FEW)
    assert chatted.prompt == prompt
    assert chatted.prompt_token_ids == generated.prompt_token_ids
    assert token_ids([chatted]) == token_ids([generated])
    made, expected = (
        prepare(llm.model.processor, p)
        for p in (
            {"messages": messages, "chat_template": template},
            {"prompt": prompt, "multi_modal_data": {"image": pictures}},
        )
    )
    assert made.vision is not None
    assert expected.vision is not None
    assert torch.equal(made.vision.pixels, expected.vision.pixels)


def test_the_own_template_is_rendered_as_transformers_renders_it(llm):
    transformers = transformers_from(4, 46, "is older than the oldest promised")
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    takes_parts = template_takes_parts(llm.model.processor.chat_template)
    plain: Any = content if takes_parts else f"{placeholder(llm.model)}\nWhat is it?"
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(llm.model.name)  # Auto… would want remote code
    for options in ({}, {"add_generation_prompt": False}, {"chat_template_kwargs": {"add_vision_id": True}}):
        theirs = {"add_generation_prompt": True, **options}
        theirs.update(theirs.pop("chat_template_kwargs", {}))  # type: ignore[call-overload]
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": plain}],
            chat_template=llm.model.processor.chat_template,
            tokenize=False,
            **theirs,
        )
        for part in ({"type": "image", "image": picture(30, 40)}, image_url(data_url(picture(30, 40)), detail="low")):
            (output,) = llm.chat([user(part, content[1])], FEW, **options)
            assert output.prompt == expected


def test_content_format_can_be_forced(llm):
    messages = [user(text("a"), text("b"))]
    shows = "{% for m in messages %}{{ 'text' if m.content is string else 'list' }}{% endfor %}"
    loops = f"{{% for m in messages %}}{{% for p in m.content %}}{{% endfor %}}{{% endfor %}}{shows}"
    for template, form, expected in [
        (shows, "auto", "text"), (shows, "string", "text"), (shows, "openai", "list"),
        (loops, "auto", "list"), (loops, "openai", "list"), (loops, "string", "text"),
    ]:  # fmt: skip
        (output,) = llm.chat(messages, FEW, chat_template=template, chat_template_content_format=form)
        assert output.prompt == expected


def test_a_message_is_continued(llm):
    messages = [user("Count."), {"role": "assistant", "content": "One, two,"}]
    (output,) = llm.chat(messages, FEW, chat_template=STRINGS, add_generation_prompt=False, continue_final_message=True)
    assert output.prompt == "[user]Count.[assistant]One, two,"
    (plain,) = llm.generate(["[user]Count.[assistant]One, two,"], FEW)
    assert token_ids([output]) == token_ids([plain])
    (own,) = llm.chat(messages, FEW, add_generation_prompt=False, continue_final_message=True)
    assert str(own.prompt).endswith("One, two,")
    prompt = {"messages": messages, "chat_template": STRINGS, "continue_final_message": True}
    assert llm.generate(prompt, FEW)[0].prompt == output.prompt
    with pytest.raises(InvalidRequest, match="cannot be combined with add_generation_prompt; set one") as caught:
        llm.chat(messages, FEW, continue_final_message=True)
    assert caught.value.field == "continue_final_message"


def test_tools_and_variables_reach_the_template(llm):
    template = "{{ tools | tojson }}|{{ mood }}|{{ messages[0].content }}"
    tools = [{"type": "function", "function": {"name": "f"}}]
    (output,) = llm.chat([user("x")], FEW, chat_template=template, tools=tools, chat_template_kwargs={"mood": "good"})
    assert output.prompt == '[{"type": "function", "function": {"name": "f"}}]|good|x'


def test_templates_by_text_file_and_name(llm, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(STRINGS)
    for template in (STRINGS, path, str(path)):
        assert llm.chat([user("x")], FEW, chat_template=template)[0].prompt == "[user]x[answer]"
    bare = LLM(replace(llm.model, processor=replace(llm.model.processor, chat_template=None)))
    with pytest.raises(InvalidRequest, match=r"pass chat_template=.*template_llava\.jinja") as caught:
        bare.chat([user("x")])
    assert caught.value.field == "chat_template"
    assert invariants.is_one_sentence(caught.value)
    assert bare.chat([user("x")], FEW, chat_template=STRINGS)[0].prompt == "[user]x[answer]"
    shipped = str(bare.chat([user("What?")], FEW, chat_template="template_llava.jinja")[0].prompt)
    assert shipped.endswith("USER: What?\nASSISTANT:")


# ---- one conversation and several


def test_one_conversation_and_several(llm):
    one, two = [user("a")], [user("b"), {"role": "assistant", "content": "c"}, user("d")]
    assert [o.prompt for o in llm.chat(two, FEW, chat_template=STRINGS)] == ["[user]b[assistant]c[user]d[answer]"]
    outputs = llm.chat(
        [one, two], [FEW, SamplingParams.greedy(max_tokens=2, ignore_eos=True)], use_tqdm=False, chat_template=STRINGS
    )
    assert [o.prompt for o in outputs] == ["[user]a[answer]", "[user]b[assistant]c[user]d[answer]"]
    assert [len(ids) for ids in token_ids(outputs)] == [6, 2]
    assert token_ids(llm.chat([one], FEW, chat_template=STRINGS)) == [token_ids(outputs)[0]]


def test_a_bad_conversation_fails_alone(llm):
    good = [
        user("Hello"),
        {"role": "assistant", "content": "Hi"},
        user({"type": "image", "image": picture(40, 40)}, text("?")),
    ]
    bad: list[Any] = [
        [],
        [user({"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}})],
        [{"content": "x"}],
        [user(image_url("data:image/png;base64,AAAA"), text("?"))],
        [user({"type": "image", "image": "no/such.png"})],
        [user({"type": "image_embeds", "image_embeds": "AAAA"})],
        ["x"],
    ]
    expected = token_ids(llm.chat([good], FEW))
    with pytest.warns(UserWarning, match=f"{len(bad)} of {len(bad) + 1} prompts failed"):
        outputs = llm.chat([*bad[:3], good, *bad[3:]], FEW, use_tqdm=False)
    assert token_ids([outputs[3]]) == expected
    failed = [*outputs[:3], *outputs[4:]]
    assert all(isinstance(o.error, InvalidRequest) and invariants.is_one_sentence(o.error) for o in failed)
    with pytest.raises(BatchError) as caught:
        llm.chat([bad[1], good], FEW, use_tqdm=False, on_error="raise")
    assert token_ids(caught.value.outputs[1:]) == expected
    for conversation in bad:
        with pytest.raises(InvalidRequest):
            llm.chat(conversation, FEW)


def test_text_streams(llm):
    parts: list[str] = []
    (output,) = llm.chat([user("Hello")], FEW, on_text=lambda number, new: parts.append(new))
    assert "".join(parts) == output.outputs[0].text


# ---- the example of vLLM's page


def test_frames_of_a_video_as_many_images():
    llm = LLM(TINY["qwen2_vl"], limit_mm_per_prompt={"image": 4}, device="cpu", dtype="float32")
    frames = [picture(60, 44, seed) for seed in range(4)]
    message = user(text("Describe this set of frames."))
    for frame in frames:
        message["content"].append(image_url(data_url(frame, "JPEG")))
    (output,) = llm.chat([message], FEW)
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    assert str(output.prompt).count(mark) == 4
    assert mark * 4 + "<|im_end|>" in str(output.prompt)
    same = {"prompt": output.prompt, "multi_modal_data": {"image": [encoded(frame, "JPEG") for frame in frames]}}
    assert token_ids(llm.generate([same], FEW)) == token_ids([output])


# ---- URLs


class Handler(BaseHTTPRequestHandler):
    """Serves the body in its server's `pictures` of a path; counts requests."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.num_requests += 1
        body = server.pictures.get(self.path)
        self.send_response(200 if body else 404)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""


@pytest.fixture
def host() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.num_requests = 0
    server.pictures = {"/a.png": encoded(picture(50, 40, 5)), "/b.png": encoded(picture(70, 30, 6))}
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_images_from_http(model, host):
    llm = LLM(model, private_media_hosts=[f"127.0.0.1:{host.server_port}"])
    (output,) = llm.chat([user(image_url(f"{host.url}/a.png"), image_url(f"{host.url}/b.png"), text("Compare."))], FEW)
    own = [{"type": "image", "image": picture(50, 40, 5)}, {"type": "image", "image": picture(70, 30, 6)}]
    assert token_ids([output]) == token_ids(llm.chat([user(*own, text("Compare."))], FEW))
    assert host.num_requests == 2
    with pytest.raises(InvalidRequest, match="status 404") as caught:
        llm.chat([user(text("x"), image_url(f"{host.url}/none.png"))])
    assert caught.value.field == "messages[0].content[1]"


def test_private_hosts_are_refused_by_default(llm, host):
    for url in (host.url, f"http://localhost:{host.server_port}", f"http://0x7f000001:{host.server_port}"):
        for part in (image_url(f"{url}/a.png"), {"type": "image", "image": f"{url}/a.png"}):
            with pytest.raises(InvalidRequest, match="its host has no public address; use"):
                llm.chat([user(part)])
    assert host.num_requests == 0


def test_files_by_url(model, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture(50, 40, 5)))
    with pytest.raises(InvalidRequest, match="file: URLs are not allowed here") as caught:
        LLM(model).chat([user(image_url(f"file://{path}"))])
    assert str(tmp_path) not in str(caught.value)
    llm = LLM(model, allowed_local_media_path=tmp_path)
    (output,) = llm.chat([user(image_url(f"file://{path}"), text("?"))], FEW)
    assert token_ids([output]) == token_ids(llm.chat([user({"type": "image", "image": path}, text("?"))], FEW))
    with pytest.raises(InvalidRequest, match="names no readable file"):
        llm.chat([user(image_url("file:///etc/passwd"))])


BOMBS = {
    "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "html": b"<html></html>",
    "nothing": b" ",
    "truncated": encoded(picture(90, 90))[:-200],
    "a header alone": encoded(picture(9, 9))[:33],
    "png of 60000 x 60000": encoded(picture(9, 9))[:16] + (60000).to_bytes(4, "big") * 2 + encoded(picture(9, 9))[24:],
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_fetched_and_is_no_image(name, host):
    model = load_model(TINY["llava"])
    llm = LLM(model, private_media_hosts=["127.0.0.1"])
    host.pictures["/x.png"] = BOMBS[name]
    with pytest.raises(InvalidRequest) as caught:
        llm.chat([user(image_url(f"{host.url}/x.png"), text("?"))])
    assert invariants.is_one_sentence(caught.value)


# ---- limits


def test_too_many_images_are_not_fetched(model, host):
    llm = LLM(model, private_media_hosts=["127.0.0.1"], limit_mm_per_prompt={"image": 2})
    urls = [image_url(f"{host.url}/a.png")] * 3
    with pytest.raises(InvalidRequest, match="3 were given but limit_mm_per_prompt allows 2 images a prompt; remove"):
        llm.chat([user(*urls)])
    assert host.num_requests == 0
    llm.chat([user(*urls[:2], text("?"))], FEW)
    assert host.num_requests == 2
    short = LLM(
        replace(model, processor=replace(model.processor, max_model_len=300)), private_media_hosts=["127.0.0.1"]
    )
    with pytest.raises(InvalidRequest, match="at least 400 tokens"):
        short.chat([user(*[image_url(f"{host.url}/a.png")] * 400)])
    assert host.num_requests == 2


def test_the_limit_holds_for_every_form(model):
    llm = LLM(model, limit_mm_per_prompt={"image": 1})
    image, mark = picture(40, 40), placeholder(model)
    for prompt in (
        {"prompt": mark * 2, "multi_modal_data": {"image": [image, image]}},
        {"messages": [user({"type": "image", "image": image}), user({"type": "image", "image": image})]},
    ):
        with pytest.raises(InvalidRequest, match="limit_mm_per_prompt allows 1 image a prompt"):
            llm.generate(prompt)
    assert LLM(model, limit_mm_per_prompt={"image": 0}).chat([user("x")], FEW)
    loaded = load(model.name, limit_mm_per_prompt="image=1", device="cpu", dtype="float32")
    assert loaded.processor.limit_mm_per_prompt == {"image": 1}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"image": 2}, {"image": 2}),
        ("image=2", {"image": 2}),
        ("image=2, video=0", {"image": 2, "video": 0}),
        ('{"image": 3}', {"image": 3}),
        (["image=2", "video=1,audio=0"], {"image": 2, "video": 1, "audio": 0}),
        (["image=2", "image=4"], {"image": 4}),
        (None, {}),
    ],
)
def test_limits_are_read(given, expected):
    assert LLM(load_model(TINY["llava"]), limit_mm_per_prompt=given).model.processor.limit_mm_per_prompt == expected


@pytest.mark.parametrize(
    "given",
    [
        {"image": -1},
        {"image": 1.5},
        {"image": True},
        {"images": 2},
        "image",
        "image=x",
        "=2",
        "{",
        "[1]",
        3,
        {"image": {}},
    ],
)
def test_limits_that_are_none(given):
    with pytest.raises(InvalidRequest) as caught:
        LLM("no/such/model", limit_mm_per_prompt=given)  # told before anything is loaded
    assert caught.value.field == "limit_mm_per_prompt"
    assert invariants.is_one_sentence(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [("allowed_local_media_path", "no/such"), ("private_media_hosts", ["http://a"]), ("allowed_media_domains", 3)],
)
def test_wrong_media_options_are_told_before_loading(option, value):
    with pytest.raises(InvalidRequest) as caught:
        LLM("no/such/model", **{option: value})
    assert caught.value.field == option


def test_the_model_stays_as_it_was(model):
    LLM(model, limit_mm_per_prompt={"image": 1}, private_media_hosts=["127.0.0.1"])
    assert model.processor.limit_mm_per_prompt == {}
    assert model.processor.media == MediaPolicy()
    assert LLM(model).model is model


# ---- ready embeddings


def in_base64(tensor: torch.Tensor, form: str) -> str:
    if form == "safetensors":
        return base64.b64encode(save({"rows": tensor.contiguous()})).decode()
    buffer = io.BytesIO()
    np.save(buffer, tensor.numpy())
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("form", ["npy", "safetensors"])
def test_embeddings_in_parts_answer_as_their_image(form):
    """The rows that the model's own tower makes of a picture, sent in its place."""
    for family in ("llava", "qwen2_vl"):
        llm = LLM(load_model(TINY[family]))
        messages = [user({"type": "image", "image": picture(60, 44)}, text("What is it?"))]
        inputs = prepare(llm.model.processor, {"messages": messages})
        with torch.no_grad():
            (rows,) = runner.encode(llm.model, [inputs])
        assert rows is not None
        value: Any = in_base64(rows, form)
        if family == "qwen2_vl":
            (layout,) = plan(llm.model.processor, {"messages": messages}).layouts["image"]
            grid = [layout.grid[0], layout.grid[1] * 2, layout.grid[2] * 2]  # in patches, of which 2 x 2 make a row
            value = {"image_embeds": value, "image_grid_thw": in_base64(torch.tensor([grid]), form)}
        ready = [user({"type": "image_embeds", "image_embeds": value}, text("What is it?"))]
        assert token_ids(llm.chat(ready, FEW)) == token_ids(llm.chat(messages, FEW))


def test_a_picture_and_embeddings_in_one_prompt_are_refused():
    llm = LLM(load_model(TINY["llava"]))
    rows = {"type": "image_embeds", "image_embeds": torch.zeros(36, 48)}
    for parts in ([rows, {"type": "image", "image": picture(9, 9)}], [{"type": "image", "image": picture(9, 9)}, rows]):
        with pytest.raises(InvalidRequest) as caught:
            llm.chat([user(*parts)])
        assert invariants.is_one_sentence(caught.value)


# ---- options that cannot be


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"chat_template": ""}, "chat_template"),
        ({"chat_template": "no/such.jinja"}, "chat_template"),
        ({"chat_template": 3}, "chat_template"),
        ({"chat_template": "{% if %}"}, "chat_template"),
        ({"chat_template_content_format": "xml"}, "chat_template_content_format"),
        ({"add_generation_prompt": 1}, "add_generation_prompt"),
        ({"continue_final_message": "yes", "add_generation_prompt": False}, "continue_final_message"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"special_tokens": {}}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs"),
        ({"mm_processor_kwargs": {"crops": 3}}, "mm_processor_kwargs"),
    ],
)
def test_options_that_cannot_be(llm, options, field):
    with pytest.raises(InvalidRequest) as caught:
        llm.chat([user("x")], FEW, **options)
    assert caught.value.field == field
    assert invariants.is_one_sentence(caught.value)


def test_chat_options_without_messages(llm):
    with pytest.raises(InvalidRequest, match="without messages; remove them") as caught:
        llm.generate({"prompt": "x", "chat_template": STRINGS})
    assert caught.value.field == "prompt"


@pytest.mark.parametrize("messages", [None, "Hello", user("Hello"), [], 3, {}])
def test_what_is_no_conversation(llm, messages):
    with pytest.raises(InvalidRequest) as caught:
        llm.chat(messages, FEW)
    assert caught.value.field.startswith("messages")
    assert invariants.is_one_sentence(caught.value)


def test_what_a_server_turns_off(model, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(STRINGS)
    closed = replace(model, processor=replace(model.processor, media=MediaPolicy(allow_paths=False)))
    llm = LLM(closed)
    (tmp_path / "a.png").write_bytes(encoded(picture(9, 9)))
    with pytest.raises(InvalidRequest, match="it is a path, which is not read here"):
        llm.chat([user({"type": "image", "image": str(tmp_path / "a.png")})])
    with pytest.raises(InvalidRequest, match="neither a Jinja text nor a shipped one's name; send"):
        llm.chat([user("x")], chat_template=str(path))
    assert llm.chat([user("x")], FEW, chat_template=STRINGS)[0].prompt == "[user]x[answer]"


# ---- the command line


def test_generate_with_a_limit(capsys, tmp_path):
    path = tmp_path / "a.png"
    picture(40, 40).save(path)
    folder = str(TINY["llava"])
    arguments = ["generate", "What?", "--model", folder, "--device", "cpu", "--max-tokens", "2", "--image", str(path)]
    assert main([*arguments, "--limit-mm-per-prompt", "image=1,video=0"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--image", str(path), "--limit-mm-per-prompt", '{"image": 1}']) == 1
    assert "limit_mm_per_prompt allows 1 image a prompt" in capsys.readouterr().err
    for option, value in (
        ("--limit-mm-per-prompt", "two"),
        ("--allowed-local-media-path", "no/such"),
        ("--private-media-hosts", "a/b"),
    ):
        assert main([*arguments, option, value]) == 1
        assert option[2:].replace("-", "_") in capsys.readouterr().err


def test_images_by_url_on_the_command_line(capsys, host):
    arguments = ["generate", "What?", "--model", str(TINY["llava"]), "--device", "cpu", "--max-tokens", "4"]
    assert main([*arguments, "--image", f"{host.url}/a.png"]) == 1
    assert "no public address" in capsys.readouterr().err
    assert main([*arguments, "--image", f"{host.url}/a.png", "--private-media-hosts", "127.0.0.1"]) == 0
    shown = capsys.readouterr().out
    messages = [user({"type": "image", "image": host.pictures["/a.png"]}, text("What?"))]
    params = SamplingParams.greedy(max_tokens=4)
    assert shown == LLM(load_model(TINY["llava"])).chat(messages, params)[0].outputs[0].text + "\n"


@pytest.mark.parametrize(
    "part",
    [
        {"text": "What?"},
        {"type": None, "text": "What?"},
        {"type": "input_text", "text": "What?"},
        {"type": "refusal", "refusal": "What?"},
    ],
)
def test_text_parts_in_other_forms(llm, part):
    path = {"image_url": {"url": data_url(picture(40, 50))}}
    mine = llm.chat([user(path, part)], FEW)
    plain = llm.chat([user({"type": "image", "image": picture(40, 50)}, text("What?"))], FEW)
    assert mine[0].prompt == plain[0].prompt
    assert token_ids(mine) == token_ids(plain)


def test_a_part_whose_type_cannot_be_told_is_refused(llm):
    for part in (
        {"text": "What?", "image_url": {"url": "data:,"}},
        {"words": "What?"},
        {"type": "refusal", "text": "No"},
    ):
        with pytest.raises(InvalidRequest, match=r"messages\[0\]\.content\[0\]"):
            llm.chat([user(part)], FEW)


def test_a_bare_conversation_is_one_prompt(llm):
    messages = [
        user({"type": "image", "image": picture(40, 50)}, text("What?")),
        {"role": "assistant", "content": "It"},
    ]
    messages.append(user(text("is?")))
    (output,) = llm.generate(messages, FEW)
    assert token_ids([output]) == token_ids(llm.chat(messages, FEW))
    with pytest.raises(InvalidRequest, match=r"messages\[1\]"):
        llm.generate([*messages[:1], "What?"], FEW)


def test_path_objects_are_pictures(llm, tmp_path):
    path: Path = tmp_path / "a.png"
    picture(40, 50).save(path)
    for value in (path, str(path), path.read_bytes(), np.asarray(picture(40, 50)), picture(40, 50)):
        assert token_ids(llm.chat([user({"type": "image", "image": value}, text("?"))], FEW)) == token_ids(
            llm.chat([user({"type": "image", "image": picture(40, 50)}, text("?"))], FEW)
        )
