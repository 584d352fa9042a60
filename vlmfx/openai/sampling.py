"""SamplingParams of a body, by OpenAI's names and vLLM's, with the defaults that these have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from vlmfx.engine.fields import boolean, integer, refuse
from vlmfx.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from vlmfx.engine.structured_outputs import ABSENT, KINDS, StructuredOutputsParams
from vlmfx.errors import InvalidRequest
from vlmfx.openai.fields import FORMS, GUIDED, SAMPLING

REST_OF_CONTEXT = (
    2**31 - 1
)  # max_tokens where a chat says nothing: an answer ends at the context at the latest, as in vLLM
COMPLETION_TOKENS = 16  # OpenAI's default for a completion, and vLLM's


def chat_sampling(fields: Mapping[str, Any]) -> SamplingParams:
    """The parameters of a chat's checked fields; temperature is 1 and max_tokens the rest of the context by default."""
    names = ("max_completion_tokens", "max_tokens")
    given = {name: fields[name] for name in names if name in fields}
    if len(set(map(repr, given.values()))) > 1:
        refuse("max_tokens", given["max_tokens"], "what max_completion_tokens says", "leave one of the two out")
    limit = next(iter(given.values()), REST_OF_CONTEXT)
    wanted = boolean("logprobs", fields.get("logprobs", False))
    num_top = fields.get("top_logprobs")
    if num_top is not None:
        hint = "0 asks for the chosen token's alone"
        num_top = integer("top_logprobs", num_top, 0, MAX_LOGPROBS, hint)
        if num_top and not wanted:
            refuse("top_logprobs", num_top, "logprobs true beside it", "set logprobs, or leave top_logprobs out")
    return _params(fields, "max_completion_tokens" if "max_tokens" not in given else "max_tokens", limit,
                   (num_top or 0) if wanted else None)  # fmt: skip


def completion_sampling(fields: Mapping[str, Any]) -> SamplingParams:
    """The parameters of a completion's checked fields; temperature is 1 and max_tokens 16 by default."""
    num_top = fields.get("logprobs")
    if num_top is not None:
        num_top = integer("logprobs", num_top, 0, MAX_LOGPROBS, "0 asks for the chosen token's alone")
    return _params(fields, "max_tokens", fields.get("max_tokens", COMPLETION_TOKENS), num_top)


def _params(fields: Mapping[str, Any], limit_name: str, limit: Any, logprobs: int | None) -> SamplingParams:
    limit = integer(limit_name, limit, 1, None, "leave it out for the default")
    form = _form(fields)
    named = {name: fields[name] for name in sorted(SAMPLING & fields.keys())}
    return SamplingParams(**named, max_tokens=limit, logprobs=logprobs, structured_outputs=form)


def _form(fields: Mapping[str, Any]) -> StructuredOutputsParams | None:
    """The form of the answer that one field asks for."""
    forms = {name: form for name in sorted(FORMS & fields.keys()) if (form := _form_of(name, fields[name]))}
    if len(forms) > 1:
        first, second = list(forms)[:2]
        raise InvalidRequest(second, f"it stands beside {first}; leave one of the two out.", found=fields[second])
    return next(iter(forms.values()), None)


def _form_of(name: str, value: Any) -> StructuredOutputsParams | None:
    if name in GUIDED:
        return StructuredOutputsParams(**{GUIDED[name]: value}, sent_as=name)
    if not isinstance(value, Mapping):
        refuse(name, value, "an object", "leave it out for free text")
    if name == "structured_outputs":
        given = {key: v for key, v in value.items() if v is not None}
        unknown = [key for key in given if key not in KINDS and key not in ABSENT]
        if unknown:
            refuse(f"{name}.{unknown[0]}", value[unknown[0]], f"one of {', '.join(KINDS)}", "remove it")
        return StructuredOutputsParams(**given) if given else None
    return _response_format(value)


def _response_format(value: Mapping[str, Any]) -> StructuredOutputsParams | None:
    """OpenAI's {"type": "text" | "json_object" | "json_schema", "json_schema": {"name", "schema", ...}}."""
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True, sent_as="response_format")
    if kind != "json_schema":
        _refuse_format("type", kind, '"text", "json_object" or "json_schema"')
    holder = value.get("json_schema")
    key = "schema" if isinstance(holder, Mapping) and "schema" in holder else "json_schema"
    if not isinstance(holder, Mapping) or holder.get(key) is None:
        _refuse_format("json_schema", holder, 'an object with the schema as "schema"')
    return StructuredOutputsParams(json=holder[key], sent_as=f"response_format.json_schema.{key}")


def _refuse_format(key: str, found: Any, expected: str) -> NoReturn:
    refuse(f"response_format.{key}", found, expected, "leave response_format out for free text")
