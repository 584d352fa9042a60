"""Log-probabilities as OpenAI's two endpoints show them, and those of prompts as vLLM does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmfx.engine.request import CompletionOutput, Logprob
from vlmfx.openai.requests import Form

LEAST = -9999.0  # for −∞, which JSON has not; vLLM's number


def chat_logprobs(one: CompletionOutput, form: Form) -> dict[str, Any] | None:
    """{"content": an object a token}; None where none were asked for."""
    if one.logprobs is None:
        return None

    def shown(token: int, value: Logprob) -> dict[str, Any]:
        text = _text(token, value, form)
        return {"token": text, "logprob": _number(value), "bytes": list(text.encode("utf-8", errors="replace"))}

    content = [
        {
            **shown(token, entry[token]),
            "top_logprobs": [shown(i, value) for i, value in _likeliest(entry, form.num_top)],
        }
        for token, entry in zip(one.token_ids, one.logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(one: CompletionOutput, form: Form, offset: int = 0) -> dict[str, Any] | None:
    """The older form: a list a key, an item a token; the chosen token is among top_logprobs. None where none were asked for.

    offset: characters of the tokens before these."""
    if one.logprobs is None:
        return None
    tokens, numbers, tops, offsets = [], [], [], []
    for token, entry in zip(one.token_ids, one.logprobs, strict=True):
        text = _text(token, entry[token], form)
        tokens.append(text)
        numbers.append(_number(entry[token]))
        offsets.append(offset)
        offset += len(text)
        chosen = {token: entry[token], **dict(_likeliest(entry, form.num_top))}
        tops.append({_text(i, value, form): _number(value) for i, value in chosen.items()})
    return {"tokens": tokens, "token_logprobs": numbers, "top_logprobs": tops, "text_offset": offsets}


def prompt_logprobs(given: Sequence[dict[int, Logprob] | None] | None) -> list[dict[str, Any] | None] | None:
    """None, then an object a prompt token, by token id."""
    if given is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token): {"logprob": _number(value), "rank": value.rank, "decoded_token": value.decoded_token}
            for token, value in entry.items()
        }
        for entry in given
    ]


def _likeliest(entry: dict[int, Logprob], num: int) -> list[tuple[int, Logprob]]:
    """The num likeliest of a position's candidates, in order; the chosen one is among these by its rank alone."""
    return sorted(entry.items(), key=lambda item: (item[1].rank or 2**31, -item[1].logprob))[:num]


def _text(token: int, value: Logprob, form: Form) -> str:
    return f"token_id:{token}" if form.names_ids else value.decoded_token or ""


def _number(value: Logprob) -> float:
    return max(value.logprob, LEAST)
