"""/v1/embeddings and /v1/score: vectors of prompts, and the cosines of two of them."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from fastapi import Request, Response

from vlmfx.engine.embedding import score_of
from vlmfx.openai.requests import EmbeddingRequest, embedding_request
from vlmfx.openai.responses import embedding_response
from vlmfx.openai.scores import ScoreRequest, score_request, score_response
from vlmfx.server.calls import Call, call_of
from vlmfx.server.replies import reply
from vlmfx.server.service import Service
from vlmfx.server.stream import unless_gone
from vlmfx.server.urls import names_urls

EMBEDDINGS, SCORE = "/v1/embeddings", "/v1/score"


async def embed(service: Service, request: Request) -> Response:
    """The vectors of a body's prompts. Raises InvalidRequest and what `AsyncEngine.events` raises."""
    call = call_of(request.scope)
    body, asked = await service.read_json(request, partial(_embedding, service, call))
    make = service.maker(call, body, asked.prompts, pools=True, dimensions=asked.dimensions)
    outputs = await unless_gone(request.receive, service.outputs(make, asked.prompts, call))
    assert outputs is not None
    write = partial(
        embedding_response,
        outputs,
        service.name,
        int(time.time()),
        is_base64=asked.is_base64,
        id=f"embd-{call.id}",
    )
    return await service.wanted(request, reply(write, call.pool(service.working)))


async def score(service: Service, request: Request) -> Response:
    """The cosine of each pair of a body's prompts. Raises as `embed`."""
    call = call_of(request.scope)
    body, asked = await service.read_json(request, partial(_score, service, call))
    prompts = [*asked.first, *asked.second]
    make = service.maker(call, body, prompts, pools=True)
    outputs = await unless_gone(request.receive, service.outputs(make, prompts, call))
    assert outputs is not None

    def write() -> dict[str, Any]:
        first, second = outputs[: len(asked.first)], outputs[len(asked.first) :]
        first = first * len(second) if len(first) == 1 else first
        scores = [score_of(a, b) for a, b in zip(first, second, strict=True)]
        return score_response(scores, call.num_prompt, service.name, int(time.time()), id=f"score-{call.id}")

    return await service.wanted(request, reply(write, call.pool(service.working)))


def _embedding(service: Service, call: Call, body: Any) -> tuple[dict[str, Any], EmbeddingRequest]:
    service.check(body, EMBEDDINGS, "embed")
    asked = embedding_request(body)
    call.fetches = any(map(names_urls, asked.prompts))
    return body, asked


def _score(service: Service, call: Call, body: Any) -> tuple[dict[str, Any], ScoreRequest]:
    service.check(body, SCORE, "embed")
    asked = score_request(body)
    call.fetches = any(map(names_urls, [*asked.first, *asked.second]))
    return body, asked
