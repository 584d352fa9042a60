"""media: what may be fetched is, whole; no spelling, redirect, name, path or server gets at what may not, or takes longer or more."""

from __future__ import annotations

import base64
import io
import ipaddress
import os
import pickle
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from tests.invariants import is_one_sentence
from vlmfx.errors import InvalidRequest
from vlmfx.processing import embed_files, media, web
from vlmfx.processing.media import MediaPolicy, fetch, load
from vlmfx.processing.messages import Media

FIELD = "messages[0].content[1]"
BODY = bytes(range(256)) * 40
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 10240\r\n\r\n" + BODY
PUBLIC = "93.184.216.34"

Answer = Callable[[Any, str], None]  # (connection, the request's head)


class Server:
    """A TCP server on 127.0.0.1 that answers each request with `answer`, bytes or a function; requests are kept."""

    def __init__(self, answer: bytes | Answer, tls: ssl.SSLContext | None = None) -> None:
        self.answer, self.tls, self.requests = answer, tls, list[str]()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.is_open = True
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: Any) -> None:
        with suppress(OSError):
            if self.tls is not None:
                connection = self.tls.wrap_socket(connection, server_side=True)
            head = b""
            while b"\r\n\r\n" not in head:
                part = connection.recv(65536)
                if not part:
                    return
                head += part
            self.requests.append(head.decode("latin-1"))
            if callable(self.answer):
                self.answer(connection, head.decode("latin-1"))
            else:
                connection.sendall(self.answer)
        connection.close()

    def close(self) -> None:
        self.is_open = False
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@contextmanager
def serving(answer: bytes | Answer, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    server = Server(answer, tls)
    try:
        yield server
    finally:
        server.close()


def trusting(server: Server, **options: Any) -> MediaPolicy:
    """A policy that allows this server, whose address is private."""
    return MediaPolicy(private_media_hosts=(f"127.0.0.1:{server.port}",), **{"timeout_s": 5.0, **options})


def refused(url: str, policy: MediaPolicy | None = None, *, says: str = "", hides: tuple[str, ...] = ()) -> str:
    with pytest.raises(InvalidRequest) as caught:
        fetch(url, policy or MediaPolicy(timeout_s=2), FIELD)
    error = caught.value
    assert error.field == FIELD
    text = str(error)
    assert says in text, text
    assert is_one_sentence(error), text
    for word in hides:
        assert word not in text
    return text


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Name → its addresses, for the names in it; every other name is looked up as ever. Look-ups are kept under ""."""
    table: dict[str, list[str]] = {"": []}
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> list[Any]:
        table[""].append(host)
        if host not in table:
            return real(host, port, *args, **kwargs)
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (a, port, 0, 0))
            if ":" in a
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port))
            for a in table[host]
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return table


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses that were connected to; nothing is, except on 127.0.0.1."""
    seen: list[Any] = []

    class Recorder(socket.socket):
        def connect(self, address: Any) -> None:
            seen.append(address)
            if address[0] != "127.0.0.1":
                raise ConnectionRefusedError
            super().connect(address)

    monkeypatch.setattr(socket, "socket", Recorder)
    return seen


# ---- what is fetched


def test_a_body_comes_whole():
    with serving(PLAIN) as server:
        url = f"{server.url}/a%20b/é.png?x=1&y=ü#part"
        assert fetch(url, trusting(server), FIELD) == BODY
        (head,) = server.requests
        lines = head.split("\r\n")
        assert lines[0] == "GET /a%20b/%C3%A9.png?x=1&y=%C3%BC HTTP/1.1"
        assert f"Host: 127.0.0.1:{server.port}" in lines
        assert "Accept-Encoding: identity" in lines
        assert not any(line.lower().startswith(("cookie", "authorization", "proxy")) for line in lines)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.0 200 OK\r\n\r\n" + BODY,
        b"HTTP/1.1 200 OK\r\nContent-Encoding: identity\r\n\r\n" + BODY,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"1000\r\n" + BODY[:4096] + b"\r\n1800;x=y\r\n" + BODY[4096:] + b"\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN,
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n" + BODY,
        PLAIN + b"what follows the body",
    ],
    ids=["until it closes", "identity", "chunked", "continue", "a length that is none", "more than the length"],
)  # fmt: skip
def test_forms_of_an_answer(answer):
    with serving(answer) as server:
        assert fetch(server.url, trusting(server), FIELD) == BODY
        assert server.requests[0].startswith("GET / HTTP/1.1\r\n")


def test_an_empty_body_is_0_bytes():
    with serving(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") as server:
        assert fetch(server.url, trusting(server), FIELD) == b""


@pytest.mark.parametrize("entry", ["127.0.0.1", "127.0.0.1:{port}", "other, 127.0.0.1:{port}", " 127.0.0.1 "])
def test_private_hosts_by_name_and_by_port(entry):
    with serving(PLAIN) as server:
        policy = MediaPolicy(private_media_hosts=entry.format(port=server.port), timeout_s=2)
        assert fetch(server.url, policy, FIELD) == BODY


@pytest.mark.parametrize("entry", ["127.0.0.1:1", "127.0.0.2", "localhost", "0.0.1", "27.0.0.1"])
def test_a_private_host_is_that_one_only(entry):
    with serving(PLAIN) as server:
        refused(server.url, MediaPolicy(private_media_hosts=(entry,), timeout_s=2), says="no public address")
        assert server.requests == []


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    with serving(PLAIN) as server, serving(b"HTTP/1.1 200 OK\r\n\r\nproxy") as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert fetch(server.url, trusting(server), FIELD) == BODY
        assert proxy.requests == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["{url}/b", "/b", "b", "//127.0.0.1:{port}/b", "HTTP://127.0.0.1:{port}/b#x"])
