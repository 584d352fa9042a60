"""One prompt text from chat messages, by a checkpoint's Jinja template.

Follows huggingface/transformers 5.23: src/transformers/utils/chat_template_utils.py, and in telling templates that take
strings from those that take parts vllm-project/vllm: vllm/entrypoints/chat_utils.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from vlmfx.errors import CheckpointError, InvalidRequest, reason_of
from vlmfx.processing.sandbox import BUDGET, MAX_CHARS, Budget, Sandbox

FIELD = "chat_template"
TEMPLATES = Path(__file__).parents[1] / "assets" / "templates"  # the shipped ones, given by their bare names
MAX_TEMPLATE_CHARS = 2**20

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


def load_chat_template(folder: str | Path, override: str | Path | None = None) -> str | None:
    """The template's text: override (a template, the path of one or a shipped one's name), else the folder's, else None.

    Order within the folder: "chat_template" in processor_config.json, chat_template.json, chat_template.jinja,
    "chat_template" in tokenizer_config.json (of a list of named ones, "default"): what transformers' processors take,
    and after them its tokenizers. Raises InvalidRequest for an override that is not there, CheckpointError for a file
    that cannot be read.
    """
    if override is not None:
        return _override_text(override)
    folder = Path(folder)
    try:
        for name in ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
            path = folder / name
            if not path.is_file():
                continue
            text = path.read_text(encoding="utf-8")
            found = text if name.endswith(".jinja") else json.loads(text).get("chat_template")
            if isinstance(found, list):
                found = {named["name"]: named["template"] for named in found}
            if isinstance(found, dict):
                found = found.get("default")
            if found is not None:
                return str(found)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        message = (
            f"{path}: its chat template cannot be read ({reason_of(error)}); download it again or pass chat_template=…."
        )
        raise CheckpointError(message) from error
    return None


def shipped_templates() -> list[str]:
    """The bare names of the templates that come with vlmfx."""
    return sorted(path.name for path in TEMPLATES.glob("*.jinja"))


def shipped_template(name: str | Path) -> Path | None:
    """The shipped template of this name, which may lack its ".jinja"; None where there is none."""
    file = f"{str(name).removesuffix('.jinja')}.jinja"
    return TEMPLATES / file if file in shipped_templates() else None


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **kwargs: Any,
) -> str:
    """The prompt, as transformers' apply_chat_template(tokenize=False) renders it.

    kwargs reach the template (tools, documents, enable_thinking, ...). Templates come with a checkpoint and are not
    trusted: they run in Jinja's sandbox and see plain data only, an image or tensor as its type's name. Raises
    InvalidRequest where there is no template, and for whatever goes wrong inside it.
    """
    compiled = _compile(template)
    if continue_final_message and add_generation_prompt:
        message = "it cannot be combined with add_generation_prompt; set one of them to False."
        raise InvalidRequest("continue_final_message", message)
    pieces: list[str] = []
    num_chars = 0
    try:
        chat = _plain(list(messages))
        final = _tag_final_message(chat) if continue_final_message else ""
        variables = {**special_tokens, "tools": None, "documents": None, **_plain(kwargs), BUDGET: Budget()}
        for piece in compiled.generate(messages=chat, add_generation_prompt=add_generation_prompt, **variables):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > MAX_CHARS:
                raise OverflowError(f"it writes more than {MAX_CHARS} characters")
    except InvalidRequest:
        raise
    except Exception as error:  # a template is a program: it can raise anything
        reason = reason_of(error)
        message = f"the template cannot render these messages ({reason}); change the messages or pass chat_template=…."
        raise InvalidRequest(FIELD, message, found=reason) from error
    prompt = "".join(pieces)
    return _up_to_tag(prompt, final) if continue_final_message else prompt


@lru_cache(maxsize=16)
def template_takes_parts(template: str | None) -> bool:
    """Whether the template loops over a message's content, and so wants a list of parts, not a string."""
    tree = _environment().parse(_compile_source(template))
    aliases = {"content"}  # macros and loops over "content" by itself, as in Qwen3-VL's template
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, aliases):
            aliases.add(assign.target.name)
    return any(_is_content(loop.iter, aliases) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node | None, aliases: set[str]) -> bool:
    """Whether an expression is a message's content, behind filters, tests and slices."""
    while isinstance(node, (nodes.Filter, nodes.Test)) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Name) and node.name in aliases


def _override_text(override: str | Path) -> str:
    # Told apart by what only one of them can hold: a path has no line break, a template hardly lacks braces.
    if isinstance(override, str) and ("{" in override or "\n" in override):
        return override
    try:
        is_file, shipped = Path(override).is_file(), shipped_template(override)
        return (Path(override) if is_file or shipped is None else shipped).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        message = (
            f"{str(override)[:200]!r} is neither a readable file nor a Jinja template; "
            f"give one of them, or a shipped one: {', '.join(shipped_templates())}."
        )
        raise InvalidRequest(FIELD, message, found=str(override)[:200], expected=shipped_templates()) from error


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}, which marks assistant text for training, renders its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> Sandbox:
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.add_filter("tojson", _tojson)  # Jinja's own escapes HTML
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def _compile_source(template: str | None) -> str:
    _compile(template)  # raises for a missing or malformed one
    assert template is not None
    return template


@lru_cache(maxsize=16)  # a pure function of the text: compiling takes milliseconds, rendering microseconds
def _compile(template: str | None) -> jinja2.Template:
    if template is None:
        message = "this model has no chat template; pass chat_template=… with a Jinja text or the path of a file."
        raise InvalidRequest(FIELD, message, found=None, expected="a Jinja template")
    if len(template) > MAX_TEMPLATE_CHARS:
        message = f"the template has {len(template)} characters, expected at most {MAX_TEMPLATE_CHARS}; shorten it."
        raise InvalidRequest(FIELD, message, found=len(template), expected=MAX_TEMPLATE_CHARS)
    try:
        return _environment().from_string(template)
    except Exception as error:  # TemplateSyntaxError; RecursionError for absurd nesting
        message = f"the template is not valid Jinja ({reason_of(error)}); correct it."
        raise InvalidRequest(FIELD, message, found=reason_of(error)) from error


def _plain(value: Any) -> Any:
    """The value rebuilt from JSON types; other objects have methods that the sandbox does not know to forbid."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, Path) else f"<{type(value).__name__}>"


def _tag_final_message(chat: list[dict[str, Any]]) -> str:
    """The text to continue; the tag that marks its end is written behind it."""
    content = chat[-1].get("content") if chat else None
    parts = [part for part in content if "text" in part] if isinstance(content, list) else []
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUE_TAG
        return content
    if not parts:
        raise InvalidRequest("continue_final_message", "the last message has no text to continue; give it some.")
    text = str(parts[-1]["text"])
    parts[-1]["text"] = text + _CONTINUE_TAG
    return text


def _up_to_tag(prompt: str, final: str) -> str:
    """The prompt cut where the final message ends; a template that trims the message trims here too."""
    at = prompt.rfind(_CONTINUE_TAG.strip())
    if at < 0 or final.strip() not in prompt:
        message = "the template drops the final message, so it cannot be continued; set it to False."
        raise InvalidRequest("continue_final_message", message)
    return prompt[:at] if prompt[at:].startswith(_CONTINUE_TAG) else prompt[:at].rstrip()
