"""OpenAI-style chat messages as a template wants them, and the images and videos they carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmfx.errors import InvalidRequest

# Type of a part → what it is for the model.
MODALITIES = {
    "image": "image", "image_url": "image", "image_embeds": "image", "image_pil": "image", "video": "video", "video_url": "video",
}  # fmt: skip
PART_TYPES = ("text", *MODALITIES)


@dataclass(frozen=True)
class Media:
    """One image or video as its part holds it: the part's type, its value, and where it stands ("messages[0].content[1]")."""

    kind: str
    value: Any
    field: str

    @property
    def modality(self) -> str:
        """ "image" or "video"."""
        return MODALITIES[self.kind]


def messages_for_template(
    messages: Sequence[Mapping[str, Any]], takes_parts: bool, placeholders: Mapping[str, str]
) -> tuple[list[dict[str, Any]], list[Media]]:
    """(messages as the template wants them, the media they carry in order, nothing of it read yet).

    A parts template gets lists of {"type": "image"}, {"type": "video"} and {"type": "text", "text": ...}; a string template gets
    text, the pieces joined by newlines, each image or video as its placeholder unless the message's text already writes it.
    placeholders: modality → text, in which "{number}" is the medium's number in the conversation, from 1; a modality that is not
    in it is refused. Raises InvalidRequest.
    """
    media: list[Media] = []
    out: list[dict[str, Any]] = []
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise InvalidRequest("messages", "a list of at least one message is expected; give one.", found=messages)
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            expected = '{"role": ..., "content": ...}'
            raise InvalidRequest(f"messages[{i}]", f"is not a message; write {expected}.", expected=expected)
        pieces = [_read_part(part, field) for field, part in _parts(message.get("content"), f"messages[{i}].content")]
        if takes_parts:
            parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p.modality} for p in pieces]
            _marks(pieces, media, placeholders)
            out.append({**message, "content": parts})
        else:
            out.append({**message, "content": _joined(pieces, _marks(pieces, media, placeholders))})
        media += [piece for piece in pieces if isinstance(piece, Media)]
    return out, media


def _parts(content: Any, field: str) -> list[tuple[str, Any]]:
    if content is None:  # an assistant's message that only calls tools
        return []
    if isinstance(content, str):
        return [(field, {"type": "text", "text": content})]
    if not isinstance(content, (list, tuple)):
        message = f"is of type {type(content).__name__}; write a string or a list of parts."
        raise InvalidRequest(field, message, found=type(content).__name__, expected="a string or a list of parts")
    return [(f"{field}[{j}]", {"type": "text", "text": p} if isinstance(p, str) else p) for j, p in enumerate(content)]


def _read_part(part: Any, field: str) -> str | Media:
    """The text of a text part, the Media of the others."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in PART_TYPES:
        found = kind if isinstance(part, Mapping) else type(part).__name__
        message = f"parts of type {str(found)[:40]!r} are not known; use one of {', '.join(PART_TYPES)}."
        raise InvalidRequest(field, message, found=found, expected=PART_TYPES)
    value = part.get(kind)
    if kind in ("image", "video") and value is None:
        value = part.get("path", part.get("url"))  # transformers' names
    if kind.endswith("_url") and isinstance(value, Mapping):
        value = value.get("url")
    if value is None or ((kind == "text" or kind.endswith("_url")) and not isinstance(value, str)):
        message = f"this {kind} part has no usable {kind!r} (found {type(value).__name__}); add it."
        raise InvalidRequest(field, message, found=type(value).__name__)
    return str(value) if kind == "text" else Media(kind, value, field)


def _marks(pieces: Sequence[str | Media], before: Sequence[Media], placeholders: Mapping[str, str]) -> list[str]:
    """The placeholder of each medium of a message, numbered on from those before it."""
    counts = {modality: sum(m.modality == modality for m in before) for modality in placeholders}
    marks = []
    for piece in pieces:
        if isinstance(piece, Media):
            if piece.modality not in counts:
                known = " and ".join(f"{modality}s" for modality in placeholders)
                message = f"this model takes no {piece.modality}; send it {known or 'text'} only."
                raise InvalidRequest(piece.field, message, found=piece.kind, expected=tuple(placeholders))
            counts[piece.modality] += 1
            marks.append(placeholders[piece.modality].replace("{number}", str(counts[piece.modality])))
    return marks


def _joined(pieces: Sequence[str | Media], marks: Sequence[str]) -> str:
    written = "\n".join(piece for piece in pieces if isinstance(piece, str))
    lines, remaining = [], iter(marks)
    for piece in pieces:
        if isinstance(piece, str):
            lines.append(piece)
            continue
        mark = next(remaining)
        if mark in written:  # the user placed this one already
            written = written.replace(mark, "", 1)
        else:
            lines.append(mark)
    return "\n".join(lines)
