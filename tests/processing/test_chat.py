"""chat: prompts equal transformers' and the goldens'; parts become placeholders in order; errors are one sentence."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.invariants import is_one_sentence
from tests.versions import transformers_from
from vlmfx.errors import CheckpointError, InvalidRequest
from vlmfx.processing import chat as chat_module
from vlmfx.processing.chat import load_chat_template, render_chat, template_takes_parts
from vlmfx.processing.messages import messages_for_template
from vlmfx.processing.tokenizer import Tokenizer

GOLDENS = Path(__file__).parents[3] / "shared" / "goldens"
FOLDERS = sorted(path.parent for path in GOLDENS.glob("models/*/tokenizer_config.json"))
CASES = sorted(path.parent for path in GOLDENS.glob("*/golden.json") if (path.parent / "input/messages.json").exists())
needs_goldens = pytest.mark.skipif(not FOLDERS, reason=f"needs the golden checkpoints in {GOLDENS}")

STRINGS = "{% for m in messages %}{{ m.role + ': ' + m['content'] + '\n' }}{% endfor %}"
PARTS = (
    "{% for m in messages %}{% for p in m['content'] %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}\n{% endfor %}"
)
IMAGE = {"type": "image", "image": "a.png"}


def text(words):
    return {"type": "text", "text": words}


def user(*content):
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def marks(image, video="<video>"):
    return {"image": image, "video": video}


def placeholder_of(name):
    return marks(
        {"phi3v": "<|image_{number}|>", "minicpmv": "(<image>./</image>)"}.get(name.split("-")[0], "<image>"),
        "<|vision_start|><|video_pad|><|vision_end|>",
    )


CONVERSATIONS = {
    "text": [user("How are you?")],
    "system": [{"role": "system", "content": "Be brief."}, user(text("Hi <b>é</b> & 'x'"))],
    "image": [user(IMAGE, text("What is this?"))],
    "two images": [user(IMAGE, text("and"), IMAGE, text("differ how?"))],
    "turns": [user(IMAGE, text("a")), {"role": "assistant", "content": "b "}, user("c"), user(IMAGE, text("d\n"))],
    "answered": [user("a"), {"role": "assistant", "content": [text("b")]}],
}


@needs_goldens
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("name", list(CONVERSATIONS))
def test_goldens_render_as_in_transformers(folder, name):
    transformers = transformers_from(5, 0, "is older than the version followed (5)")
    template = load_chat_template(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ours = Tokenizer.load(folder)
    messages, media = messages_for_template(
        CONVERSATIONS[name], template_takes_parts(template), placeholder_of(folder.name)
    )
    assert [m.value for m in media] == ["a.png"] * str(CONVERSATIONS[name]).count("a.png")
    for options in ({}, {"add_generation_prompt": False}, {"add_vision_id": True}):
        options = {"add_generation_prompt": True, **options}
        expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
        assert render_chat(template, messages, special_tokens=ours.special_tokens, **options) == expected
    options = {"add_generation_prompt": False, "continue_final_message": True}
    expected = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    assert render_chat(template, messages, special_tokens=ours.special_tokens, **options) == expected


@needs_goldens
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden_messages_give_the_golden_prompt(case):
    folder = (case / json.loads((case / "golden.json").read_text())["model"]).resolve()
    template = load_chat_template(folder)
    special_tokens = Tokenizer.load(folder).special_tokens
    expected = (case / "input/prompt.txt").read_text()
    for file in ("messages.json", "messages_parts.json"):
        if not (case / "input" / file).exists():
            continue
        messages = json.loads((case / "input" / file).read_text())
        if '"embeds"' not in json.dumps(messages):
            takes_parts = template_takes_parts(template)
            messages, _ = messages_for_template(messages, takes_parts, placeholder_of(folder.name))
        prompt = render_chat(template, messages, special_tokens=special_tokens)
        assert prompt == expected or prompt + "<|endoftext|>" == expected  # dse appends what it pools


@needs_goldens
def test_which_goldens_take_parts():
    takes = {folder.name: template_takes_parts(load_chat_template(folder)) for folder in FOLDERS}
    assert {name for name, parts in takes.items() if parts} == {"dse-a", "llava-a", "llava-b", "qwen2vl-a"}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (STRINGS, False),
        (PARTS, True),
        ("{% for m in messages %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{% set c = m['content'] %}{% for p in c %}{{ p }}{% endfor %}{% endfor %}", True),
        ("{% macro show(content) %}{% for item in content %}{{ item.text }}{% endfor %}{% endmacro %}", True),
        ("{% for p in messages[0]['content'][1:] %}{{ p }}{% endfor %}", True),
        ("{% for m in messages %}{% for line in m['content'].split('\n') %}{{ line }}{% endfor %}{% endfor %}", False),
        ("{% for m in messages %}{% for t in m.tool_calls %}{{ t }}{% endfor %}{{ m.content }}{% endfor %}", False),
    ],
)  # fmt: skip
def test_template_takes_parts(template, expected):
    assert template_takes_parts(template) is expected


# ---- messages


def test_parts_templates_get_parts_and_media_in_order():
    pil, rows = Image.new("RGB", (2, 2)), np.zeros((4, 8), np.float32)
    content = [
        {"type": "image", "image": pil, "uuid": "7"},
        "words",
        {"type": "image_url", "image_url": {"url": "http://h/a.png", "detail": "low"}, "uuid": "8"},
        {"type": "image_url", "image_url": "file:///a.png"},
        text("more"),
        {"type": "image_embeds", "image_embeds": rows},
        {"type": "video_url", "video_url": {"url": "http://h/a.mp4"}},
        {"type": "image", "path": Path("b.png")},
        {"type": "video", "video": [pil, pil]},
        {"type": "image_pil", "image_pil": pil},
    ]
    messages, media = messages_for_template([{"role": "user", "content": content, "name": "x"}], True, marks("<image>"))
    image, video = {"type": "image"}, {"type": "video"}
    parts = [image, text("words"), image, image, text("more"), image, video, image, video, image]
    assert messages == [{"role": "user", "content": parts, "name": "x"}]
    assert [(m.kind, m.modality) for m in media] == [
        ("image", "image"),
        ("image_url", "image"),
        ("image_url", "image"),
        ("image_embeds", "image"),
        ("video_url", "video"),
        ("image", "image"),
        ("video", "video"),
        ("image_pil", "image"),
    ]
    assert media[0].value is pil
    assert media[3].value is rows
    assert [m.value for m in media[1:3]] == ["http://h/a.png", "file:///a.png"]
    assert [m.value for m in media[4:6]] == ["http://h/a.mp4", Path("b.png")]
    assert [m.field for m in media[:3]] == [f"messages[0].content[{i}]" for i in (0, 2, 3)]
    assert content[0] == {"type": "image", "image": pil, "uuid": "7"}  # the caller's messages stay as they were


def test_string_templates_get_placeholders_in_order():
    video = {"type": "video", "video": "a.mp4"}
    chat = [
        user(text("a"), IMAGE, text("b")),
        {"role": "assistant", "content": None},
        user(IMAGE, video, IMAGE, text("c")),
    ]
    messages, media = messages_for_template(chat, False, marks("<{number}>", "[{number}]"))
    assert [message["content"] for message in messages] == ["a\n<1>\nb", "", "<2>\n[1]\n<3>\nc"]
    assert [m.value for m in media] == ["a.png", "a.png", "a.mp4", "a.png"]
    messages, _ = messages_for_template(chat, False, marks("<image>"))
    assert messages[2]["content"] == "<image>\n<video>\n<image>\nc"


def test_placeholders_that_the_text_writes_itself_are_not_added():
    chat = [user(IMAGE, IMAGE, text("see <|image_1|> here"))]
    messages, images = messages_for_template(chat, False, marks("<|image_{number}|>"))
    assert messages[0]["content"] == "<|image_2|>\nsee <|image_1|> here"
    assert len(images) == 2


@pytest.mark.parametrize("takes_parts", [True, False])
def test_a_video_for_a_model_that_takes_none(takes_parts):
    chat = [user("a"), user(text("b"), {"type": "video", "video": "a.mp4"})]
    with pytest.raises(InvalidRequest, match="takes no video; send it images only") as caught:
        messages_for_template(chat, takes_parts, {"image": "<image>"})
    assert caught.value.field == "messages[1].content[1]"


@pytest.mark.parametrize(
    ("messages", "field", "says"),
    [
        ([user({"type": "audio", "audio": "x"})], "messages[0].content[0]", "text, image, image_url, image_embeds"),
        ([user({"words": "x"})], "messages[0].content[0]", "text, image"),
        ([user(3)], "messages[0].content[0]", "'int'"),
        ([user("x"), user({"type": "text"})], "messages[1].content[0]", "text"),
        ([user({"type": "image"})], "messages[0].content[0]", "image"),
        ([user({"type": "image_url", "image_url": {}})], "messages[0].content[0]", "image_url"),
        ([user({"type": "image_url", "image_url": b"GIF"})], "messages[0].content[0]", "bytes"),
        ([user({"type": "video_url", "video_url": {"uri": "x"}})], "messages[0].content[0]", "video_url"),
        ([user({"type": "image_embeds"})], "messages[0].content[0]", "image_embeds"),
        ([{"role": "user", "content": 3}], "messages[0].content", "int"),
        ([{"content": "x"}], "messages[0]", "role"),
        (["x"], "messages[0]", "role"),
        ([], "messages", "at least one"),
        ("x", "messages", "list"),
        (None, "messages", "list"),
    ],
)
def test_messages_that_cannot_be_read(messages, field, says):
    with pytest.raises(InvalidRequest) as caught:
        messages_for_template(messages, True, marks("<image>"))
    assert caught.value.field == field
    assert says in str(caught.value)


# ---- templates


def test_what_transformers_offers_templates():
    template = (
        "{%- for m in messages %}\n    {%- if loop.index == 2 %}{% break %}{% endif %}\n"
        "    {% generation %}{{ m.content }}{% endgeneration %}\n{%- endfor %}\n"
        "{{ tools | tojson }}|{{ {'a': '<é>'} | tojson(indent=1) }}|{{ bos_token }}|{{ strftime_now('%Y') }}|{{ x }}"
    )
    out = render_chat(template, [user("a"), user("b")], special_tokens={"bos_token": "<s>"}, tools=[{"n": "<é>"}])
    assert out == f'a[{{"n": "<é>"}}]|{{\n "a": "<é>"\n}}|<s>|{time.strftime("%Y")}|'


def test_templates_see_plain_data_only():
    chat = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (2, 2))}]}]
    assert render_chat("{{ messages[0].content[0].image }}", chat, special_tokens={}) == "<Image>"
    assert render_chat("{{ x }}", chat, special_tokens={}, x=np.float32(1)) == "<float32>"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "chat_template="),
        ("{% for %}", "not valid Jinja"),
        ("{% if x %}", "not valid Jinja"),
        ("{{ raise_exception('Roles must alternate.') }}", "Roles must alternate"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 999 }}{% endfor %}{% endfor %}", "characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_templates_that_fail(template, says):
    with pytest.raises(InvalidRequest) as caught:
        render_chat(template, [user("hi")], special_tokens={})
    assert caught.value.field == "chat_template"
    assert says in str(caught.value)


B = "{% set b = 'a' * 1000000 %}"
NS = "{% set ns = namespace(a='aa', l=[1]) %}{% for i in range(60) %}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ('a' * 3000000000) | length }}",
        "{{ (3000000000 * [1]) | length }}",
        "{{ 10 ** (10 ** 9) }}",
        "{{ '%900000000d' % 1 }}",
        "{{ '%*d' % (900000000, 1) }}",
        "{{ '{:>900000000}'.format(1) }}",
        "{{ '%900000000d' | format(1) }}",
        "{{ 'a' | center(10 ** 9) }}",
        "{{ 'a'.ljust(10 ** 9) }}",
        "{{ 'a' | indent(10 ** 9, true) }}",
        "{{ [1] | tojson(indent=10 ** 9) }}",
        "{{ [] | slice(10 ** 12) | list }}",
        "{{ [1] | batch(10 ** 9, 1) | list }}",
        "{{ lipsum(n=10 ** 9) }}",
        "{{ range(99999) | map('center', 1000000) | list | length }}",
        "{{ (range(99999) | join('a' * 100000)) | length }}",
        B + "{{ b.replace('a', b) | length }}",
        B + "{{ b | replace('a', b) | length }}",
        B + "{{ b.join(range(99999) | map('string')) | length }}",
        B + "{% set x %}{% for i in range(99999) %}{{ b }}{% endfor %}{% endset %}",
        B + "{{ ('{0}' * 100000).format(b) | length }}",
        B + "{% for i in range(99999) %}{% if 'c' in b %}{% endif %}{% endfor %}",
        B + "{% for i in range(99999) %}{% if b[1:] %}{% endif %}{% endfor %}",
        NS + "{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a | length }}",
        NS + "{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a | length }}",
        NS + "{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l | length }}",
        NS + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
        NS + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson | length }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(9) recursive %}{% if loop.depth < 30 %}{{ loop(range(9)) }}{% endif %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)  # fmt: skip
def test_templates_end_soon_and_take_little_memory(template):
    """Each would take gigabytes or never end; resident memory, as the sandbox's own work is not Python's alone."""
    resource = pytest.importorskip("resource")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(InvalidRequest) as caught:
        render_chat(template, [user("hi")], special_tokens={})
    assert is_one_sentence(caught.value)
    assert time.process_time() - start < 20  # about one, alone
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_200_000


def test_long_conversations_are_within_the_bounds():
    chat = [user("word " * 1000) if i % 2 == 0 else {"role": "assistant", "content": "yes"} for i in range(1000)]
    template = STRINGS.replace("{{", "{% if loop.index0 == messages | length - 1 and 'x' in m.content %}!{% endif %}{{")
    assert len(render_chat(template, chat, special_tokens={})) == sum(len(m["content"] + m["role"]) + 3 for m in chat)


def test_what_bounded_filters_and_operators_give():
    template = (
        "{{ 'a' * 3 }}{{ [1] * 2 }}{{ [1] + [2] }}{{ 'a' + 'b' }}{{ 1 + 2 }}{{ 2 ** 3 }}{{ 7 % 4 }}{{ '%s-%d' % ('x', 3) }}"
        "{{ 'a' ~ 1 ~ none }}{{ 'x\ny' | indent(1) }}{{ [1, 2] | join(',') }}{{ 'aba'.replace('a', 'c') }}{{ ','.join(['p', 'q']) }}"
        "{{ [3, 1] | sort | first }}{{ '{}!{k}'.format(1, k=2) }}{{ 'abc'[1:] }}{{ 1 < 2 < 3 }}{{ 1.5 * 2 }}"
        "{{ [[1, 2]] | map('sum') | list }}"
        "{% for i in [1, 2, 3] if i != 2 %}{{ loop.index }}{{ loop.last }}{% else %}-{% endfor %}{% filter upper %}z{% endfilter %}"
    )
    assert render_chat(template, [], special_tokens={}) == (
        "aaa[1, 1][1, 2]ab383x-3a1Nonex\n y1,2cbcp,q11!2bcTrue3.0[3]1False2TrueZ"
    )


def test_a_prompt_that_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(chat_module, "MAX_CHARS", 1000)
    assert len(render_chat("{{ 'a' * 1000 }}", [], special_tokens={})) == 1000
    with pytest.raises(InvalidRequest, match="it writes more than 1000 characters") as caught:
        render_chat("{{ 'a' * 1000 }}a", [], special_tokens={})
    assert caught.value.field == "chat_template"


def test_a_template_that_is_too_long_is_refused():
    with pytest.raises(InvalidRequest, match="expected at most 1048576; shorten it"):
        render_chat("a" * (2**20 + 1), [], special_tokens={})


def test_continue_final_message():
    chat = [user("q"), {"role": "assistant", "content": "The answer is "}]
    options: dict = {"special_tokens": {}, "continue_final_message": True}
    assert render_chat(STRINGS, chat, add_generation_prompt=False, **options).endswith("assistant: The answer is ")
    trimming = STRINGS.replace("m['content']", "m['content'] | trim")
    assert render_chat(trimming, chat, add_generation_prompt=False, **options).endswith("assistant: The answer is")
    assert chat[1]["content"] == "The answer is "
    for template, messages, prompt in [(STRINGS, chat, True), ("no messages", chat, False), (STRINGS, [], False)]:
        with pytest.raises(InvalidRequest):
            render_chat(template, messages, add_generation_prompt=prompt, **options)


# ---- where templates come from


def test_order_of_the_files(tmp_path):
    assert load_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    assert load_chat_template(tmp_path) is None
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "C"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert load_chat_template(tmp_path) == "C"
    config.write_text('{"chat_template": "D"}')
    assert load_chat_template(tmp_path) == "D"
    (tmp_path / "chat_template.jinja").write_text("E")
    assert load_chat_template(tmp_path) == "E"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "F"}')
    assert load_chat_template(tmp_path) == "F"
    (tmp_path / "processor_config.json").write_text('{"chat_template": "G"}')
    assert load_chat_template(tmp_path) == "G"
    for broken in ("{", "[]", '{"chat_template": [{"name": 1}]}'):
        (tmp_path / "processor_config.json").write_text(broken)
        with pytest.raises(CheckpointError, match="processor_config"):
            load_chat_template(tmp_path)


def test_override(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "D"}')
    path = tmp_path / "mine.jinja"
    path.write_text(STRINGS)
    for override in (path, str(path), STRINGS):
        assert load_chat_template(tmp_path, override) == STRINGS
    for missing in ("none.jinja", tmp_path, "x" * 5000, "a\0"):
        with pytest.raises(InvalidRequest) as caught:
            load_chat_template(tmp_path, missing)
        assert caught.value.field == "chat_template"


def test_random_messages_give_a_prompt_or_our_error():
    rng = random.Random(0)
    values = [
        None,
        3,
        "",
        "a",
        b"x",
        [],
        {},
        [1],
        {"type": "text", "text": "t"},
        IMAGE,
        {"type": "image_url"},
        object(),
    ]
    for _ in range(500):
        chat = [{"role": rng.choice(["user", 3, None]), "content": rng.choice([*values, [rng.choice(values)]])}]
        for template in (STRINGS, PARTS):
            try:
                messages, _ = messages_for_template(chat, template_takes_parts(template), marks("<image>"))
                render_chat(template, messages, special_tokens={})
            except InvalidRequest:
                pass
