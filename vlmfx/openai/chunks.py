"""Bodies of a stream's chunks, of what is new in a request: OpenAI's keys, and vLLM's beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmfx.engine.events import Event
from vlmfx.engine.fields import boolean, refuse
from vlmfx.engine.request import CompletionOutput
from vlmfx.errors import InvalidRequest
from vlmfx.openai.logprobs import chat_logprobs, completion_logprobs
from vlmfx.openai.requests import Form


@dataclass(frozen=True, kw_only=True)
class StreamForm:
    """shows_usage: whether a last chunk has the usage; is_continuous: whether each chunk has that of what came so far."""

    shows_usage: bool = False
    is_continuous: bool = False


def stream_form(body: Mapping[str, Any]) -> StreamForm | None:
    """How the answer to a body is streamed; None where it is not. Raises InvalidRequest."""
    options = body.get("stream_options")
    if body.get("stream") is None or not boolean("stream", body["stream"]):
        if options is not None:
            refuse("stream_options", options, "stream true beside it", "set stream, or leave stream_options out")
        return None
    if body.get("prompt_logprobs") is not None:
        raise InvalidRequest("prompt_logprobs", "a stream does not show them; leave them out, or set stream to false.")
    if options is None:
        return StreamForm()
    if not isinstance(options, Mapping):
        refuse("stream_options", options, "an object", "leave it out for no usage")
    known = ("include_usage", "continuous_usage_stats", "include_obfuscation")  # the last changes nothing here
    for name, value in options.items():
        if name not in known:
            refuse(f"stream_options.{name}"[:80], value, f"one of {', '.join(known[:2])}", "remove it")
        if value is not None:
            boolean(f"stream_options.{name}", value)
    shows_usage = bool(options.get("include_usage"))
    # As in vLLM, usage in each chunk is part of showing it.
    return StreamForm(
        shows_usage=shows_usage, is_continuous=shows_usage and bool(options.get("continuous_usage_stats"))
    )


@dataclass(kw_only=True)
class Chunks:
    """The chunks of the answer to one body, made of events as they come.

    places: request number → place of its first text among the choices; num_prompt: tokens of its prompt, by the same number."""

    is_chat: bool
    id: str
    created: int
    model_name: str
    form: Form
    stream: StreamForm
    places: dict[int, int] = field(default_factory=dict)
    num_prompt: dict[int, int] = field(default_factory=dict)
    num_answer: int = 0
    _offsets: dict[int, int] = field(default_factory=dict)  # characters of a choice's tokens so far, for logprobs

    def first(self, num_choices: int) -> list[dict[str, Any]]:
        """What a chat's stream begins with: that each choice is the assistant's."""
        if not self.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._body([{"index": i, "delta": delta, "logprobs": None, "finish_reason": None}])
            for i in range(num_choices)
        ]

    def of(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        """What is new, a chunk a choice, and the end of requests that are done."""
        news: dict[int, CompletionOutput] = {}
        for event in events:
            place = self.places[event.request.number]
            one = news.setdefault(place + event.index, CompletionOutput(place + event.index, "", ()))
            one.text += event.text
            one.token_ids += event.token_ids
            if event.request.params.logprobs is not None and event.logprobs:
                one.logprobs = [*(one.logprobs or ()), *event.logprobs]
            if event.finish_reason is not None:
                one.finish_reason, one.stop_reason = event.finish_reason, event.stop_reason
        self.num_answer += sum(len(one.token_ids) for one in news.values())
        return [self._body([self._choice(one)]) for _, one in sorted(news.items()) if self._is_shown(one)]

    def last(self) -> list[dict[str, Any]]:
        """What comes behind all choices."""
        return [self._body([], usage=self._usage())] if self.stream.shows_usage else []

    def _is_shown(self, one: CompletionOutput) -> bool:
        shows_tokens = one.logprobs is not None or self.form.returns_ids or self.stream.is_continuous
        return bool(one.text or one.finish_reason or (shows_tokens and one.token_ids))

    def _choice(self, one: CompletionOutput) -> dict[str, Any]:
        ids = {"token_ids": list(one.token_ids)} if self.form.returns_ids else {}
        end = {"finish_reason": one.finish_reason, "stop_reason": one.stop_reason, **ids}
        if self.is_chat:
            delta = {"content": one.text} if one.text else {}
            return {"index": one.index, "delta": delta, "logprobs": chat_logprobs(one, self.form), **end}
        logprobs = completion_logprobs(one, self.form, self._offsets.get(one.index, 0))
        if logprobs is not None:
            self._offsets[one.index] = self._offsets.get(one.index, 0) + sum(map(len, logprobs["tokens"]))
        return {"index": one.index, "text": one.text, "logprobs": logprobs, **end}

    def _usage(self) -> dict[str, int]:
        num_prompt = sum(self.num_prompt.values())
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_answer,
            "total_tokens": num_prompt + self.num_answer,
        }

    def _body(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        shown: dict[str, Any] = {}
        if self.stream.shows_usage:
            shown["usage"] = self._usage() if self.stream.is_continuous else usage
        return {
            "id": self.id,
            "object": "chat.completion.chunk" if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.model_name,
            "choices": choices,
            **shown,
        }
