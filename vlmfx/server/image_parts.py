"""Parts of messages that name an image instead of holding it, and parts that give one a name: both get its file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from vlmfx.engine.fields import is_unicode
from vlmfx.errors import EngineFull, ImageNotFound, InvalidRequest, shown
from vlmfx.processing.images import image_size
from vlmfx.processing.inputs import MediaLayout
from vlmfx.processing.media import load_all
from vlmfx.processing.messages import Media, check_beside, value_of
from vlmfx.processing.prompt import Processor, check_count_of
from vlmfx.server.image_store import MAX_NAME_CHARS, ImageStore, StoredImage

KINDS = ("image", "image_url", "image_pil")  # of parts that a uuid may stand for, as in vLLM


class Named(NamedTuple):
    """A part that names an image: where it stands, its name, and the URL it holds, if it does."""

    message: int
    part: int
    name: str
    url: str | None
    field: str


def with_images(
    prompt: dict[str, Any],
    owner: bytes,
    store: ImageStore,
    processor: Processor,
    reading: Callable[[StoredImage], None],
) -> dict[str, Any]:
    """The prompt with the files of images in the places of their names.

    {"type": "image_ref", "id"} and a part of an image that has a `uuid` and nothing else take what is stored; one that has both puts
    it there, if there is room. reading is told of each image that is not to be dropped while the request runs. Raises
    InvalidRequest."""
    named = list(_named(prompt.get("messages")))
    if not named:
        return prompt
    check_count_of(processor, "image", len(named))
    fresh = [one for one in named if one.url is not None]
    blobs = load_all([Media("image_url", one.url, one.field) for one in fresh], processor.media)
    found: dict[Named, bytes] = {}
    for one, blob in zip(fresh, blobs, strict=True):
        found[one] = blob
        if store.takes(len(blob)):
            with suppress(EngineFull):  # the request has all that it needs
                stored(blob, one.field, owner, store, processor, name=one.name)
    messages = list(prompt["messages"])
    for one in named:
        if one.url is None:
            image = store.find(owner, one.name, reads=True)
            if image is None:
                message = f"there is no image {shown(one.name)}, or no more; send it again."
                raise ImageNotFound(one.field, message, found=one.name)
            reading(image)
            found[one] = image.blob
        content = list(messages[one.message]["content"])
        content[one.part] = {"type": "image", "image": found[one]}
        messages[one.message] = {**messages[one.message], "content": content}
    return {**prompt, "messages": messages}


def stored(
    blob: bytes, field: str, owner: bytes, store: ImageStore, processor: Processor, name: str | None = None
) -> StoredImage:
    """The image of a file whose header is good, in the store. Raises InvalidRequest and EngineFull."""
    height, width = image_size(blob, field=field, max_pixels=processor.media.max_image_pixels)
    try:
        layout: MediaLayout = processor.functions.layout(processor.config, (height, width))
    except InvalidRequest as error:
        raise InvalidRequest(field, error.message, found=error.found, expected=error.expected) from None
    return store.put(owner, blob, width=width, height=height, num_tokens=layout.num_rows, name=name)


def _named(messages: Any) -> Iterator[Named]:
    """Parts that name an image; what is no message or part is left for others to refuse. Raises InvalidRequest for names that are none."""
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(part, dict):
                continue
            kind, field = part.get("type"), f"messages[{i}].content[{j}]"
            if kind == "image_ref":
                yield Named(i, j, _name(part.get("id"), f"{field}.id"), None, f"{field}.id")
            elif kind in KINDS and part.get("uuid") is not None:
                value = value_of(part, kind)
                url = value.get("url") if isinstance(value, dict) else value
                if url is None or isinstance(url, str):
                    check_beside(value.get("detail") if isinstance(value, dict) else None, None, field)
                    name = _name(part["uuid"], f"{field}.uuid")
                    yield Named(i, j, name, url, f"{field}.uuid" if url is None else field)


def _name(value: Any, field: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME_CHARS or not is_unicode(value):
        expected = f"a string of 1 to {MAX_NAME_CHARS} characters"
        raise InvalidRequest(field, f"it is {shown(value)}; give {expected}.", found=value, expected=expected)
    return value
