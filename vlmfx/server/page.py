"""The page at /: its files as they are, and what a browser is told to keep it to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from fastapi import Request, Response

from vlmfx.server.service import Service

Endpoint = Callable[[Service, Request], Awaitable[Response]]

FOLDER = Path(__file__).parent / "web"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data: blob:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {sources}" for name, sources in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for by its ETag each time, so that a new version shows at once
}


@dataclass(frozen=True)
class File:
    content: bytes
    kind: str
    etag: str


def path_of(name: str) -> str:
    """Where a file is served: index.html at /, what it names below /page."""
    return "/" if name == "index.html" else f"/page/{name}"


def endpoints() -> dict[str, Endpoint]:
    """What answers at each path of the page. No key is asked for: there is nothing in the files that the package does not hold."""
    found: dict[str, Endpoint] = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in KINDS:
            content = path.read_bytes()
            file = File(content, KINDS[path.suffix], f'"{sha256(content).hexdigest()[:32]}"')
            found[path_of(path.name)] = partial(_sent, file)
    return found


async def _sent(file: File, service: Service, request: Request) -> Response:
    """A file, or 304 where the browser has it."""
    headers = {**HEADERS, "ETag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.kind)
