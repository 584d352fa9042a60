"""Addresses: the sockets that a server listens at."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from typing import Any

from vlmfx.errors import InvalidRequest
from vlmfx.server.options import ServerOptions

TRIES = 8  # of any port that is free, which may be taken at the next address


def bind(options: ServerOptions) -> list[socket.socket]:
    """A socket for each address, of IPv4 and of IPv6 where the machine has both; they do not listen yet. Raises InvalidRequest."""
    where = options.uds or f"{options.host or '*'}:{options.port}"
    num_tries = 1 if options.uds or options.port else TRIES
    while True:
        try:
            return [_bound_file(options.uds)] if options.uds else _bound(options.host, options.port)
        except OSError as error:
            is_used, num_tries = error.errno == errno.EADDRINUSE, num_tries - 1
            if is_used and num_tries:
                continue
            why = "it is in use" if is_used else f"it cannot be had ({error.strerror or error})"
            raise InvalidRequest("uds" if options.uds else "port", f"{where}: {why}; choose another.") from error


def _bound_file(path: str) -> socket.socket:
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode) and not _answers(path):
            os.unlink(path)  # left by a server that was killed
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    return listener


def _bound(host: str | None, port: int) -> list[socket.socket]:
    """Every address of a host, or of the machine, at one port. Those that are not to be had (no IPv6) are left out, but not all."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[socket.socket] = []
    absent: OSError | None = None
    for family, kind, proto, _, address in sorted(dict.fromkeys(found)):  # IPv4 first
        try:
            is_alone = not listeners or listeners[0].family != socket.AF_INET
            listeners.append(_bound_to(family, kind, proto, (address[0], port, *address[2:]), takes_both=is_alone))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                for listener in listeners:
                    listener.close()
                raise
            absent = error
            continue
        port = listeners[0].getsockname()[1]  # that of the first where any may be taken
    if not listeners:
        assert absent is not None
        raise absent
    return listeners


def _bound_to(family: int, kind: int, proto: int, address: Any, takes_both: bool) -> socket.socket:
    """takes_both: one of IPv6 for all addresses takes IPv4, too, as no other does."""
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(not takes_both))
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
    return listener


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def url_of(options: ServerOptions, listener: socket.socket) -> str:
    """Where a socket of `bind` is reached."""
    if options.uds:
        return f"unix:{options.uds}"
    host, port = listener.getsockname()[:2]
    scheme = "https" if options.ssl_certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{options.root_path}"
