"""OpenAI-style chat messages as a template wants them, and the images they carry."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

from vlmfx.errors import InvalidRequest

PART_TYPES = ("text", "image", "image_url", "image_embeds")


def messages_for_template(
    messages: Sequence[Mapping[str, Any]], takes_parts: bool, placeholder: str | Callable[[int], str]
) -> tuple[list[dict[str, Any]], list[Any]]:
    """(messages as the template wants them, the images they carry in order).

    A parts template gets lists of {"type": "image"} and {"type": "text", "text": ...}; a string template gets text,
    the pieces joined by newlines, each image as its placeholder (a function of the image's number, from 1, where
    placeholders are numbered) unless the message's text already writes it. An image is what its part holds: PIL
    image, path, bytes of a data: URL, tensor or dict of ready embeddings. Paths pass as they are: a server must
    refuse them before. Raises InvalidRequest.
    """
    images: list[Any] = []
    out: list[dict[str, Any]] = []
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise InvalidRequest("messages", "a list of at least one message is expected; give one.", found=messages)
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            expected = '{"role": ..., "content": ...}'
            raise InvalidRequest(f"messages[{i}]", f"is not a message; write {expected}.", expected=expected)
        pieces: list[str | None] = []  # None is an image
        first = len(images) + 1
        for field, part in _parts(message.get("content"), f"messages[{i}].content"):
            text, image = _read_part(part, field)
            pieces.append(text)
            if text is None:
                images.append(image)
        if takes_parts:
            parts = [{"type": "image"} if text is None else {"type": "text", "text": text} for text in pieces]
            out.append({**message, "content": parts})
        else:
            out.append({**message, "content": _joined(pieces, placeholder, first)})
    return out, images


def _parts(content: Any, field: str) -> list[tuple[str, Any]]:
    if content is None:  # an assistant's message that only calls tools
        return []
    if isinstance(content, str):
        return [(field, {"type": "text", "text": content})]
    if not isinstance(content, (list, tuple)):
        message = f"is of type {type(content).__name__}; write a string or a list of parts."
        raise InvalidRequest(field, message, found=type(content).__name__, expected="a string or a list of parts")
    return [(f"{field}[{j}]", {"type": "text", "text": p} if isinstance(p, str) else p) for j, p in enumerate(content)]


def _read_part(part: Any, field: str) -> tuple[str | None, Any]:
    """(text, None) of a text part, (None, image) of the others."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in PART_TYPES:
        found = kind if isinstance(part, Mapping) else type(part).__name__
        message = f"parts of type {found!r} are not known; use one of {', '.join(PART_TYPES)}."
        raise InvalidRequest(field, message, found=found, expected=PART_TYPES)
    value = part.get(kind)
    if kind == "image" and value is None:
        value = part.get("path", part.get("url"))  # transformers' names
    if kind == "image_url" and isinstance(value, Mapping):
        value = value.get("url")
    if value is None or (kind in ("text", "image_url") and not isinstance(value, str)):
        message = f"this {kind} part has no usable {kind!r} (found {type(value).__name__}); add it."
        raise InvalidRequest(field, message, found=type(value).__name__)
    if kind == "text":
        return value, None
    if isinstance(value, str) and (kind == "image_url" or "://" in value or value[:5].lower() == "data:"):
        return None, _from_url(value, field)
    return None, value


def _from_url(url: str, field: str) -> bytes:
    """The bytes in a data: URL; other schemes are not fetched here."""
    header, comma, payload = url.partition(",")
    scheme = url.partition(":")[0].lower()
    if scheme != "data":
        message = f"URLs of scheme {scheme[:20]!r} are not supported here yet; send a data: URL, or the image itself."
        raise InvalidRequest(field, message, found=scheme[:20], expected="data")
    try:
        if not comma or not header.lower().endswith(";base64"):
            raise ValueError("it does not begin with data:<type>;base64,")
        blob = base64.b64decode(unquote_to_bytes(payload), validate=True)
        if not blob:
            raise ValueError("it holds 0 bytes")
    except ValueError as error:  # binascii.Error and UnicodeError too
        message = f"the data: URL cannot be decoded ({error}); send data:image/png;base64,… with the whole file."
        raise InvalidRequest(field, message, found=url[:40], expected="data:image/png;base64,…") from error
    return blob


def _joined(pieces: list[str | None], placeholder: str | Callable[[int], str], number: int) -> str:
    written = "\n".join(piece for piece in pieces if piece is not None)
    lines = []
    for piece in pieces:
        if piece is not None:
            lines.append(piece)
            continue
        mark = placeholder if isinstance(placeholder, str) else placeholder(number)
        number += 1
        if mark in written:  # the user placed this image already
            written = written.replace(mark, "", 1)
        else:
            lines.append(mark)
    return "\n".join(lines)
