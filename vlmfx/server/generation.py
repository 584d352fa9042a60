"""/v1/chat/completions and /v1/completions: whole answers, and streams of them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Request, Response

from vlmfx.engine.events import Event
from vlmfx.engine.request import SamplingParams
from vlmfx.engine.sequence import Request as EngineRequest
from vlmfx.openai.chunks import Chunks, StreamForm, stream_form
from vlmfx.openai.requests import Form, chat_request, completion_request, form_of
from vlmfx.openai.responses import chat_response, completion_response
from vlmfx.server.calls import Call, call_of
from vlmfx.server.errors import error_kind, told
from vlmfx.server.replies import reply
from vlmfx.server.service import Service
from vlmfx.server.stream import DONE, Begun, EventStream, event, unless_gone
from vlmfx.server.urls import names_urls

PATH = {True: "/v1/chat/completions", False: "/v1/completions"}  # by whether it is a chat
PATIENCE_S = 10.0  # a stream begins after so long at the latest; an error before that still has its own status
MANY = 2000  # numbers in an answer, from which on it is written in another thread


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a body asks for."""

    body: dict[str, Any]
    prompts: list[dict[str, Any]]
    params: SamplingParams
    form: Form
    stream: StreamForm | None


async def generate(service: Service, is_chat: bool, request: Request) -> Response:
    """The answer to a chat or to the prompts of a completion. Raises InvalidRequest and what `AsyncEngine.events` raises."""
    call = call_of(request.scope)
    asked = await service.read_json(request, partial(_asked, service, call, is_chat))
    make = service.maker(call, asked.body, asked.prompts, asked.params)
    id, created = f"{'chatcmpl' if is_chat else 'cmpl'}-{call.id}", int(time.time())
    if asked.stream is not None:
        chunks = Chunks(
            is_chat=is_chat, id=id, created=created, model_name=service.name, form=asked.form, stream=asked.stream
        )
        return await _streamed(service, request, asked, make, chunks)
    outputs = await unless_gone(request.receive, service.outputs(make, asked.prompts, call))
    assert outputs is not None

    def body() -> dict[str, Any]:
        if is_chat:
            return chat_response(outputs[0], service.name, created, asked.form, id=id)
        return completion_response(outputs, service.name, created, asked.form, id=id)

    size = call.num_answer * (1 if asked.params.logprobs is None else 10 + 10 * asked.form.num_top)
    size += call.num_prompt * 10 if asked.params.prompt_logprobs is not None else 0
    if size <= MANY:
        return await reply(body, None)
    return await service.wanted(request, reply(body, call.pool(service.working)))


def _asked(service: Service, call: Call, is_chat: bool, body: Any) -> Asked:
    service.check(body, PATH[is_chat], "generate")
    if is_chat:
        prompt, params = chat_request(body)
        prompts = [prompt]
    else:
        prompts, params = completion_request(body)
    call.fetches = any(map(names_urls, prompts))
    return Asked(body=body, prompts=prompts, params=params, form=form_of(body, params), stream=stream_form(body))


async def _streamed(service: Service, request: Request, asked: Asked, make: Any, chunks: Chunks) -> Response:
    """A stream, which begins with the first token; before that the request may still fail with a status of its own."""

    def placed(numbers: list[int]) -> list[EngineRequest]:
        made: list[EngineRequest] = make(numbers)
        for place, one in enumerate(made):
            chunks.places[one.number] = place * asked.params.n
            chunks.num_prompt[one.number] = one.num_tokens
        return made

    events = Begun(service.events(placed, asked.prompts, call_of(request.scope)))
    try:
        await unless_gone(request.receive, events.first, PATIENCE_S)
    except BaseException:
        await events.aclose()
        raise
    lines = _lines(service, call_of(request.scope), chunks, events, len(asked.prompts) * asked.params.n)
    return EventStream(lines, events)


async def _lines(
    service: Service, call: Call, chunks: Chunks, events: Begun[list[Event]], num_choices: int
) -> AsyncGenerator[bytes, None]:
    """The events of a stream, [DONE] at the end of it. An error is one of them."""
    try:
        start = b"".join(map(event, chunks.first(num_choices)))
        if start:
            yield start
        async for news in events:
            for one in news:
                if one.output is not None:
                    service.count(one.output, call)
            lines = b"".join(map(event, chunks.of(news)))
            if lines:
                yield lines
        for chunk in chunks.last():
            yield event(chunk)
    except Exception as error:
        status, body, _ = told(error, call.id)
        call.error = error_kind(error)
        service.metrics.failed(call.error, status)
        yield event(body)
    yield DONE
