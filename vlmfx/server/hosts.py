"""Hosts: a page whose name was made to point to this machine (DNS rebinding) does not reach a server that anybody may use."""

from __future__ import annotations

import re
from collections.abc import Collection
from ipaddress import ip_address

from starlette.types import ASGIApp, Receive, Scope, Send

from vlmfx.errors import shown
from vlmfx.server.calls import call_of
from vlmfx.server.errors import HttpError, error_reply
from vlmfx.server.options import ServerOptions

PORT = re.compile(r":\d*$", re.ASCII)


def checked_hosts(options: ServerOptions) -> frozenset[str] | None:
    """The names that the Host header may have; None where it may have any: what others can reach, or has a key, is not for this machine
    alone anyway."""
    if "*" in options.allowed_hosts or not (options.allowed_hosts or (options.is_loopback and not options.api_keys)):
        return None
    return frozenset(name.lower() for name in ("localhost", options.host or "localhost", *options.allowed_hosts))


class Hosts:
    """Lets in who asks for one of names, below localhost, or by an address, which nobody can make point elsewhere."""

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = [value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"host"]
        other = next((host for host in given if not self._is_known(host)), None)
        if scope["type"] != "http" or other is None:
            await self.app(scope, receive, send)
            return
        message = (
            f"the Host header is {shown(other)}, which is none of this server's names; ask for localhost, or start the server with "
            "that name after --allowed-hosts, or with --api-key."
        )
        error = HttpError(403, message, code="host_not_allowed", headers={"Connection": "close"})
        await error_reply(error, call_of(scope).id)(scope, receive, send)

    def _is_known(self, host: str) -> bool:
        name = PORT.sub("", host).lower().removesuffix(".")
        return name in self.names or name.endswith(".localhost") or is_address(name)


def is_address(name: str) -> bool:
    """Whether a host is written as an IPv4 address, or as an IPv6 one in brackets."""
    is_v6 = name.startswith("[") and name.endswith("]")
    try:
        return ip_address(name[1:-1] if is_v6 else name).version == (6 if is_v6 else 4)
    except ValueError:
        return False