def test_redirects_are_followed(status, location):
    def answer(connection: Any, head: str) -> None:
        to = location.format(url=server.url, port=server.port)
        is_first = head.startswith("GET /a ")
        connection.sendall(f"HTTP/1.1 {status} x\r\nLocation: {to}\r\n\r\n".encode() if is_first else PLAIN)

    with serving(answer) as server:
        assert fetch(f"{server.url}/a", trusting(server), FIELD) == BODY
        assert [head.split(" ")[1] for head in server.requests] == ["/a", "/b"]


def test_redirects_end():
    loop = b"HTTP/1.1 302 x\r\nLocation: /again\r\n\r\n"
    with serving(loop) as server:
        refused(server.url, trusting(server, max_redirects=3), says="redirects more than 3 times")
        assert len(server.requests) == 4


# ---- private addresses, however they are written

PRIVATE = [
    "127.0.0.1", "127.1", "127.255.255.254", "0.0.0.0", "0", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1",
    "017700000001", "localhost", "localhost.", "LOCALHOST", "127.0.0.1.", "10.0.0.1", "172.16.0.1", "172.31.255.255",
    "192.168.1.1", "169.254.169.254", "0xa9fea9fe", "2852039166", "0251.0376.0251.0376", "100.64.0.1", "100.100.100.200",
    "192.0.0.192", "168.63.129.16", "198.18.0.1", "224.0.0.1", "239.255.255.250", "255.255.255.255", "240.0.0.1",
    "192.0.2.1", "１２７.0.0.1", "127。0。0。1", "ⓛocalhost", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "[::ffff:a9fe:a9fe]", "[::127.0.0.1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::a9fe:a9fe]",
    "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]", "[2002:a9fe:a9fe::1]", "[2001:0:7f00:1::]", "[fe80::1]", "[fc00::1]",
    "[fd00:ec2::254]", "[fec0::1]", "[ff02::1]", "[2001:db8::1]", "[::ffff:0:127.0.0.1]", "[100::1]", "[5f00::1]",
]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_private_addresses_in_every_spelling(host, scheme, connected):
    hides = ("169.254", "127.0.0.1") if host not in ("127.0.0.1", "127.0.0.1.", "169.254.169.254") else ()
    text = refused(f"{scheme}://{host}/latest/meta-data", hides=hides)
    assert "no public address" in text or "no valid host" in text
    assert connected == []


# Written by hand from IANA's registries: (address, whether anybody can reach it).
ADDRESSES = [
    ("8.8.8.8", True), ("93.184.216.34", True), ("1.1.1.1", True), ("172.15.255.255", True), ("172.32.0.0", True),
    ("100.63.255.255", True), ("100.128.0.0", True), ("223.255.255.255", True), ("169.253.255.255", True),
    ("11.0.0.0", True), ("192.167.255.255", True), ("2606:4700:4700::1111", True), ("2a00:1450:4001::200e", True),
    ("64:ff9b::808:808", True), ("::ffff:8.8.8.8", True), ("2400::1", True),
    ("172.16.0.0", False), ("172.31.255.255", False), ("100.64.0.0", False), ("224.0.0.0", False), ("::", False),
    ("::ffff:10.0.0.1", False), ("64:ff9b::10.0.0.1", False), ("2002::1", False), ("2001::1", False), ("fe80::1%eth0", False),
    ("fe80::1%1", False), ("4000::1", False), ("3fff::1", False), ("not an address", False), ("", False), ("8.8.8.8%1", False),
]  # fmt: skip


@pytest.mark.parametrize(("address", "expected"), ADDRESSES)
def test_which_addresses_are_public(address, expected):
    assert web.is_public(address) is expected


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_form_of_an_ipv4_address_is_more_public_than_itself(value):
    plain = ipaddress.IPv4Address(value)
    if not plain.is_global or plain.is_multicast or plain.is_reserved:
        assert not web.is_public(str(plain))
    for prefix in (0xFFFF << 32, int(ipaddress.ip_address("64:ff9b::"))):
        assert web.is_public(str(ipaddress.IPv6Address(prefix + value))) == web.is_public(str(plain))
    for high in (0, 0xFFFF_0000 << 32, 0x2002 << 112):
        assert not web.is_public(str(ipaddress.IPv6Address(high + value)))
        assert not web.is_public(str(ipaddress.IPv6Address((0x2002 << 112) + (value << 80))))


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], [PUBLIC, "127.0.0.1"], ["2606:4700::1", "::1"], [PUBLIC] * 9 + ["10.0.0.1"], []]
)
def test_a_name_is_public_when_all_its_addresses_are(addresses, names, connected):
    names["evil.example"] = addresses
    refused("http://evil.example/", says="no public address", hides=("127.0.0.1", PUBLIC))
    assert connected == []


def test_a_name_that_there_is_not_and_a_private_one_get_the_same_answer(names):
    names.update({"internal.example": ["10.1.2.3"], "nowhere.example": []})
    assert refused("http://internal.example/") == refused("http://nowhere.example/")


def test_a_name_is_looked_up_once_and_that_address_is_talked_to(names, connected, monkeypatch):
    """The name has a public address when it is checked, and a private one ever after."""

    class Turning(list[str]):
        def __iter__(self) -> Iterator[str]:
            return iter([PUBLIC] if names[""].count("turning.example") == 1 else ["127.0.0.1"])

    names["turning.example"] = Turning()
    with serving(PLAIN) as server:
        refused(f"http://turning.example:{server.port}/", says="no whole answer")
        assert connected == [(PUBLIC, server.port)]
        assert server.requests == []
    assert names[""] == ["turning.example"]


