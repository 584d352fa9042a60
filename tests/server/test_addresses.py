"""Addresses that a server listens at: all of a machine's, of both kinds, at one port."""

from __future__ import annotations

import errno
import socket

import pytest

from vlmfx.errors import InvalidRequest
from vlmfx.server.addresses import bind, url_of
from vlmfx.server.options import ServerOptions


def has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        return probe.connect_ex(("::1", 9)) == errno.ECONNREFUSED


BOTH = ("127.0.0.1", "::1")


def bound(*reached, **options) -> tuple[list[str], set[int]]:
    """The URLs, and the ports, of options, by which these addresses are reached."""
    made = ServerOptions(names=("m",), **{"port": 0, **options})
    listeners = bind(made)
    try:
        for listener in listeners:
            listener.listen()
        for host in reached:
            socket.create_connection((host, listeners[0].getsockname()[1]), 5).close()
        return [url_of(made, listener) for listener in listeners], {one.getsockname()[1] for one in listeners}
    finally:
        for listener in listeners:
            listener.close()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("options", [{}, {"host": ""}])
def test_every_address_is_of_both_kinds(options):
    urls, (port,) = bound(*BOTH, **options)
    assert urls == [f"http://0.0.0.0:{port}", f"http://[::]:{port}"]


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_every_address_of_ipv6_is_every_one_of_ipv4_too():
    urls, (port,) = bound(*BOTH, host="::")
    assert urls == [f"http://[::]:{port}"]


def test_one_address_is_that_one_alone():
    urls, (port,) = bound("127.0.0.1", host="127.0.0.1", root_path="/p")
    assert urls == [f"http://127.0.0.1:{port}/p"]


def test_a_name_is_all_of_its_addresses_that_are_here(monkeypatch):
    def addresses(host, port, **options):
        found = [("127.0.0.1", port), ("192.0.2.1", port), ("127.0.0.2", port), ("127.0.0.1", port)]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    listeners = bind(ServerOptions(names=("m",), host="name", port=0))
    assert sorted(one.getsockname()[0] for one in listeners) == ["127.0.0.1", "127.0.0.2"]
    for one in listeners:
        one.close()


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_that_is_not_here_is_told(host):
    with pytest.raises(InvalidRequest, match=rf"^port: {host}:0: it cannot be had \(.+\); choose another\.$"):
        bind(ServerOptions(names=("m",), host=host, port=0))


def test_any_port_is_one_that_is_free_at_every_address(monkeypatch):
    """One that is free at the first address, and is taken at the second, is given up for another."""
    true, tried = socket.socket.bind, []

    def bind_to(self, address):
        tried.append(address)
        if len(tried) == 2:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        true(self, address)

    def addresses(host, port, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.1", "127.0.0.2")]

    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    monkeypatch.setattr(socket.socket, "bind", bind_to, raising=False)
    listeners = bind(ServerOptions(names=("m",), host="name", port=0))
    assert [address[0] for address in tried] == ["127.0.0.1", "127.0.0.2"] * 2
    assert len({one.getsockname()[1] for one in listeners}) == 1
    for one in listeners:
        one.close()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_a_port_that_is_taken_of_one_kind_is_in_use():
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidRequest, match="it is in use"):
            bind(ServerOptions(names=("m",), port=port))
