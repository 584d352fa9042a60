"""API keys: a request must carry one of them, but for the few paths that a prober asks."""

from __future__ import annotations

import hmac
from collections.abc import Collection, Sequence
from hashlib import sha256

from starlette.types import ASGIApp, Receive, Scope, Send

from vlmfx.server.calls import call_of
from vlmfx.server.errors import HttpError, error_reply

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})


class Keys:
    """API keys, of which digests alone are kept."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def has(self, key: bytes) -> bool:
        """Whether it is one of them; it takes as long for any key, and whichever of them it is."""
        found, digest = False, _digest(key)
        for one in self._digests:
            found |= hmac.compare_digest(one, digest)
        return found


class Auth:
    """Lets in who shows a key as "Authorization: Bearer KEY"; every path is closed that is not one of open_paths."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: Collection[str] = OPEN_PATHS) -> None:
        self.app, self.keys, self.open_paths = app, Keys(keys), frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and is_open(scope, self.open_paths)):
            await self.app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if self.keys.has(key.strip()) and scheme.lower() == b"bearer":
            call_of(scope).owner = _digest(key.strip())
            await self.app(scope, receive, send)
            return
        assert scope["type"] == "http", "the server has no websockets"
        message = "the request has no API key that is valid here; send one as the header Authorization: Bearer KEY."
        headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}  # what follows of its body is not read
        error = HttpError(401, message, code="invalid_api_key", headers=headers)
        await error_reply(error, call_of(scope).id)(scope, receive, send)


def is_open(scope: Scope, open_paths: Collection[str]) -> bool:
    """Whether a path is one that needs no key, spelled exactly; behind root_path or without it, as the router takes both."""
    root = scope.get("root_path", "").rstrip("/")
    return scope["path"] in open_paths or (scope["path"].startswith(root) and scope["path"][len(root) :] in open_paths)


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()
