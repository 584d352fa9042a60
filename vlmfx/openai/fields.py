"""The fields of the three bodies: which are ours, which change nothing, and which are refused unless they ask for nothing.

Source of names: OpenAI's API reference; vllm-project/vllm: vllm/entrypoints/openai/protocol.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmfx.errors import InvalidRequest, ModelNotFound, shown

# SamplingParams has these under the same names.
SAMPLING = frozenset({
    "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p", "seed", "stop",
    "stop_token_ids", "bad_words", "include_stop_str_in_output", "ignore_eos", "min_tokens", "prompt_logprobs",
    "skip_special_tokens", "logit_bias", "allowed_token_ids",
})  # fmt: skip
# Each says of what form the answer is to be; one at most.
GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
FORMS = frozenset({"response_format", "structured_outputs", *GUIDED})
# What `vlmfx.processing.prompt.plan` takes beside messages.
TEMPLATE = frozenset({
    "chat_template", "chat_template_content_format", "add_generation_prompt", "continue_final_message", "chat_template_kwargs",
    "mm_processor_kwargs", "media_io_kwargs",
})  # fmt: skip
# Whoever serves the request reads these: who it is for, how it is sent, when it runs.
COMMON = frozenset({"model", "priority", "cache_salt"})
ANSWERED = frozenset({
    "stream", "stream_options", "logprobs", "max_tokens", "return_token_ids", "return_tokens_as_token_ids",
})  # fmt: skip

CHAT = SAMPLING | FORMS | TEMPLATE | COMMON | ANSWERED | {
    "messages", "top_logprobs", "max_completion_tokens", "tools", "tool_choice",
}  # fmt: skip
COMPLETION = SAMPLING | FORMS | COMMON | ANSWERED | {"prompt"}
EMBEDDING = TEMPLATE | COMMON | {"input", "messages", "dimensions", "encoding_format"}

# What clients send and what changes no answer, whatever it holds.
NO_EFFECT = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "request_id",
    "parallel_tool_calls", "include_reasoning",
})  # fmt: skip
# What is not to be had, with the one value that asks for nothing.
NOT_YET: dict[str, Any] = {
    "best_of": 1, "use_beam_search": False, "length_penalty": 1.0, "echo": False, "spaces_between_special_tokens": True,
    "modalities": ["text"], "normalize": True, "embed_dtype": "float32", "truncate_prompt_tokens": None, "suffix": None,
    "logits_processors": None, "reasoning_effort": None, "documents": None, "audio": None, "prediction": None,
    "functions": None, "function_call": None, "web_search_options": None, "verbosity": None, "prompt_embeds": None,
    "guided_decoding_backend": None, "guided_whitespace_pattern": None, "structural_tag": None, "vllm_xargs": None,
    "kv_transfer_params": None, "thinking_token_budget": None, "repetition_detection": None,
}  # fmt: skip


def checked(body: Any, known: frozenset[str]) -> dict[str, Any]:
    """The fields of a body that have a value and an effect. null is absence. Raises InvalidRequest, which names the field."""
    if not isinstance(body, Mapping):
        kind = type(body).__name__
        raise InvalidRequest("body", f"it is a {kind}; send a JSON object.", found=kind, expected="object")
    fields = {}
    for name, value in body.items():
        if value is None or name in NO_EFFECT:
            continue
        if name in known:
            fields[name] = value
        elif name in NOT_YET:
            none = NOT_YET[name]
            if type(value) not in ((int, float) if type(none) is float else (type(none),)) or value != none:
                remedy = "leave it out" if none is None else f"leave it out, or at {none!r}"
                raise InvalidRequest(name, f"{shown(value)} is not implemented; {remedy}.", found=value, expected=none)
        else:
            raise InvalidRequest(_name(name), "this request has no such field; remove it.", found=value)
    return fields


def check_model(body: Any, served: str, *others: str) -> None:
    """Raise ModelNotFound for a body that is for another model than the one that is served, under any of its names."""
    name = body.get("model") if isinstance(body, Mapping) else None
    if name is not None and name not in (served, *others):
        message = f"it is {shown(name)}, but {shown(served)} is served; name that one, or leave it out."
        raise ModelNotFound("model", message, found=name, expected=served)


def _name(name: object) -> str:
    """A field's name for a message: as it is if it is a short one in plain characters."""
    text = str(name)
    return text if text.isascii() and text.isprintable() and 0 < len(text) <= 80 else shown(text)