def test_the_next_address_is_tried(names, connected):
    names["some.example"] = ["2606:4700::1", "127.0.0.1"]
    with serving(PLAIN) as server:
        policy = MediaPolicy(private_media_hosts=("some.example",), timeout_s=5)
        assert fetch(f"http://some.example:{server.port}/", policy, FIELD) == BODY
        assert server.requests[0].split("\r\n")[1] == f"Host: some.example:{server.port}"
    assert [address[0] for address in connected] == ["2606:4700::1", "127.0.0.1"]


def test_at_most_8_addresses_are_tried(names, connected):
    names["many.example"] = [f"93.184.216.{i}" for i in range(20)]
    refused("http://many.example/", says="no whole answer")
    assert [address[0] for address in connected] == names["many.example"][:8]


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest", "http://[::1]/", "http://localhost:1/", "//127.0.0.1/", "file:///etc/passwd",
        "data:image/png;base64,AAAA", "ftp://example.com/", "gopher://127.0.0.1/", "http://a:b@127.0.0.1/", "http://:80/",
        "http://inner.example/", "http://127.0.0.1\\@example.com/", "http://exa mple/", "https://0x7f000001",
    ],
)  # fmt: skip
def test_redirects_to_what_is_not_fetched(location, names, connected):
    names["inner.example"] = ["10.9.8.7"]
    with serving(b"HTTP/1.1 302 Found\r\nLocation: " + location.encode() + b"\r\n\r\n") as server:
        text = refused(server.url, trusting(server), says="redirects to what is not fetched")
        assert location.strip("/") not in text
        assert [address[1] for address in connected] == [server.port]


@pytest.mark.parametrize(
    "url",
    [
        "http://user@127.0.0.1:{port}/", "http://127.0.0.1:{port}@example.com/", "http://example.com@127.0.0.1:{port}/",
        "http://a:b@127.0.0.1:{port}/", "http://@127.0.0.1:{port}/", "http://127.0.0.1:{port}\\@example.com/",
        "http:\\\\127.0.0.1:{port}/", "http://127.0.0.1:{port}/\r\nX: y", "http://127.0.0.1:{port}/ HTTP/1.1", "http://127.0.0.1:{port}/\t",
        " http://127.0.0.1:{port}/", "http://127.0.0.1:{port}/\x00", "http://127.0.0.1%00.example.com:{port}/", "http://127.0.0.1:0/",
        "http://127.0.0.1:99999/", "http://127.0.0.1:{port}x/", "http://127.0.0.1:-{port}/", "http://127.0.0.1:+{port}/", "http://[::1", "http://[::1]evil/",
        "http://[::ffff:127.0.0.1%25eth0]:{port}/", "http://[127.0.0.1]:{port}/", "http://",
        "http:///a", "http:127.0.0.1:{port}/", "http:/127.0.0.1:{port}/",
        "http://a..b/", "http://.../", "http://" + "a" * 64 + ".com/", "http://exa$mple.com/", "http://127.0.0.1:{port}/" + "a" * 9000,
        "http://127.0.0.1:{port}/#\u2028\n", "http://evil\uff0fexample.com/", "http://evil\u2100.com/", "http://℀.com", "http://1:2:3/",
    ],
)  # fmt: skip
def test_urls_that_two_readers_may_read_differently(url, connected):
    with serving(PLAIN) as server:
        refused(url.format(port=server.port), trusting(server))
        assert server.requests == []
    assert connected == []


def test_user_and_password_are_named_as_what_is_wrong():
    for url in ("http://user:s3cret@93.184.216.34/", "https://user@example.com/"):
        refused(url, says="it holds a user name or password; leave them out", hides=("s3cret",))


@pytest.mark.parametrize("url", ["ftp://example.com/a", "gopher://x", "jar:file:///a!b", "javascript:x", "blob:x", "a.png",
                                 "", "://", "C:\\a.png", "//example.com/a.png", "unix:///var/run/docker.sock"])  # fmt: skip
def test_other_schemes(url, connected):
    refused(url, says="send an http, https or data: URL")
    assert connected == []


# ---- allowed_media_domains


@pytest.mark.parametrize("host", ["other.example", "x.good.example", "good.example.evil", "notgood.example", PUBLIC])
def test_hosts_that_are_not_on_the_list(host, names, connected):
    names.update({name: [PUBLIC] for name in (host, "good.example")})
    refused(f"http://{host}/", MediaPolicy(allowed_media_domains=("good.example",)), says="allowed_media_domains")
    assert names[""] == connected == []


@pytest.mark.parametrize("url", ["http://good.example/", "http://GOOD.example./x", "https://good.example:444/"])
def test_hosts_that_are_on_the_list(url, names, connected):
    names["good.example"] = [PUBLIC]
    refused(url, MediaPolicy(allowed_media_domains="Good.example,b.example"), says="no whole answer")  # type: ignore[arg-type]
    assert [address[0] for address in connected] == [PUBLIC]


def test_the_list_holds_for_redirects_and_not_for_data(names, connected):
    with serving(b"HTTP/1.1 302 Found\r\nLocation: http://other.example/\r\n\r\n") as server:
        names["other.example"] = [PUBLIC]
        policy = trusting(server, allowed_media_domains=("127.0.0.1",))
        refused(server.url, policy, says="redirects to what is not fetched", hides=("other",))
        assert [address[0] for address in connected] == ["127.0.0.1"]
    assert fetch("data:;base64,AAAA", policy, FIELD) == b"\0\0\0"


