"""OpenAI-style chat messages as a template wants them, and the images and videos they carry."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from vlmfx.errors import InvalidRequest, shown

# Type of a part → what it is for the model.
MODALITIES = {
    "image": "image", "image_url": "image", "image_embeds": "image", "image_pil": "image", "video": "video", "video_url": "video",
}  # fmt: skip
TEXTS = {"text": "text", "input_text": "text", "refusal": "refusal"}  # OpenAI's types of text → the key that holds it
# OpenAI's and vLLM's words beside a medium. The first says how many tokens it may take, which mm_processor_kwargs do here; the second
# names it for a cache, which here goes by content.
DETAILS = ("auto", "low", "high", "original")
PART_TYPES = ("text", *MODALITIES, "input_text", "refusal")


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
    messages: Sequence[Mapping[str, Any]],
    takes_parts: bool,
    placeholders: Mapping[str, str],
    check: Callable[[Sequence[Media]], None] | None = None,
) -> tuple[list[dict[str, Any]], list[Media]]:
    """(messages as the template wants them, the media they carry in order, nothing of it read yet).

    A parts template gets lists of {"type": "image"}, {"type": "video"} and {"type": "text", "text": ...}; a string template gets
    text, the pieces joined by newlines, each image or video as its placeholder unless the message's text already writes it.
    placeholders: modality → text, in which "{number}" is the medium's number in the conversation, from 1; a modality that is not
    in it is refused. check is called with the media before a text is put together, to refuse too many. Raises InvalidRequest.
    """
    media: list[Media] = []
    read: list[tuple[Mapping[str, Any], list[str | Media]]] = []
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise InvalidRequest("messages", "a list of at least one message is expected; give one.", found=messages)
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            expected = '{"role": ..., "content": ...}'
            raise InvalidRequest(f"messages[{i}]", f"is not a message; write {expected}.", expected=expected)
        pieces = [_read_part(part, field) for field, part in _parts(message.get("content"), f"messages[{i}].content")]
        read.append((message, pieces))
        media += [piece for piece in pieces if isinstance(piece, Media)]
    _check_modalities(media, placeholders)
    if check is not None:
        check(media)
    marks = _marks(media, placeholders)
    written = re.compile("|".join(_mark_pattern(text) for text in placeholders.values()) or r"(?!)")
    out: list[dict[str, Any]] = []
    for message, pieces in read:
        if takes_parts:
            parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p.modality} for p in pieces]
            out.append({**message, "content": parts})
        else:
            out.append({**message, "content": _joined(pieces, marks, written)})
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
    kind = _kind_of(part) if isinstance(part, Mapping) else None
    if kind not in PART_TYPES:
        found = kind if isinstance(part, Mapping) else type(part).__name__
        message = f"parts of type {shown(found)} are not known; use one of {', '.join(PART_TYPES)}."
        raise InvalidRequest(field, message, found=found, expected=PART_TYPES)
    value = value_of(part, kind)
    if kind.endswith("_url") and isinstance(value, Mapping):
        check_beside(value.get("detail"), part.get("uuid"), field)
        value = value.get("url")
    if value is None or ((kind in TEXTS or kind.endswith("_url")) and not isinstance(value, str)):
        message = f"this {kind} part has no usable {TEXTS.get(kind, kind)!r} (found {type(value).__name__}); add it."
        raise InvalidRequest(field, message, found=type(value).__name__)
    return str(value) if kind in TEXTS else Media(kind, value, field)


def value_of(part: Mapping[str, Any], kind: str) -> Any:
    """What a part of this type holds, None if nothing."""
    value = part.get(TEXTS.get(kind, kind))
    if kind in ("image", "video") and value is None:
        value = part.get("path", part.get("url"))  # transformers' names
    return value


def check_beside(detail: Any, uuid: Any, field: str) -> None:
    """Raise InvalidRequest for what cannot be meant by them; what can be changes nothing."""
    if detail is not None and detail not in DETAILS:
        message = f"it is {shown(detail)}; use one of {', '.join(DETAILS)}."
        raise InvalidRequest(f"{field}.detail", message, found=detail, expected=DETAILS)
    if uuid is not None and not isinstance(uuid, str):
        raise InvalidRequest(f"{field}.uuid", f"it is {shown(uuid)}; write a string, or leave it out.", found=uuid)


def _kind_of(part: Mapping[str, Any]) -> Any:
    """A part's type; where it says none, that of the one key it has that holds a text or a medium."""
    named = [kind for kind in dict.fromkeys((*TEXTS.values(), *MODALITIES)) if kind in part]
    return named[0] if part.get("type") is None and len(named) == 1 else part.get("type")


def _check_modalities(media: Sequence[Media], placeholders: Mapping[str, str]) -> None:
    for item in media:
        if item.modality not in placeholders:
            known = " and ".join(f"{modality}s" for modality in placeholders)
            message = f"this model takes no {item.modality}; send it {known or 'text'} only."
            raise InvalidRequest(item.field, message, found=item.kind, expected=tuple(placeholders))


def _marks(media: Sequence[Media], placeholders: Mapping[str, str]) -> Iterator[str]:
    """The placeholder of each medium of a conversation, numbered by modality."""
    numbers = {modality: count(1) for modality in placeholders}
    for item in media:
        yield placeholders[item.modality].replace("{number}", str(next(numbers[item.modality])))


def _mark_pattern(placeholder: str) -> str:
    return "[0-9]+".join(re.escape(part) for part in placeholder.split("{number}"))


def _joined(pieces: Sequence[str | Media], marks: Iterator[str], pattern: re.Pattern[str]) -> str:
    """A message's pieces as lines; its media take the next of marks, and no line where the text writes theirs already.

    The text is scanned once, whatever the number of media."""
    written = Counter(m.group() for piece in pieces if isinstance(piece, str) for m in pattern.finditer(piece))
    lines = []
    for piece in pieces:
        if isinstance(piece, str):
            lines.append(piece)
            continue
        mark = next(marks)
        if written[mark]:  # the user placed this one already
            written[mark] -= 1
        else:
            lines.append(mark)
    return "\n".join(lines)
