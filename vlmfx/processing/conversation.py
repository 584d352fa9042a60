"""A request's messages and what stands beside them, to one prompt text and the media it has placeholders for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmfx.errors import InvalidRequest, shown
from vlmfx.processing.chat import (
    load_chat_template,
    render_chat,
    shipped_template,
    shipped_templates,
    template_takes_parts,
)
from vlmfx.processing.messages import Media, messages_for_template

# What may stand beside "messages".
KEYS = {
    "chat_template", "chat_template_content_format", "add_generation_prompt", "continue_final_message", "chat_template_kwargs",
}  # fmt: skip
CONTENT_FORMATS = ("auto", "string", "openai")


def render(
    request: Mapping[str, Any],
    *,
    template: str | None,
    placeholders: Mapping[str, str],
    special_tokens: Mapping[str, str],
    reads_files: bool,
    check: Callable[[Sequence[Media]], None],
) -> tuple[str, list[Media]]:
    """(the prompt, its images and videos in order) of a request with "messages", by its own chat template or else `template`.

    reads_files: whether a request's template may be a path. check raises for media that are too many, before a text is put
    together. Raises InvalidRequest."""
    if "chat_template" in request:
        template = _template_of(request["chat_template"], reads_files)
    if template is None:
        message = (
            "the checkpoint has none; pass chat_template=… with a Jinja text, a file's path or a shipped one's name "
            f"({', '.join(shipped_templates())})."
        )
        raise InvalidRequest("chat_template", message)
    form = request.get("chat_template_content_format", "auto")
    if form not in CONTENT_FORMATS:
        message = f"it is {shown(form)}; use one of {', '.join(CONTENT_FORMATS)}."
        raise InvalidRequest("chat_template_content_format", message, found=form, expected=CONTENT_FORMATS)
    takes_parts = template_takes_parts(template) if form == "auto" else form == "openai"
    messages, media = messages_for_template(request["messages"], takes_parts, placeholders, check)
    is_continued = _flag(request, "continue_final_message", False)
    prompt = render_chat(
        template,
        messages,
        special_tokens=special_tokens,
        add_generation_prompt=_flag(request, "add_generation_prompt", not is_continued),
        continue_final_message=is_continued,
        **_variables(request.get("chat_template_kwargs", {})),
    )
    return prompt, media


def _template_of(given: Any, reads_files: bool) -> str:
    """A request's chat template: a text, a path or a shipped one's name."""
    if not isinstance(given, (str, Path)) or not str(given):
        message = f"it is {'empty' if given == '' else f'a {type(given).__name__}'}; pass a Jinja text or a path."
        raise InvalidRequest("chat_template", message, found=type(given).__name__)
    is_text = isinstance(given, str) and ("{" in given or "\n" in given)
    if not reads_files and not is_text and shipped_template(given) is None:
        message = "it is neither a Jinja text nor a shipped one's name; send one of them."
        raise InvalidRequest("chat_template", message, found=str(given)[:200], expected=shipped_templates())
    text = load_chat_template("", given)
    assert text is not None
    return text


def _flag(request: Mapping[str, Any], key: str, default: bool) -> bool:
    value = request.get(key, default)
    if not isinstance(value, bool):
        raise InvalidRequest(key, f"it is {shown(value)}; pass True or False.", found=value, expected="bool")
    return value


def _variables(value: Any) -> dict[str, Any]:
    """chat_template_kwargs, which must not take the place of what the other keys say."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        message = "it is no dict of names and values; pass a dict."
        raise InvalidRequest("chat_template_kwargs", message, found=type(value).__name__, expected="dict")
    taken = sorted({"template", "messages", "special_tokens", *KEYS} & set(value))
    if taken:
        message = f"it has {', '.join(taken)}; give {'them' if len(taken) > 1 else 'it'} beside messages instead."
        raise InvalidRequest("chat_template_kwargs", message, found=taken)
    return value
