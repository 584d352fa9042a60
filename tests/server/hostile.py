"""What a client may send to do harm: pictures that grow when they are decoded, files that lie, hosts that never end."""

from __future__ import annotations

import base64
import gzip
import struct
import threading
import zlib
from typing import Any

from tests.pictures import encoded, picture
from tests.processing import test_media as hosts

PNG = encoded(picture(40, 30))
LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12))


def png(width: int, height: int, *before: bytes, kind: int = 6, pixels: bytes = b"") -> bytes:
    """A PNG whose header claims a size; before: chunks between header and pixels; kind 6 is RGBA."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    return PNG[:8] + header + b"".join(before) + chunk(b"IDAT", pixels or zlib.compress(b"")) + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def large_png(width: int, height: int) -> bytes:
    """A whole RGBA picture of one colour, some 1000 times as large when it is decoded."""
    packer = zlib.compressobj(9)
    row = bytes(1 + 4 * width)
    pixels = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    return png(width, height, pixels=pixels)


def gif(frames: int, size: tuple[int, int] = (16, 16), screen: tuple[int, int] | None = None) -> bytes:
    """A GIF of so many equal frames; screen is what its header claims."""
    one = encoded(picture(*size, mode="P"), "GIF")
    start = 13 + 3 * 2 ** ((one[10] & 7) + 1)
    head = one[:6] + struct.pack("<HH", *(screen or size)) + one[10:start]
    return head + one[start:-1] * frames + b";"


def gif_with_a_large_frame() -> bytes:
    """Its screen is small, its frame 65,535 pixels wide and high."""
    one = bytearray(encoded(picture(16, 16, mode="P"), "GIF"))
    at = one.index(b",", 13 + 3 * 2 ** ((one[10] & 7) + 1))
    one[at + 5 : at + 9] = struct.pack("<HH", 65535, 65535)
    return bytes(one)


def webp(width: int, height: int) -> bytes:
    """A WebP with a canvas of this size, and hardly anything on it."""
    still = encoded(picture(16, 16), "WEBP", lossless=True)[12:]
    canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + canvas + still
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(width: int, height: int) -> bytes:
    """A TIFF whose tags claim a size, in one deflated strip."""
    strip = zlib.compress(bytes(2**20))
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 8), (262, 3, 1), (273, 4, 8), (278, 4, height),
            (279, 4, len(strip))]  # fmt: skip
    table = struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags
    )
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + table + bytes(4)


# Name → what is refused as a picture, by whatever way it comes.
PICTURES: dict[str, bytes] = {
    "a PNG of 60,000 x 60,000": png(60_000, 60_000),
    "a PNG of 2,147,483,647 x 1": png(2**31 - 1, 1),
    "a PNG of 0 x 0": png(0, 0),
    "a PNG with a text of 64 MiB": png(8, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**26))), kind=2),
    "a PNG with a profile of 64 MiB": png(8, 8, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**26))), kind=2),
    "a GIF of 65,535 x 65,535": gif(1, screen=(65535, 65535)),
    "a WebP of 16,384 x 16,384": webp(16384, 16384),
    "a WebP of 16,777,216 x 16,777,216": webp(2**24, 2**24),
    "a TIFF of 100,000 x 100,000": tiff(100_000, 100_000),
    "an SVG of entities": f'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY l0 "l">{LAUGHS}]><svg>&l11;</svg>'.encode(),
    "an SVG that fetches": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "a PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "a PDF": b"%PDF-1.4\n" + bytes(99),
    "a gzip": gzip.compress(PNG),
    "a page": b"<html><body>secret</body></html>",
    "nothing": b"\0",
    "half of a WEBP": encoded(picture(64, 64), "WEBP")[:900],
    "the header of a PNG": PNG[:30],
}
# Name → what some readers may take: FFmpeg shows what there is of a GIF, /tokenize reads no further than the header.
DAMAGED: dict[str, bytes] = {
    f"half of a {form}": (whole := encoded(picture(64, 64), form))[: len(whole) // 2]
    for form in ("PNG", "JPEG", "TIFF", "BMP", "GIF")
} | {"a TIFF that lies": tiff(4000, 4000), "a GIF with a frame of 65,535 x 65,535": gif_with_a_large_frame()}

SMALL: dict[str, bytes] = {
    f"{width}x{height} {mode} {form}": encoded(picture(width, height).convert(mode), form)
    for width, height in ((1, 1), (1, 3), (3, 1), (3, 3), (1, 2), (2, 1), (3, 4))
    for mode, form in (("RGB", "PNG"), ("L", "PNG"), ("RGB", "JPEG"))
}


def data_url(blob: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(blob).decode()}"


class Host:
    """A host of this machine: path → answer. `asked` are the paths that were asked for."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[str] = []
        self.is_over = threading.Event()

    def __call__(self, connection: Any, head: str) -> None:
        path = head.split(" ")[1]
        self.asked.append(path)
        answer = self.answers.get(path, b"HTTP/1.1 404 Not Found\r\n\r\n")
        if callable(answer):
            answer(connection, head)
        else:
            connection.sendall(answer)


