"""What a server says of itself: alive, ready, which model, which version, what it has done."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from vlmfx import __version__
from vlmfx.errors import ModelNotFound, shown
from vlmfx.server.replies import json_reply
from vlmfx.server.service import Service


async def health(service: Service, request: Request) -> Response:
    """200 while the engine's thread runs, also when it drains."""
    is_alive = service.engine.is_alive
    return json_reply({"status": "ok" if is_alive else "the engine has ended"}, 200 if is_alive else 503)


async def ready(service: Service, request: Request) -> Response:
    """200 while requests are taken."""
    if not service.engine.is_alive:
        return json_reply({"status": "the engine has ended"}, 503)
    if service.engine.is_draining:
        return json_reply({"status": "draining"}, 503)
    return json_reply({"status": "ready"})


async def version(service: Service, request: Request) -> Response:
    return json_reply({"version": __version__})


async def metrics(service: Service, request: Request) -> Response:
    """In Prometheus' text format."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def models(service: Service, request: Request) -> Response:
    """The one model, under each of its names."""
    return json_reply({"object": "list", "data": [_model(service, name) for name in service.options.names]})


async def model(service: Service, request: Request) -> Response:
    """The model by one of its names. Raises ModelNotFound."""
    name = request.path_params["name"]
    if name not in service.options.names:
        message = f"it is {shown(name)}, but {shown(service.name)} is served; name that one."
        raise ModelNotFound("model", message, found=name, expected=service.name)
    return json_reply(_model(service, name))


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "vlmfx",
        "root": service.name,
        "parent": None,
        "max_model_len": service.max_model_len,
        "max_body_bytes": service.options.max_body_bytes,
        "task": service.task,
    }
