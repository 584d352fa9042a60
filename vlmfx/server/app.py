"""The ASGI application: which path is whose, and what stands before all of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from vlmfx.server import embeddings, generation, images, page, status, tokens
from vlmfx.server.auth import OPEN_PATHS, Auth
from vlmfx.server.calls import Call, Calls, call_of
from vlmfx.server.errors import HttpError, error_reply
from vlmfx.server.hosts import Hosts, checked_hosts
from vlmfx.server.replies import guarded
from vlmfx.server.service import Service

Endpoint = Callable[[Service, Request], Awaitable[Response]]

GET: dict[str, Endpoint] = {
    "/health": status.health,
    "/ready": status.ready,
    "/version": status.version,
    "/metrics": status.metrics,
    "/v1/models": status.models,
    "/v1/models/{name:path}": status.model,
    "/v1/images/{id:path}": images.get,
}


def chats(service: Service, request: Request) -> Awaitable[Response]:
    return generation.generate(service, True, request)


def completions(service: Service, request: Request) -> Awaitable[Response]:
    return generation.generate(service, False, request)


POST: dict[str, Endpoint] = {
    "/v1/chat/completions": chats,
    "/v1/completions": completions,
    "/v1/embeddings": embeddings.embed,
    "/v1/score": embeddings.score,
    "/score": embeddings.score,
    "/tokenize": tokens.tokenize,
    "/detokenize": tokens.detokenize,
    "/v1/images": images.put,
}
DELETE: dict[str, Endpoint] = {"/v1/images/{id:path}": images.delete}


def create_app(service: Service) -> FastAPI:
    """An application of a service, whose engine is the caller's to close. Keys and origins are those of the service's options."""
    options = service.options
    # No pages of documentation: they would load scripts from another host. No redirects: they would name whatever host the client does.
    app = FastAPI(title="vlmfx", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    pages = page.endpoints() if options.page else {}
    for method, endpoints in (("GET", {**GET, **pages}), ("POST", POST), ("DELETE", DELETE)):
        for path, endpoint in endpoints.items():
            # A route of Starlette's: FastAPI's would look for parameters in each request, which takes half a millisecond.
            app.add_route(path, guarded(path, partial(endpoint, service), service.metrics), methods=[method])
    app.add_exception_handler(HTTPException, _http_error)
    if options.api_keys:
        app.add_middleware(Auth, keys=options.api_keys, open_paths=OPEN_PATHS.union(pages))
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=options.allowed_methods,
            allow_headers=options.allowed_headers,
            allow_credentials=options.allow_credentials,
            expose_headers=["x-request-id"],
        )

    def count(call: Call) -> None:
        service.metrics.answered(call.route, call.status)

    hosts = checked_hosts(options)
    if hosts is not None:
        app.add_middleware(Hosts, names=hosts)
    if options.root_path:
        app.add_middleware(Prefix, root_path=options.root_path.rstrip("/"), has_page=options.page)
    app.add_middleware(Calls, as_json=options.log_format == "json", at_end=count, running=service.calls)
    return app


class Prefix:
    """Takes paths with root_path before them and without, as proxies leave it there or not. root_path alone leads to the page."""

    def __init__(self, app: ASGIApp, root_path: str, has_page: bool) -> None:
        self.app, self.root_path, self.has_page = app, root_path, has_page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http":
            scope["root_path"] = self.root_path
            if self.has_page and scope["path"] == self.root_path:
                app = Response(status_code=307, headers={"Location": f"{self.root_path}/"})
        await app(scope, receive, send)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router refuses: a path or a method that there is not."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}"
    message = {
        404: f"there is no {what}; the API is below /v1.",
        405: f"{what} is not to be had; use another method.",
    }.get(error.status_code, str(error.detail))
    codes = {404: "not_found", 405: "method_not_allowed"}
    found = HttpError(error.status_code, message, code=codes.get(error.status_code), headers=error.headers)
    return error_reply(found, call_of(request.scope).id)