def answer(body: bytes, *headers: str) -> bytes:
    """A whole answer; headers stand in for Content-Length."""
    lines = headers or (f"Content-Length: {len(body)}",)
    return "".join(f"{line}\r\n" for line in ("HTTP/1.1 200 OK", *lines, "")).encode() + body


def redirect(to: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {to}\r\n\r\n".encode()


# Path → an answer that no picture comes of.
ANSWERS: dict[str, Any] = {
    "/silence": hosts.silent,
    "/slow-status": hosts.drip(b"", b"H"),
    "/slow-headers": hosts.drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "/slow-body": hosts.drip(answer(b"", "Content-Length: 9999"), b"x"),
    "/slow-chunks": hosts.drip(answer(b"", "Transfer-Encoding: chunked"), b"1\r\nx\r\n"),
    "/endless": hosts.flood(answer(b"", "X: y"), bytes(2**16)),
    "/endless-png": hosts.flood(answer(PNG, "X: y"), bytes(2**16)),
    "/endless-headers": hosts.flood(b"HTTP/1.1 200 OK\r\nX: ", bytes(2**16)),
    "/endless-chunks": hosts.flood(answer(b"", "Transfer-Encoding: chunked"), b"10000\r\n" + bytes(2**16) + b"\r\n"),
    "/terabyte": hosts.flood(answer(b"", "Content-Length: 1099511627776"), bytes(2**16)),
    "/too-long": answer(PNG, f"Content-Length: {len(PNG) + 9}"),
    "/too-short": answer(PNG, f"Content-Length: {len(PNG) // 2}"),
    "/negative": answer(PNG[:99], "Content-Length: -1"),
    "/gzip": answer(gzip.compress(bytes(2**28)), "Content-Encoding: gzip"),
    "/br": answer(PNG, "Content-Encoding: br"),
    "/gzip-twice": answer(PNG, "Content-Encoding: gzip, gzip"),
    "/gzip-chunked": answer(b"0\r\n\r\n", "Transfer-Encoding: gzip, chunked"),
    "/not-http": b"220 mail.example ESMTP\r\n",
    "/cut": b"",
    "/204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "/500": b"HTTP/1.1 500 secret\r\nContent-Length: 6\r\n\r\nsecret",
    "/page": answer(b"<html>secret</html>"),
    "/loop": redirect("/loop"),
}  # fmt: skip
REDIRECTS = (
    "http://169.254.169.254/latest/meta-data", "http://127.0.0.1:1/", "//127.0.0.1:1/", "http://[::1]/", "http://2130706433/",
    "http://0x7f.1/", "http://localhost/", "http://localhost./", "http://inner.example/", "file:///etc/passwd", "gopher://127.0.0.1/",
    "data:image/png;base64,AAAA", "http://good.example\\@127.0.0.1/", "http://u:p@127.0.0.1/", "http://[::ffff:a9fe:a9fe]/",
)  # fmt: skip
