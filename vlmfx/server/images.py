"""/v1/images: pictures that are sent once and asked about by their ids."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import Request, Response

from vlmfx.engine.fields import refuse
from vlmfx.errors import ImageNotFound, InvalidRequest, shown
from vlmfx.openai.fields import checked
from vlmfx.processing.images import loaded
from vlmfx.processing.media import fetch
from vlmfx.server.calls import Call, call_of
from vlmfx.server.errors import HttpError
from vlmfx.server.image_parts import stored
from vlmfx.server.image_store import ENTRY_BYTES, StoredImage
from vlmfx.server.replies import json_reply, reply
from vlmfx.server.service import Service
from vlmfx.server.urls import is_fetched

TYPES = ("application/json", "image/")


async def put(service: Service, request: Request) -> Response:
    """Keep the picture of a body, the file itself or {"url"}; it is decoded once, to be known good. Raises InvalidRequest."""
    if not service.images.max_bytes:
        message = "this server keeps no images; send them with each request, or start it with --image-store-mib."
        raise HttpError(404, message, code="images_not_stored")
    body = await service.bodies.read(request, TYPES)
    is_json = request.headers["content-type"].lower().startswith("application/json")
    call = call_of(request.scope)
    given = await service.parsed(request, body, _url) if is_json else body
    make = partial(_kept, service, call, given)
    call.fetches = isinstance(given, str) and is_fetched(given)
    return await service.wanted(request, reply(lambda: _described(service, make()), service.pool_aside(call)))


async def get(service: Service, request: Request) -> Response:
    """What is known of a picture; it counts as a use. Raises ImageNotFound."""
    name = request.path_params["id"]
    return json_reply(_described(service, _there(name, service.images.find(call_of(request.scope).owner, name))))


async def delete(service: Service, request: Request) -> Response:
    """Forget a picture; requests that read it go on. Raises ImageNotFound."""
    name = request.path_params["id"]
    image = _there(name, service.images.delete(call_of(request.scope).owner, name))
    return json_reply({"id": image.id, "object": "image", "deleted": True})


def _url(body: Any) -> str:
    url = checked(body, frozenset({"url"})).get("url")
    if not isinstance(url, str):
        refuse("url", url, "a data:, http or https URL", "or send the file itself, as image/png")
    return url


def _kept(service: Service, call: Call, given: bytes | str) -> StoredImage:
    field = "url" if isinstance(given, str) else "body"
    with service.charged_to(call):
        blob = fetch(given, service.processor.media, field) if isinstance(given, str) else given
    if not service.images.takes(len(blob)):
        most = service.images.max_bytes - ENTRY_BYTES
        message = f"the image has {len(blob)} bytes, but {most} are kept at most; send it with each request."
        raise InvalidRequest(field, message, found=len(blob), expected=most)
    with loaded(blob, field=field, max_pixels=service.processor.media.max_image_pixels):
        pass
    return stored(blob, field, call.owner, service.images, service.processor)


def _there(name: str, image: StoredImage | None) -> StoredImage:
    if image is None:
        raise ImageNotFound("id", f"there is no image {shown(name)}, or no more; send it again.", found=name)
    return image


def _described(service: Service, image: StoredImage) -> dict[str, Any]:
    return {
        "id": image.id,
        "object": "image",
        "created": int(image.created),
        "bytes": len(image.blob),
        "width": image.width,
        "height": image.height,
        "num_tokens": image.num_tokens,
        "expires_at": int(image.used + service.images.ttl_s),
    }