# ---- servers that do harm


def drip(first: bytes, rest: bytes) -> Answer:
    """Sends first, then rest a few bytes at a time for ever."""

    def answer(connection: Any, head: str) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(rest)
            time.sleep(0.05)

    return answer


def silent(connection: Any, head: str) -> None:
    time.sleep(3)


@pytest.mark.parametrize(
    "answer",
    [
        silent,
        drip(b"", b"H"),
        drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"x"),
        drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1", b"0"),
    ],
    ids=[
        "silence",
        "a status line",
        "headers",
        "continue",
        "a body",
        "a body without end",
        "chunks",
        "a chunk's length",
    ],
)
def test_slow_servers_end_with_the_time_limit(answer):
    with serving(answer) as server:
        start = time.monotonic()
        text = refused(server.url, trusting(server, timeout_s=0.4))
        assert time.monotonic() - start < 10  # these answers never end
        assert "took longer than 0.4 s" in text or "no whole answer" in text  # http.client counts headers itself


def test_redirects_share_the_time_limit():
    def answer(connection: Any, head: str) -> None:
        time.sleep(0.25)
        connection.sendall(b"HTTP/1.1 302 x\r\nLocation: /\r\n\r\n")

    with serving(answer) as server:
        start = time.monotonic()
        refused(server.url, trusting(server, timeout_s=0.4), says="took longer than 0.4 s")
        assert time.monotonic() - start < 10


def test_a_slow_look_up_ends_with_the_time_limit(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(2))
    start = time.monotonic()
    refused("http://slow.example/", MediaPolicy(timeout_s=0.3), says="took longer than 0.3 s")
    assert time.monotonic() - start < 1.9


def flood(first: bytes, rest: bytes) -> Answer:
    """Sends first, then rest as fast as it is taken, for ever."""

    def answer(connection: Any, head: str) -> None:
        connection.sendall(first)
        while True:
            sent.append(len(rest))
            connection.sendall(rest)

    sent: list[int] = []
    answer.sent = sent  # type: ignore[attr-defined]
    return answer


