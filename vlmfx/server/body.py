"""The JSON body of a request, within limits of bytes, time, items and depth."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from threading import Lock
from typing import Any

import orjson
from fastapi import Request

from vlmfx.errors import EngineFull, InvalidRequest, reason_of
from vlmfx.server.calls import Call, call_of
from vlmfx.server.errors import ClientGone, HttpError

MAX_ITEMS = 1_000_000  # of all lists and objects of a body, which take up to 100 times its bytes of memory
MAX_DEPTH = 100


class Bodies:
    """Reads bodies of at most `most` bytes; those that are held by requests have at most `most_held` together,
    with what was fetched for these."""

    def __init__(self, most: int, most_held: int, timeout_s: float) -> None:
        self.most, self.most_held, self.timeout_s = most, most_held, timeout_s
        self.num_held = 0
        self._lock = Lock()
        self._readers: set[asyncio.Task[Any]] = set()
        self._ended: str | None = None

    async def read(self, request: Request, types: Sequence[str] = ("application/json",)) -> bytes:
        """The body, of one of these types or groups of types ("image/"), which counts as held until the call ends. Raises HttpError,
        EngineFull and ClientGone."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not any(kind == one or (one.endswith("/") and kind.startswith(one)) for one in types):
            # Not only for order's sake: a page in a browser may send other types to any server without asking.
            wanted = "JSON, with Content-Type: application/json" + (
                ", or an image, as image/png" if len(types) > 1 else ""
            )
            message = f"the body's type is {kind[:80] or 'not given'}; send {wanted}."
            raise HttpError(415, message, code="unsupported_media_type", headers={"Connection": "close"})
        if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            message = "the body is compressed, and it is not known how large it would become; send it as it is."
            raise HttpError(415, message, code="unsupported_content_encoding", headers={"Connection": "close"})
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > self.most:
            raise self._too_large()
        call = call_of(request.scope)
        call.on_end(self._release)
        reader = asyncio.current_task()
        assert reader is not None
        self._readers.add(reader)
        try:
            return await asyncio.wait_for(self._read(request, call), self.timeout_s or None)
        except asyncio.CancelledError:
            if self._ended is None:
                raise
            raise EngineFull(self._ended) from None
        except asyncio.TimeoutError:
            message = f"the body did not come within {self.timeout_s:g} s; send it at once."
            raise HttpError(408, message, headers={"Connection": "close"}) from None
        finally:
            self._readers.discard(reader)

    def end(self, message: str) -> None:
        """Fail what is still being read by an EngineFull of this message; for the thread of the loop that reads."""
        self._ended = message
        for reader in self._readers:
            reader.cancel()

    async def _read(self, request: Request, call: Call) -> bytes:
        parts: list[bytes] = []
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            parts.append(part)
            call.num_body_bytes += len(part)
            with self._lock:
                self.num_held += len(part)
            if call.num_body_bytes > self.most:
                raise self._too_large()
            self._check_held()
            if not message.get("more_body", False):
                return b"".join(parts)

    def hold(self, call: Call, num_bytes: int) -> None:
        """Count what was fetched for a call among what requests hold, until it ends. Raises EngineFull."""
        with self._lock:
            if call.is_over:
                raise EngineFull("the request has ended before all was fetched for it; send it again.")
            call.num_fetched_bytes += num_bytes
            self.num_held += num_bytes
        self._check_held()

    def _check_held(self) -> None:
        if self.num_held > self.most_held:
            raise EngineFull("the requests that are being served hold as much as may be; send it again in a while.")

    def _release(self, call: Call) -> None:
        with self._lock:
            self.num_held -= call.num_body_bytes + call.num_fetched_bytes

    def _too_large(self) -> HttpError:
        message = f"the body has more than the {self.most} bytes that are taken; send less, or the URLs of images."
        return HttpError(413, message, code="request_too_large", headers={"Connection": "close"})


def parsed(text: bytes) -> Any:
    """The value of a JSON text. Raises InvalidRequest."""
    if text.count(b",") + text.count(b"[") + text.count(b"{") > MAX_ITEMS:
        raise InvalidRequest("body", f"it has more than {MAX_ITEMS} items, or commas in texts; send less.")
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest("body", f"it is not valid JSON ({reason_of(error)}); correct it.") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        if not inner:
            return value
        level = [item for values in inner for item in values if isinstance(item, (dict, list))]
        if not level:
            return value
    raise InvalidRequest("body", f"it is more than {MAX_DEPTH} levels deep; send it flatter.")
