"""One GET from the public web, asked for by somebody who is not trusted.

A name is resolved once, all its addresses are checked, and the connection goes to a checked one: what was checked is what is
talked to. Redirects are followed by hand under the same checks. No proxy, no cookie, no credential; one deadline and one limit
for all that comes over the wire, so that neither drops of a byte nor a length that lies makes it last."""

from __future__ import annotations

import http.client
import io
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urljoin, urlsplit

from vlmfx import __version__

if TYPE_CHECKING:
    from vlmfx.processing.media import MediaPolicy

MAX_URL_CHARS = 8192
MAX_ADDRESSES = 8
MAX_HEADER_BYTES = 2**20  # beside the body: headers, and the marks of a chunked one
REDIRECTS = (301, 302, 303, 307, 308)
NETLOC = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<name>[^\[\]@:%/\\]+))(?::(?P<port>[0-9]{0,5}))?")
NAME = re.compile(r"[a-z0-9_]([a-z0-9._-]{0,251}[a-z0-9_-])?")

# IANA's special-purpose registries (RFC 6890 and its updates), multicast, and the address of Azure's host services. Written out, as
# what `ipaddress` calls global differs between releases of Python.
NOT_PUBLIC = [
    ipaddress.ip_network(block)
    for block in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16", "172.16.0.0/12",
        "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16",
        "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
        "2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20",
    )
]  # fmt: skip
UNICAST_V6 = ipaddress.ip_network("2000::/3")
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # an IPv4 address in its last 32 bits


class Refused(Exception):
    """Why a URL was not fetched, and what to do; holds no address."""


@dataclass(frozen=True)
class Place:
    """A URL, taken apart: host in ASCII and lower case, target the path and query of the request."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def netloc(self) -> str:
        """host:port, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def get(url: str, policy: MediaPolicy, timeout_s: float) -> bytes:
    """The body of a GET, redirects followed. Raises Refused."""
    deadline = time.monotonic() + timeout_s
    place, is_first = parse(url), True
    try:
        for _ in range(policy.max_redirects + 1):
            answer = _get_once(place, policy, deadline)
            if isinstance(answer, bytes):
                return answer
            is_first = False
            place = parse(urljoin(f"{place.scheme}://{place.netloc}{place.target}", answer))
    except TimeoutError:
        raise Refused(f"it took longer than {timeout_s:g} s; send the file itself, or raise the time limit") from None
    except ssl.SSLError:
        raise Refused("its host has no TLS certificate that is trusted; use another host") from None
    except Refused:
        if not is_first:  # what a host redirects to is not for the client to learn
            raise Refused("it redirects to what is not fetched; give the final, public URL") from None
        raise
    except (OSError, http.client.HTTPException, ValueError):
        raise Refused("no whole answer came from its host; check the URL or send the file itself") from None
    raise Refused(f"it redirects more than {policy.max_redirects} times; give the final URL")


def parse(url: str) -> Place:
    """The parts of an http or https URL, with nothing in it that two readers might read differently. Raises Refused."""
    if len(url) > MAX_URL_CHARS:
        raise Refused(f"it has more than {MAX_URL_CHARS} characters; shorten it")
    if any(c <= " " or c in "\\\x7f" for c in url):
        raise Refused("it holds a space, a control character or a backslash; percent-encode them")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise Refused("it is not a valid URL; correct it") from None
    if parts.scheme not in ("http", "https"):
        raise Refused("it is not an http or https URL; give one")
    if "@" in parts.netloc:
        raise Refused("it holds a user name or password; leave them out")
    netloc = NETLOC.fullmatch(parts.netloc)
    if netloc is None:
        raise Refused("it has no valid host; correct it")
    host, port = _host(netloc), int(netloc["port"] or (443 if parts.scheme == "https" else 80))
    if not 0 < port < 65536:
        raise Refused("it has no valid port; correct it")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Place(parts.scheme, host, port, "".join(c if c.isascii() else quote(c, errors="replace") for c in target))


def _host(netloc: re.Match[str]) -> str:
    try:
        if netloc["v6"]:
            return str(ipaddress.IPv6Address(netloc["v6"]))
        name = netloc["name"].encode("idna").decode("ascii").lower().removesuffix(".")
    except ValueError:  # UnicodeError too
        name = ""
    if not NAME.fullmatch(name):
        raise Refused("it has no valid host; correct it")
    return name