@pytest.mark.parametrize(
    "make",
    [
        lambda: flood(b"HTTP/1.1 200 OK\r\n\r\n", BODY),
        lambda: flood(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n", BODY),
        lambda: flood(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", BODY),
        lambda: flood(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"2800\r\n" + BODY + b"\r\n"),
        lambda: flood(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffff\r\n", BODY),
        lambda: flood(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", BODY),
        lambda: flood(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1;" + b"x" * 9000 + b"\r\nx\r\n"),
        lambda: flood(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" * 400),
        lambda: flood(b"HTTP/1.1 200 OK\r\nX: ", BODY),
        lambda: flood(b"", b"H" * 10000),
    ],
    ids=["endless", "a long length", "a negative length", "chunks", "a long chunk", "a negative chunk", "chunk marks",
         "continue", "a header", "a status line"],
)  # fmt: skip
def test_endless_answers_end_with_the_size_limit(make):
    answer = make()
    with serving(answer) as server:
        start = time.monotonic()
        refused(server.url, trusting(server, max_bytes=100_000, timeout_s=20))
        assert time.monotonic() - start < 15
        assert sum(answer.sent) < 20_000_000  # what was sent also fills the kernel's buffers


@pytest.mark.parametrize("size", [9_999, 10_000, 10_001])
@pytest.mark.parametrize("head", [b"Content-Length: %d\r\n", b""])
def test_the_size_limit_is_exact(head, size):
    with serving(b"HTTP/1.1 200 OK\r\n" + (head % size if head else b"") + b"\r\n" + b"x" * size) as server:
        policy = trusting(server, max_bytes=10_000)
        if size > 10_000:
            refused(server.url, policy, says="more than the 10000 bytes")
        else:
            assert fetch(server.url, policy, FIELD) == b"x" * size


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n" + BODY, "no whole answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2801\r\n" + BODY, "no whole answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + BODY, "no whole answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "coding that is not known"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8b", "compressed"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\n\r\nx", "compressed"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: identity, deflate\r\n\r\nx", "compressed"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", "status 404"),
        (b"HTTP/1.1 206 Partial Content\r\n\r\nx", "status 206"),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", "status 304"),
        (b"HTTP/1.1 302 Found\r\n\r\n", "status 302"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\nx", "no whole answer"),
        (b"\x16\x03\x01 nothing of HTTP", "no whole answer"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no whole answer"),
        (b"", "no whole answer"),
    ],
)
def test_answers_that_are_none(answer, says):
    with serving(answer) as server:
        refused(server.url, trusting(server), says=says)


def test_a_port_that_nobody_listens_on():
    with serving(PLAIN) as server:
        policy = trusting(server)
    refused(server.url, policy, says="no whole answer", hides=("127.0.0.1", "refused", "Errno"))


# ---- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of tls.example, signed by itself, and its key, in one file."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30",
               "-subj", "/CN=tls.example", "-addext", "subjectAltName=DNS:tls.example", "-keyout", "-", "-out", "-"]  # fmt: skip
    try:
        path.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no openssl that makes a certificate on this machine")
    return path


@pytest.mark.parametrize(
    ("host", "is_trusted", "works"),
    [("tls.example", True, True), ("tls.example", False, False), ("else.example", True, False)],
)
def test_the_certificate_is_checked_against_the_name(host, is_trusted, works, certificate, names, monkeypatch):
    names[host] = ["127.0.0.1"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    shown: list[Any] = []
    context.sni_callback = lambda connection, name, context: shown.append(name)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate if is_trusted else os.devnull))
    with serving(PLAIN, context) as server:
        policy, url = MediaPolicy(private_media_hosts=(host,), timeout_s=5), f"https://{host}:{server.port}/"
        if works:
            assert fetch(url, policy, FIELD) == BODY
        else:
            refused(url, policy, says="no TLS certificate that is trusted")
            assert server.requests == []
    assert shown == [host]


def test_a_handshake_that_never_ends():
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    start = time.monotonic()
    policy = MediaPolicy(private_media_hosts=("127.0.0.1",), timeout_s=0.3)
    refused(f"https://127.0.0.1:{port}/", policy, says="took longer than 0.3 s")
    assert time.monotonic() - start < 10
    listener.close()


# ---- data: URLs


def test_data_urls():
    blob = base64.b64encode(BODY).decode()
    for url in (f"data:image/png;base64,{blob}", f"DATA:;base64,{blob}", f"data:;base64,{blob.replace('+', '%2B')}"):
        assert fetch(url, MediaPolicy(), FIELD) == BODY


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("data:image/png,abc", "base64"),
        ("data:image/png;base64,", "0 bytes"),
        ("data:image/png;base64", "base64"),
        ("data:;base64,a*b=", "decoded"),
        ("data:;base64,abc", "decoded"),
        ("data:;base64,é", "decoded"),
        ("data:;base64," + "A" * 2000, "more than 1000 bytes"),
    ],
)
def test_data_urls_that_hold_nothing(url, says):
    refused(url, MediaPolicy(max_bytes=1000), says=says)


# ---- file: URLs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """open/a.png, open/in/b c.png, and beside it secret/key, with links out of open."""
    (tmp_path / "open" / "in").mkdir(parents=True)
    (tmp_path / "open-too").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "open" / "a.png").write_bytes(BODY)
    (tmp_path / "open" / "in" / "b c?#é.png").write_bytes(BODY)
    (tmp_path / "open" / "100%41.png").write_bytes(BODY)
    (tmp_path / "secret" / "key").write_bytes(b"secret")
    (tmp_path / "open-too" / "key").write_bytes(b"secret")
    (tmp_path / "open" / "link").symlink_to(tmp_path / "secret" / "key")
    (tmp_path / "open" / "relative").symlink_to("../secret/key")
    (tmp_path / "open" / "folder").symlink_to(tmp_path / "secret")
    (tmp_path / "open" / "loop").symlink_to("loop")
    (tmp_path / "open" / "inner").symlink_to("in")
    os.mkfifo(tmp_path / "open" / "pipe")
    return tmp_path


def test_files_below_the_folder(folder):
    policy = MediaPolicy(allowed_local_media_path=folder / "open")
    for path in (
        "a.png",
        "in/b%20c%3F%23%C3%A9.png",
        "inner/b%20c%3f%23é.png",
        "100%2541.png",
        "./a.png",
        "in//b%20c%3F%23é.png",
    ):
        assert fetch(f"file://{folder}/open/{path}", policy, FIELD) == BODY
    assert fetch(f"FILE://localhost{folder}/open/a.png", policy, FIELD) == BODY
    (folder / "alias").symlink_to("open")
    assert fetch(f"file://{folder}/alias/a.png", policy, FIELD) == BODY
    policy = MediaPolicy(allowed_local_media_path=str(folder / "alias"))
    assert fetch(f"file://{folder}/open/a.png", policy, FIELD) == BODY


@pytest.mark.parametrize(
    "path",
    [
        "secret/key", "open/../secret/key", "open/%2e%2e/secret/key", "open/%2E./secret/key", "open/..%2fsecret%2fkey",
        "open/%252e%252e/secret/key", "open/link", "open/relative", "open/folder/key", "open/loop", "open-too/key",
        "open", "open/", "open/in", "open/pipe", "open/none", "open/a.png/x", "open/a.png%00.jpg", "open/../open/a.png",
        "open\\..\\secret\\key", "open/folder/../../secret/key", "none/../open/a.png", "open/%ff", "secret/none", "",
        "../../../../../../../../etc/passwd", "open/100%41.png", "open/" + "a" * 5000, "open/%c0%ae%c0%ae/secret/key",
    ],
)  # fmt: skip
def test_files_that_may_not_be_read_get_one_answer(path, folder):
    policy = MediaPolicy(allowed_local_media_path=folder / "open")
    says = "names no readable file below allowed_local_media_path"
    refused(f"file://{folder}/{path}", policy, says=says, hides=(str(folder), "secret", "key"))


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "/proc/self/environ", "/etc/passwd"])
def test_devices_and_such_are_no_files(path):
    refused(f"file://{path}", MediaPolicy(allowed_local_media_path="/dev"), says="names no readable file")


def test_hosts_queries_and_relative_paths_are_refused(folder):
    policy = MediaPolicy(allowed_local_media_path=folder / "open")
    for url in (
        "file://evil{}/open/a.png",
        "file://{}/open/a.png?x",
        "file://{}/open/a.png#x",
        "file:a.png",
        "file://a@{}/a",
    ):
        refused(url.format(folder), policy, says="is not of the form file:///path", hides=(str(folder),))


def test_files_by_default(folder):
    for url in (f"file://{folder}/open/a.png", "file:///none", "file://", "FILE:///etc/passwd"):
        refused(url, MediaPolicy(), says="file: URLs are not allowed here", hides=(str(folder),))


def test_a_file_that_is_too_large(folder):
    policy = MediaPolicy(allowed_local_media_path=folder / "open", max_bytes=len(BODY) - 1)
    refused(f"file://{folder}/open/a.png", policy, says="more than 10239 bytes")


