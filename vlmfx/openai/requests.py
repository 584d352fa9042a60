"""What a body asks for: its prompts as `LLM.generate` and `LLM.embed` take them, and how to answer them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmfx.engine.fields import boolean, integer, is_unicode, refuse
from vlmfx.engine.sampling_params import SamplingParams
from vlmfx.errors import InvalidRequest, shown
from vlmfx.openai.fields import CHAT, COMPLETION, EMBEDDING, TEMPLATE, checked
from vlmfx.openai.sampling import chat_sampling, completion_sampling

MAX_PROMPTS = 2048  # of one body; OpenAI's limit


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest:
    """prompts: one a vector; dimensions of each, None for all; is_base64: whether vectors go as base64 of little-endian float32."""

    prompts: list[dict[str, Any]]
    dimensions: int | None = None
    is_base64: bool = False


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a response shows beside the text. num_top: of the likeliest tokens at a position, where logprobs were asked for.

    returns_ids: token ids, too (return_token_ids); names_ids: tokens of logprobs as "token_id:5" (return_tokens_as_token_ids)."""

    num_top: int = 0
    returns_ids: bool = False
    names_ids: bool = False


def chat_request(body: Any) -> tuple[dict[str, Any], SamplingParams]:
    """The prompt of a body of /v1/chat/completions, and how it is answered. Raises InvalidRequest, which names the field."""
    fields = checked(body, CHAT)
    if "messages" not in fields:
        raise InvalidRequest("messages", "it is missing; give a list of at least one message.")
    prompt = conversation(fields)
    tools = fields.get("tools")
    if tools:
        if fields.get("tool_choice") != "none":
            message = 'calls of tools are not read out of answers yet; leave them out, or set tool_choice to "none".'
            raise InvalidRequest("tools", message, found=tools)
        prompt["chat_template_kwargs"] = {"tools": tools, **prompt.get("chat_template_kwargs", {})}
    elif fields.get("tool_choice", "none") not in ("none", "auto"):
        refuse("tool_choice", fields["tool_choice"], '"none" or "auto"', "there are no tools to choose from")
    return prompt, chat_sampling(fields)


def completion_request(body: Any) -> tuple[list[dict[str, Any]], SamplingParams]:
    """The prompts of a body of /v1/completions, n answers each, and how they are answered. Raises InvalidRequest."""
    fields = checked(body, COMPLETION)
    return _prompts("prompt", fields), completion_sampling(fields)


def embedding_request(body: Any) -> EmbeddingRequest:
    """The prompts of a body of /v1/embeddings, or its conversation (vLLM's `messages`), whose template by default adds no
    beginning of an answer, as in vLLM. Raises InvalidRequest."""
    fields = checked(body, EMBEDDING)
    if "messages" in fields:
        if "input" in fields:
            raise InvalidRequest("input", "it stands beside messages; leave one of the two out.", found=fields["input"])
        prompts = [{"add_generation_prompt": False, **conversation(fields)}]
    else:
        alone = sorted(TEMPLATE & fields.keys() - {"mm_processor_kwargs", "media_io_kwargs"})
        if alone:
            raise InvalidRequest(alone[0], "it plays no part without messages; remove it.", found=fields[alone[0]])
        prompts = _prompts("input", fields)
    dimensions = fields.get("dimensions")
    if dimensions is not None:
        dimensions = integer("dimensions", dimensions, 1, None, "leave it out for all of a vector")
    form = fields.get("encoding_format", "float")
    if form not in ("float", "base64"):
        refuse("encoding_format", form, '"float" or "base64"', "leave it out for numbers")
    return EmbeddingRequest(prompts=prompts, dimensions=dimensions, is_base64=form == "base64")


def form_of(body: Mapping[str, Any], params: SamplingParams) -> Form:
    """What the response to a body is to show. Raises InvalidRequest."""

    def flag(name: str) -> bool:
        return body.get(name) is not None and boolean(name, body[name])

    return Form(
        num_top=params.logprobs or 0,
        returns_ids=flag("return_token_ids"),
        names_ids=flag("return_tokens_as_token_ids"),
    )


def request_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the engine's Request that a body sets: priority, and salt by cache_salt. Raises InvalidRequest."""
    options: dict[str, Any] = {}
    if body.get("priority") is not None:
        options["priority"] = integer("priority", body["priority"], -(2**31), 2**31 - 1, "lower ones go first")
    salt = body.get("cache_salt")
    if salt is not None:
        if not isinstance(salt, str) or not salt or not is_unicode(salt):
            refuse("cache_salt", salt, "a string of at least one character", "leave it out to share what is cached")
        options["salt"] = salt
    return options


def conversation(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The messages and what goes with them."""
    variables = fields.get("chat_template_kwargs", {})
    if not isinstance(variables, Mapping):
        refuse("chat_template_kwargs", variables, "an object", "leave it out for none")
    return {name: fields[name] for name in ("messages", *sorted(TEMPLATE)) if name in fields}


def _prompts(name: str, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A text, token ids, or a list of either."""
    given = fields.get(name)
    expected = "a string, token ids, or a list of them"
    if given is None:
        raise InvalidRequest(name, f"it is missing; give {expected}.", expected=expected)
    is_one = isinstance(given, str) or (isinstance(given, list) and given and all(type(i) is int for i in given))
    items = [given] if is_one else given
    if not isinstance(items, list) or not items:
        refuse(name, given, expected, "give at least one")
    if len(items) > MAX_PROMPTS:
        message = f"it holds {len(items)} prompts, expected at most {MAX_PROMPTS}; send more requests."
        raise InvalidRequest(name, message, found=len(items), expected=MAX_PROMPTS)
    extra = {key: fields[key] for key in ("mm_processor_kwargs", "media_io_kwargs") if key in fields}
    return [{**_prompt(name, item), **extra} for item in items]


def _prompt(name: str, item: Any) -> dict[str, Any]:
    if isinstance(item, str) and item:
        return {"prompt": item}
    if isinstance(item, list) and item and all(type(i) is int for i in item):
        return {"prompt_token_ids": item}
    raise InvalidRequest(name, f"{shown(item)} is no prompt; give text or token ids, at least one.", found=item)
