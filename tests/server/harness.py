"""A server in this process: an LLM's engine behind the application, asked through ASGI without a socket."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import httpx

from tests.golden_cases import TINY, load_model
from tests.pictures import encoded, picture
from vlmfx import LLM, checkpoint
from vlmfx.checkpoint import Model
from vlmfx.server.app import create_app
from vlmfx.server.options import ServerOptions
from vlmfx.server.serve import service_of
from vlmfx.server.service import Service

DEMO = Path(__file__).parents[2] / "vlmfx" / "assets" / "demo.png"
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
PICTURE_URL = "data:image/png;base64," + base64.b64encode(DEMO.read_bytes()).decode()
T = TypeVar("T")


@lru_cache(maxsize=1)
def scenes() -> Model:
    return checkpoint.load("scenes", dtype="float32", device="cpu")


def tiny() -> Model:
    return load_model(TINY["qwen2_vl"])


@contextmanager
def serving(model: Model, llm_options: dict[str, Any] | None = None, **options: Any) -> Iterator[Service]:
    """A service of an LLM of its own; afterwards nothing is left in the engine."""
    llm = LLM(model, **(llm_options or {}))
    service = service_of(llm, ServerOptions(**{"names": ("tiny",), **options}))
    try:
        yield service
    finally:
        service.engine.close()
        service.close()
        assert service.engine.num_requests == 0
        assert llm.engine.blocks.num_free == llm.engine.blocks.num_blocks
        assert llm.engine.features.num_pinned == 0


def run(work: Callable[[], Awaitable[T]]) -> T:
    """What a coroutine gives, within a minute."""

    async def timed() -> T:
        return await asyncio.wait_for(work(), 60)

    return asyncio.run(timed())


def client_of(service: Service) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app=create_app(service), raise_app_exceptions=True), base_url="http://server"
    )


def request(service: Service, method: str, path: str, **options: Any) -> httpx.Response:
    """One request's response, whole."""

    async def work() -> httpx.Response:
        async with client_of(service) as client:
            return await client.request(method, path, **options)

    return run(work)


def post(service: Service, path: str, body: Any, **options: Any) -> httpx.Response:
    return request(service, "POST", path, json=body, **options)


def answer(service: Service, path: str, body: Any) -> dict[str, Any]:
    """The body of a response that is as it should be."""
    response = post(service, path, body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def refused(service: Service, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    """The error of a response that has this status and OpenAI's form."""
    response = post(service, path, body)
    assert response.status_code == status, response.text
    found = response.json()
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    assert found["error"]["message"].endswith(".")
    error: dict[str, Any] = found["error"]
    return error


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which ends as it should."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def asks(text: str, *urls: str, **more: Any) -> dict[str, Any]:
    """The body of a chat about pictures; greedy, and short."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    return {"model": "tiny", "messages": [message], "temperature": 0, "max_tokens": 12, **more}


def noise_url(width: int = 60, height: int = 40, seed: int = 0) -> str:
    """A picture of noise as a data: URL."""
    return "data:image/png;base64," + base64.b64encode(encoded(picture(width, height, seed))).decode()