def test_a_link_that_is_put_there_after_the_check(folder, monkeypatch):
    """The folder `in` turns into a link to `secret` between the look at the path and the opening of it."""
    (folder / "open" / "in" / "key").write_bytes(b"harmless")
    real = os.path.realpath

    def realpath(path: Any, **options: Any) -> str:
        found = real(path, **options)
        if found.endswith("in/key"):
            (folder / "open" / "in").rename(folder / "was")
            (folder / "open" / "in").symlink_to(folder / "secret")
        return found

    monkeypatch.setattr(os.path, "realpath", realpath)
    policy = MediaPolicy(allowed_local_media_path=folder / "open")
    refused(f"file://{folder}/open/in/key", policy, says="names no readable file")
    assert (folder / "open" / "in" / "key").read_bytes() == b"secret"


def test_a_file_that_turns_into_a_link_before_it_is_opened(folder, monkeypatch):
    real = os.open

    def opening(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if path == "a.png" and options.get("dir_fd") is not None:
            (folder / "open" / "a.png").unlink()
            (folder / "open" / "a.png").symlink_to(folder / "secret" / "key")
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", opening)
    refused(
        f"file://{folder}/open/a.png", MediaPolicy(allowed_local_media_path=folder / "open"), says="no readable file"
    )
    assert (folder / "open" / "a.png").read_bytes() == b"secret"


# ---- parts


def part(kind: str, value: Any) -> Media:
    return Media(kind, value, FIELD)


def test_which_parts_are_urls():
    url, policy = "data:;base64,AAAA", MediaPolicy()
    for kind in ("image", "image_url", "video", "video_url"):
        assert load(part(kind, url), policy) == b"\0\0\0"
    for value in ("a.png", "a/b:c.png", Path("a.png"), BODY, [BODY], 3):
        assert load(part("image", value), policy) is value
        assert isinstance(value, list) or load(part("video", value), policy) is value
    for value in ("http://127.0.0.1/a.png", "file:///etc/passwd", "ftp://x/a.png"):
        for kind in ("image", "video", "image_embeds"):
            with pytest.raises(InvalidRequest, match="URL"):
                load(part(kind, value), policy)
    with pytest.raises(InvalidRequest, match="no URL"):
        load(part("image_url", "a.png"), policy)


@pytest.mark.parametrize("kind", ["image", "video", "image_embeds"])
@pytest.mark.parametrize("value", ["/etc/passwd.npy", Path("/etc/passwd.npy"), "a.npy"])
def test_paths_of_a_client_are_not_opened(kind, value):
    with pytest.raises(InvalidRequest, match="it is a path, which is not read here; send a URL"):
        load(part(kind, value), MediaPolicy(allow_paths=False))


def test_videos_have_a_time_limit_of_their_own():
    def answer(connection: Any, head: str) -> None:
        time.sleep(0.4)
        connection.sendall(PLAIN)

    with serving(answer) as server:
        policy = trusting(server, timeout_s=0.1, video_timeout_s=5)
        assert load(part("video_url", server.url), policy) == BODY
        with pytest.raises(InvalidRequest, match="took longer than"):
            load(part("image_url", server.url), policy)


def test_all_media_of_a_prompt_share_a_limit_of_bytes():
    with serving(PLAIN) as server:
        policy = trusting(server, max_total_bytes=25_000)
        items = [part("image_url", server.url)] * 2
        assert media.load_all(items, policy) == [BODY] * 2
        with pytest.raises(InvalidRequest, match="more than the 4520 bytes"):
            media.load_all(items * 2, policy)
        assert len(server.requests) == 5  # the fourth image is not asked for
        with pytest.raises(InvalidRequest, match="media of this prompt take more than 20480 bytes; send fewer"):
            media.load_all(items * 2, replace(policy, max_total_bytes=20_480))
        with pytest.raises(InvalidRequest, match="more than the 4520 bytes") as caught:
            media.load_all([part("video", [server.url] * 4)], policy)
        assert caught.value.field == f"{FIELD}[2]"


def test_all_media_of_a_prompt_share_a_time_limit():
    def answer(connection: Any, head: str) -> None:
        time.sleep(0.2)
        connection.sendall(PLAIN)

    with serving(answer) as server:
        start = time.monotonic()
        for items in ([part("image_url", server.url)] * 50, [part("video", [server.url] * 50)]):
            with pytest.raises(InvalidRequest, match=r"took longer than|take more than 0\.5 s to fetch"):
                media.load_all(items, trusting(server, max_total_s=0.5))
        assert time.monotonic() - start < 8  # 20 one after another


# ---- embeddings

ROWS = torch.arange(24, dtype=torch.float32).reshape(4, 6)


def npy(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("blob", "expected"),
    [
        (npy(ROWS.numpy()), ROWS),
        (npy(np.asfortranarray(ROWS.numpy())), ROWS),
        (npy(ROWS.numpy().astype(">f4")), ROWS),
        (npy(ROWS.numpy().astype(np.float16)), ROWS.half()),
        (npy(np.array([[1, 4, 4]], np.uint32)), torch.tensor([[1, 4, 4]])),
        (save({"anything": ROWS.bfloat16()}), ROWS.bfloat16()),
    ],
)
def test_embeddings_from_files(blob, expected, tmp_path):
    suffix = ".npy" if blob[:1] == b"\x93" else ".safetensors"
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(blob)
    text = base64.b64encode(blob).decode()
    for value in (blob, path, str(path), text, f"data:;base64,{text}", bytearray(blob)):
        read = load(part("image_embeds", value), MediaPolicy())
        assert read.dtype == expected.dtype
        assert torch.equal(read, expected)
    inside = load(part("image_embeds", {"image_embeds": text, "image_grid_thw": [[1, 4, 4]]}), MediaPolicy())
    assert torch.equal(inside["image_embeds"], expected)
    assert inside["image_grid_thw"] == [[1, 4, 4]]


def test_several_tensors_of_a_file_come_by_name_and_tensors_pass():
    grid = torch.tensor([[1, 4, 4]])
    read = load(part("image_embeds", save({"image_embeds": ROWS, "image_grid_thw": grid})), MediaPolicy())
    assert set(read) == {"image_embeds", "image_grid_thw"}
    assert torch.equal(read["image_grid_thw"], grid)
    assert load(part("image_embeds", ROWS), MediaPolicy()) is ROWS
    assert load(part("image_embeds", {"image_embeds": ROWS}), MediaPolicy())["image_embeds"] is ROWS


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("was-unpickled",)


def npy_claiming(shape: str, values: bytes, dtype: str = "<f4") -> bytes:
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + values


def torch_saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


HARMFUL = {
    "pickle": pickle.dumps(Bomb()),
    "old pickle": pickle.dumps(Bomb(), 0),
    "torch.save": torch_saved(ROWS),
    "old torch.save": torch_saved(ROWS, _use_new_zipfile_serialization=False),
    "sparse torch.save": torch_saved(torch.eye(9).to_sparse()),
    "npy of objects": npy(np.array([Bomb()], dtype=object), allow_pickle=True),
    "npy of structures": npy(np.zeros(3, [("a", "f4")])),
    "npy of text": npy(np.array(["abc"])),
    "npy of complex": npy(np.zeros(3, np.complex64)),
    "npy that claims much": npy_claiming("(1000000000000, 4096)", b"\0" * 64),
    "npy that claims a negative number": npy_claiming("(-1, -16)", b"\0" * 64),
    "npy that leaves a number open": npy_claiming("(-1, 4)", b"\0" * 64),
    "npy that claims too little": npy_claiming("(4,)", b"\0" * 64),
    "npy with a header that is code": npy_claiming("(__import__('os').mkdir('was-unpickled'),)", b""),
    "npy cut off": npy(ROWS.numpy())[:-1],
    "npy of another version": b"\x93NUMPY\x09\x00" + b"\0" * 99,
    "safetensors cut off": save({"a": ROWS})[:-1],
    "safetensors that claims much": (2**60).to_bytes(8, "little") + b"{}",
    "safetensors out of bounds": (64).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[99],"data_offsets":[0,396]}}'.ljust(64),
    "safetensors of nothing": save({}),
    "empty": b"",
    "picture": b"\x89PNG\r\n\x1a\n" + b"\0" * 64,
}  # fmt: skip