def is_public(address: str) -> bool:
    """Whether an address, as getaddrinfo writes it, is one that anybody on the internet can reach."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in UNICAST_V6:
            return False
    return ip.is_global and not any(ip in block for block in NOT_PUBLIC)


def _addresses(place: Place, policy: MediaPolicy, deadline: float) -> list[Any]:
    """What getaddrinfo says of the host, all of it allowed. Raises Refused, with the same words for a name that there is not and one
    that is private."""
    if policy.allowed_media_domains is not None and place.host not in policy.allowed_media_domains:
        raise Refused("its host is not one of allowed_media_domains; use one of them or send the file itself")
    found: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found.put(socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP))
        except (OSError, ValueError):
            found.put([])

    threading.Thread(target=look_up, daemon=True).start()  # a look-up cannot be given a time limit, nor be stopped
    try:
        addresses = found.get(timeout=_remaining(deadline))
    except queue.Empty:
        raise TimeoutError from None
    names = {place.host, f"[{place.host}]", place.netloc}
    is_exempt = not names.isdisjoint(policy.private_media_hosts)
    if not addresses or not (is_exempt or all(is_public(str(entry[4][0])) for entry in addresses)):
        raise Refused("its host has no public address; use a public host or send the file itself")
    return addresses[:MAX_ADDRESSES]


def _connect(addresses: list[Any], deadline: float) -> socket.socket:
    """A connection to the first address that answers; each has its share of the time that is left."""
    for number, (family, kind, proto, _, address) in enumerate(addresses):
        connection = socket.socket(family, kind, proto)
        try:
            connection.settimeout(_remaining(deadline) / (len(addresses) - number))
            connection.connect(address)
            return connection
        except OSError:
            connection.close()
            if number == len(addresses) - 1:
                raise
    raise OSError("no address")


def _get_once(place: Place, policy: MediaPolicy, deadline: float) -> bytes | str:
    """The body, or where a redirect points to."""
    connection = _connect(_addresses(place, policy, deadline), deadline)
    try:
        if place.scheme == "https":
            connection.settimeout(_remaining(deadline))
            connection = ssl.create_default_context().wrap_socket(connection, server_hostname=place.host)
        host = place.netloc.removesuffix(":443" if place.scheme == "https" else ":80")
        request = (
            f"GET {place.target} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: vlmfx/{__version__}\r\nAccept: */*\r\n"
            "Accept-Encoding: identity\r\nConnection: close\r\n\r\n"
        )
        connection.settimeout(_remaining(deadline))
        connection.sendall(request.encode("ascii"))
        wire: Any = _Wire(connection, deadline, policy.max_bytes)
        response = http.client.HTTPResponse(wire, method="GET")
        response.begin()
        location = response.headers.get("Location")
        if response.status in REDIRECTS and location is not None:
            return location
        return _body(response, policy)
    finally:
        connection.close()


def _body(response: http.client.HTTPResponse, policy: MediaPolicy) -> bytes:
    max_bytes = policy.max_bytes
    if response.status != 200:
        raise Refused(f"its host answered with status {response.status}; check the URL")
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
        raise Refused("its host sent a compressed answer though none was asked for; use another host")
    if response.headers.get("Transfer-Encoding", "chunked").strip().lower() != "chunked":
        raise Refused("its host sent an answer in a coding that is not known; use another host")
    if (response.length or 0) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    while part := response.read(2**16):
        body += part
        if policy.on_bytes is not None:
            policy.on_bytes(len(part))
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    if response.length:  # http.client is silent about a body that ends too early
        raise http.client.IncompleteRead(b"")
    return bytes(body)


class _Wire(io.RawIOBase):
    """What HTTPResponse reads from: every byte that comes, within the deadline and the limit, whatever headers and chunks claim."""

    def __init__(self, connection: socket.socket, deadline: float, max_bytes: int) -> None:
        self._connection = connection
        self._deadline = deadline
        self._max_bytes = max_bytes
        self._left = max_bytes + MAX_HEADER_BYTES

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(_remaining(self._deadline))
        count = self._connection.recv_into(buffer)
        self._left -= count
        if self._left < 0:
            raise _too_large(self._max_bytes)
        return count


def _too_large(max_bytes: int) -> Refused:
    return Refused(f"its host sent more than the {max_bytes} bytes that are allowed; use a smaller file")


def _remaining(deadline: float) -> float:
    """Seconds left, more than 0. Raises TimeoutError."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