@pytest.mark.parametrize("name", HARMFUL)
def test_embeddings_that_are_none(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.npy"
    path.write_bytes(HARMFUL[name])
    for value in (HARMFUL[name], path, base64.b64encode(HARMFUL[name]).decode()):
        with pytest.raises(InvalidRequest) as caught:
            load(part("image_embeds", value), MediaPolicy())
        assert caught.value.field == FIELD
        assert is_one_sentence(caught.value)
    assert not (tmp_path / "was-unpickled").exists()


def test_what_unpickling_would_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(HARMFUL["pickle"])
    assert (tmp_path / "was-unpickled").exists()


@settings(max_examples=200, deadline=None)
@given(blob=st.binary(max_size=300), front=st.sampled_from([b"", b"\x93NUMPY\x01\x00\x60\x00", b"\x40\0\0\0\0\0\0\0{"]))
def test_random_bytes_are_embeddings_or_our_error(blob, front):
    with suppress(InvalidRequest):
        load(part("image_embeds", front + blob), MediaPolicy())


def test_files_in_multi_modal_data(tmp_path):
    path, grid = tmp_path / "rows.safetensors", tmp_path / "grid.npy"
    path.write_bytes(save({"x": ROWS}))
    grid.write_bytes(npy(np.array([[1, 4, 4]])))
    pictures = [tmp_path / "a.png", "b.jpg", b"bytes", ROWS, {"image_embeds": ROWS}, None]
    for value in pictures:
        assert embed_files.read_files(value, FIELD) is value or value == {"image_embeds": ROWS}
    assert torch.equal(embed_files.read_files(path, FIELD), ROWS)
    assert torch.equal(embed_files.read_files([ROWS, str(path)], FIELD)[1], ROWS)
    read = embed_files.read_files({"image_embeds": path.read_bytes(), "image_grid_thw": str(grid)}, FIELD)
    assert torch.equal(read["image_embeds"], ROWS)
    assert read["image_grid_thw"].tolist() == [[1, 4, 4]]
    with pytest.raises(InvalidRequest, match="never read") as caught:
        embed_files.read_files({"image_embeds": HARMFUL["torch.save"]}, FIELD)
    assert caught.value.field == f"{FIELD}.image_embeds"


def test_embeddings_that_are_too_large_or_too_many():
    blob = npy(ROWS.numpy())
    text = base64.b64encode(blob).decode()
    assert torch.equal(load(part("image_embeds", text), MediaPolicy(max_bytes=len(blob))), ROWS)
    with pytest.raises(InvalidRequest, match="the text holds more than 100 bytes; send a smaller file"):
        load(part("image_embeds", text), MediaPolicy(max_bytes=100))
    assert len(load(part("image_embeds", save({str(i): ROWS.clone() for i in range(8)})), MediaPolicy())) == 8
    with pytest.raises(InvalidRequest, match="holds 9 tensors, expected at most 8"):
        load(part("image_embeds", save({str(i): ROWS.clone() for i in range(9)})), MediaPolicy())
    with pytest.raises(InvalidRequest, match="its values are of type float128, not numbers"):
        load(part("image_embeds", npy_claiming("(4,)", bytes(64), "<f16")), MediaPolicy())


def test_embeddings_count_among_the_bytes_of_a_prompt():
    policy = MediaPolicy(max_total_bytes=ROWS.nbytes)
    grid: Any = {"image_embeds": ROWS, "image_grid_thw": [[1, 4, 4]]}
    for value in (ROWS, grid):
        items = [part("image_embeds", ROWS if isinstance(value, dict) else grid), part("image_embeds", value)]
        with pytest.raises(InvalidRequest, match="media of this prompt take more than 96 bytes"):
            media.load_all(items, policy)
    text = part("image_embeds", base64.b64encode(npy(ROWS.numpy())).decode())  # 224 bytes, of which 96 are values
    assert len(media.load_all([text] * 2, replace(policy, max_total_bytes=96 + 224))) == 2
    with pytest.raises(InvalidRequest, match="the text holds more than 200 bytes"):
        media.load_all([text] * 2, replace(policy, max_total_bytes=96 + 200))


def test_text_that_is_not_base64_and_paths_that_are_not_there():
    with pytest.raises(InvalidRequest, match="the text is not base64"):
        load(part("image_embeds", "rows of numbers"), MediaPolicy())
    with pytest.raises(InvalidRequest, match="is not a file; give the path"):
        load(part("image_embeds", "none.npy"), MediaPolicy())


# ---- the policy


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (5, 30)),
        ({"VLLM_IMAGE_FETCH_TIMEOUT": "7", "VLLM_VIDEO_FETCH_TIMEOUT": "0.5"}, (7, 0.5)),
        ({"VLLM_IMAGE_FETCH_TIMEOUT": "7", "VLMFX_IMAGE_FETCH_TIMEOUT": "2"}, (2, 30)),
        ({"VLMFX_IMAGE_FETCH_TIMEOUT": "", "VLLM_IMAGE_FETCH_TIMEOUT": "3"}, (3, 30)),
    ],
)
def test_time_limits_of_the_environment(environment, expected, monkeypatch):
    for name in ("IMAGE", "VIDEO"):
        for front in ("VLMFX", "VLLM"):
            monkeypatch.delenv(f"{front}_{name}_FETCH_TIMEOUT", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    policy = MediaPolicy()
    assert (policy.timeout_s, policy.video_timeout_s) == expected


@pytest.mark.parametrize("value", ["x", "0", "-1", "nan", "inf", "1e9"])
def test_time_limits_that_are_none(value, monkeypatch):
    monkeypatch.setenv("VLLM_IMAGE_FETCH_TIMEOUT", value)
    with pytest.raises(InvalidRequest, match="set a number of seconds above 0") as caught:
        MediaPolicy()
    assert caught.value.field == "VLLM_IMAGE_FETCH_TIMEOUT"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("allowed_local_media_path", "none/such"),
        ("allowed_local_media_path", __file__),
        ("allowed_media_domains", ["http://a.example"]),
        ("allowed_media_domains", [3]),
        ("allowed_media_domains", 3),
        ("private_media_hosts", ["a.example/x"]),
        ("private_media_hosts", ["a@b"]),
        ("private_media_hosts", "a b"),
        ("private_media_hosts", "*"),
        ("private_media_hosts", "a.example:99999"),
        ("private_media_hosts", "[::g]"),
        ("allowed_media_domains", ["a.example:80"]),
        ("allowed_media_domains", ["[::1]:80"]),
        ("allowed_media_domains", ["*"]),
        ("allowed_media_domains", ["*.example"]),
    ],
)
def test_options_that_cannot_be(option, value):
    with pytest.raises(InvalidRequest) as caught:
        MediaPolicy(**{option: value})
    assert caught.value.field == option
    assert is_one_sentence(caught.value)


def test_options_in_the_forms_of_vllm():
    assert MediaPolicy(allowed_local_media_path="").allowed_local_media_path is None
    assert MediaPolicy(allowed_media_domains=[]).allowed_media_domains is None  # type: ignore[arg-type]
    hosts = "A.example:80, [::1]:8080, ::1, b."
    assert MediaPolicy(private_media_hosts=hosts).private_media_hosts == ("a.example:80", "[::1]:8080", "::1", "b")  # type: ignore[arg-type]
    hosts = "Bücher.example:1, [0:0:0::1]:2, FE80:0::1, ÖRT., 0:0::ffff:1.2.3.4"
    expected = ("xn--bcher-kva.example:1", "[::1]:2", "fe80::1", "xn--rt-eka", "::ffff:102:304")
    found = MediaPolicy(private_media_hosts=hosts).private_media_hosts  # type: ignore[arg-type]
    assert (
        tuple(h.replace("::ffff:1.2.3.4", "::ffff:102:304") for h in found) == expected
    )  # Python >= 3.13 writes the former
    assert MediaPolicy(allowed_media_domains="bücher.example").allowed_media_domains == ("xn--bcher-kva.example",)  # type: ignore[arg-type]


def test_private_hosts_of_ipv6():
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    port = listener.getsockname()[1]

    def serve() -> None:
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(PLAIN)
        connection.close()

    threading.Thread(target=serve, daemon=True).start()
    policy = MediaPolicy(private_media_hosts=(f"[::1]:{port}",), timeout_s=2)
    assert media.fetch(f"http://[0:0::1]:{port}/", policy, FIELD) == BODY
    listener.close()
