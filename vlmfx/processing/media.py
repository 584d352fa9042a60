"""What an image or video of a chat message stands for: URLs are fetched, by a policy; all else is the caller's own and passes.

data: URLs are decoded, http and https ones fetched from public addresses (web.py), file: ones read below one folder, if any."""

from __future__ import annotations

import base64
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from torch import Tensor

from vlmfx.errors import InvalidRequest, reason_of
from vlmfx.processing import embed_files, web
from vlmfx.processing.images import MAX_PIXELS
from vlmfx.processing.messages import Media
from vlmfx.processing.video import MAX_FRAMES

JPEG_FRAMES = "data:video/jpeg;base64,"  # vLLM's form of a video: its frames' base64, with commas between them
SCHEMES = ("data", "http", "https", "file")
SCHEME = re.compile(r"(data:|[A-Za-z][A-Za-z0-9+.-]*://)", re.ASCII | re.IGNORECASE)


def _seconds(variables: Iterable[str], default: float) -> float:
    """The first of the environment's variables that is set. Raises InvalidRequest for one that is no time."""
    for name in variables:
        text = os.environ.get(name)
        if text:
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not 0 < value < 86400:
                raise InvalidRequest(name, f"it is {text[:40]!r}; set a number of seconds above 0.", found=text[:40])
            return value
    return default


def _image_timeout() -> float:
    return _seconds(("VLMFX_IMAGE_FETCH_TIMEOUT", "VLLM_IMAGE_FETCH_TIMEOUT"), 5.0)


def _video_timeout() -> float:
    return _seconds(("VLMFX_VIDEO_FETCH_TIMEOUT", "VLLM_VIDEO_FETCH_TIMEOUT"), 30.0)


@dataclass(frozen=True, kw_only=True)
class MediaPolicy:
    """What may be fetched and read for a request, and how much of it.

    allowed_local_media_path: the folder below which file: URLs may lie; None allows none. allowed_media_domains: the only hosts to
    fetch from; None allows every public one. private_media_hosts: "HOST" or "HOST:PORT" that may have a private address.
    allow_paths: whether plain paths in parts, and of chat templates, are opened: they are the caller's own offline, and a client's
    in a server, which says False. The timeouts are of a whole transfer, name look-up and redirects included; max_total_s and
    max_total_bytes are of all media of a prompt, max_image_pixels of one image or frame. on_fetch(scheme, seconds, is_refused) is told
    of each URL, from the thread that fetches; on_bytes(number) of bytes as they come from a host or a file, and what it raises ends
    the fetch."""

    allowed_local_media_path: str | Path | None = None
    allowed_media_domains: tuple[str, ...] | None = None
    private_media_hosts: tuple[str, ...] = ()
    allow_paths: bool = True
    timeout_s: float = field(default_factory=_image_timeout)
    video_timeout_s: float = field(default_factory=_video_timeout)
    max_bytes: int = 128 * 2**20
    max_redirects: int = 5
    max_total_s: float = 120.0
    max_total_bytes: int = 2**30
    max_image_pixels: int = MAX_PIXELS
    on_fetch: Callable[[str, float, bool], None] | None = None
    on_bytes: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        folder = self.allowed_local_media_path or None  # vLLM's default is ""
        if folder is not None and not os.path.isdir(folder):
            message = f"{str(folder)[:200]!r} is not a folder; give the one that file: URLs may lie in."
            raise InvalidRequest("allowed_local_media_path", message, found=str(folder)[:200])
        object.__setattr__(self, "allowed_local_media_path", folder)
        if self.allowed_media_domains is not None:
            domains = _names("allowed_media_domains", self.allowed_media_domains, with_port=False)
            object.__setattr__(self, "allowed_media_domains", domains or None)
        hosts = _names("private_media_hosts", self.private_media_hosts, with_port=True)
        object.__setattr__(self, "private_media_hosts", hosts)


def _names(option: str, value: Any, *, with_port: bool) -> tuple[str, ...]:
    """Host names as URLs' are compared, from a list or a text with commas. Raises InvalidRequest for what cannot be one."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple, set, frozenset)) or not all(isinstance(item, str) for item in items):
        message = f"it is a {type(value).__name__}; give a list of host names."
        raise InvalidRequest(option, message, found=value)
    return tuple(_name(option, item.strip(), with_port) for item in items if item.strip())


def _name(option: str, text: str, with_port: bool) -> str:
    """One host in the spelling that a URL's host gets, "HOST" or "HOST:PORT"."""
    bare = re.fullmatch(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f.]*", text)  # IPv6 without brackets
    try:
        place = web.parse(f"http://[{text}]/" if bare else f"http://{text}/")
        has_port = not bare and re.search(r":\d+$", text) is not None
        if place.target == "/" and (with_port or not has_port):
            return place.netloc if has_port else place.host
    except web.Refused:
        pass
    port = "or host:port " if with_port else ""
    expected = f"host names {port}without scheme, path{' or' if with_port else ', port or'} *"
    raise InvalidRequest(option, f"it holds {text[:80]!r}; give {expected}.", found=text, expected=expected)


def load_all(items: Sequence[Media], policy: MediaPolicy) -> list[Any]:
    """`load` of each. Raises InvalidRequest also where together they take too long or hold too much, before more is fetched."""
    values: list[Any] = []
    end, left = time.monotonic() + policy.max_total_s, policy.max_total_bytes
    for item in items:
        seconds = end - time.monotonic()
        if seconds <= 0 or left <= 0:
            what = f"{policy.max_total_bytes} bytes" if left <= 0 else f"{policy.max_total_s:g} s to fetch"
            raise InvalidRequest(
                item.field, f"the media of this prompt take more than {what}; send fewer or smaller ones."
            )
        rest = replace(
            policy,
            timeout_s=min(policy.timeout_s, seconds),
            video_timeout_s=min(policy.video_timeout_s, seconds),
            max_bytes=min(policy.max_bytes, left),
            max_total_s=seconds,
            max_total_bytes=left,
        )
        values.append(load(item, rest))
        left -= _num_bytes(values[-1])
    return values


def _num_bytes(value: Any, levels: int = 2) -> int:
    """Of files and tensors, also in lists and dicts, as deep as any legal form has them: a list may hold itself."""
    if isinstance(value, (list, tuple, dict)):
        items = (value.values() if isinstance(value, dict) else value) if levels else ()
        return sum(_num_bytes(item, levels - 1) for item in items)
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return len(value) if isinstance(value, bytes) else 0


def load(item: Media, policy: MediaPolicy) -> Any:
    """What multi_modal_data would hold for a part: bytes of a URL, embeddings that are read, else the part's own value.

    Raises InvalidRequest, which tells of addresses and paths no more than the request itself does."""
    if item.kind == "image_embeds" and isinstance(item.value, dict):
        return {
            key: load(Media(item.kind, value, f"{item.field}.{key}"), policy) if _is_file(value) else value
            for key, value in item.value.items()
        }
    value = item.value
    if item.modality == "video":
        if isinstance(value, str) and value[: len(JPEG_FRAMES)].lower() == JPEG_FRAMES:
            header, _, frames = value.partition(",")
            _check_frames(frames.count(",") + 1, item.field)  # before they are taken apart: each piece takes memory
            value = [f"{header},{frame}" for frame in frames.split(",")]
        if isinstance(value, (list, tuple)):  # frames, each of them an image
            if any(isinstance(frame, str) for frame in value):
                _check_frames(len(value), item.field)
            return load_all([Media("image", frame, f"{item.field}[{i}]") for i, frame in enumerate(value)], policy)
    if item.kind.endswith("_url") or (isinstance(value, str) and SCHEME.match(value)):
        value = fetch(str(value), policy, item.field, video=item.modality == "video")
    elif item.kind == "image_embeds" and isinstance(value, str) and not value.endswith(embed_files.SUFFIXES):
        value = embed_files.from_base64(value, item.field, policy.max_bytes)
    elif isinstance(value, (str, os.PathLike)) and not policy.allow_paths:
        raise InvalidRequest(
            item.field, "it is a path, which is not read here; send a URL, or the file in a data: URL."
        )
    return embed_files.read(value, item.field) if item.kind == "image_embeds" and _is_file(value) else value


def _check_frames(count: int, field: str) -> None:
    """Raise InvalidRequest for more frames to read than any video may have."""
    if count > MAX_FRAMES:
        message = f"it has {count} frames to read, expected at most {MAX_FRAMES}; send fewer."
        raise InvalidRequest(field, message, found=count, expected=MAX_FRAMES)


def _is_file(value: Any) -> bool:
    return isinstance(value, (str, bytes, bytearray, memoryview, os.PathLike))


def fetch(url: str, policy: MediaPolicy, field: str, *, video: bool = False) -> bytes:
    """The bytes behind a data:, http, https or file: URL. Raises InvalidRequest."""
    scheme = url.partition(":")[0].lower() if ":" in url[:40] else ""
    start, is_refused = time.perf_counter(), True
    try:
        blob = _fetched(scheme, url, policy, field, video)
        is_refused = False
        return blob
    finally:
        if policy.on_fetch is not None:
            known = scheme if scheme in SCHEMES else "other"
            policy.on_fetch(known, time.perf_counter() - start, is_refused)


def _fetched(scheme: str, url: str, policy: MediaPolicy, field: str, video: bool) -> bytes:
    if scheme == "data":
        return _decode(url, policy, field)
    if scheme == "file":
        return _read_below(url, policy, field)
    if scheme in ("http", "https"):
        try:
            return web.get(url, policy, policy.video_timeout_s if video else policy.timeout_s)
        except web.Refused as refused:
            raise InvalidRequest(field, f"the URL cannot be fetched: {refused}.", found=url[:80]) from None
    what = f"URLs of scheme {scheme[:20]!r} are not fetched" if scheme else "it is no URL"
    message = f"{what}; send an http, https or data: URL, or the image itself."
    raise InvalidRequest(field, message, found=scheme[:20], expected=SCHEMES)


def _decode(url: str, policy: MediaPolicy, field: str) -> bytes:
    """The bytes in a data: URL."""
    header, comma, payload = url.partition(",")
    if len(payload) > policy.max_bytes * 4 // 3 + 4:
        message = f"the data: URL holds more than {policy.max_bytes} bytes; send a smaller file."
        raise InvalidRequest(field, message, found=len(payload), expected=policy.max_bytes)
    try:
        if not comma or not header.lower().endswith(";base64"):
            raise ValueError("it does not begin with data:<type>;base64,")
        blob = base64.b64decode(unquote_to_bytes(payload), validate=True)
        if not blob:
            raise ValueError("it holds 0 bytes")
    except ValueError as error:  # binascii.Error and UnicodeError too
        message = (
            f"the data: URL cannot be decoded ({reason_of(error)}); send data:image/png;base64,… with the whole file."
        )
        raise InvalidRequest(field, message, found=url[:40], expected="data:image/png;base64,…") from error
    return blob


def _read_below(url: str, policy: MediaPolicy, field: str) -> bytes:
    """The bytes of a regular file below allowed_local_media_path, links resolved.

    One answer to all that lies outside or is not there, so that nobody learns from it what exists."""

    def refuse(why: str) -> NoReturn:
        raise InvalidRequest(field, why, found=url[:80])

    if policy.allowed_local_media_path is None:
        refuse("file: URLs are not allowed here; send the image itself, or set allowed_local_media_path to its folder.")
    missing = "this file: URL names no readable file below allowed_local_media_path; correct its path."
    try:
        parts = urlsplit(url)
        path = unquote(parts.path, errors="strict")
        if parts.netloc.lower() not in ("", "localhost") or parts.query or parts.fragment or not path.startswith("/"):
            refuse("this file: URL is not of the form file:///path; percent-encode ? and # in its path.")
        if "\0" in path or "\\" in url or ".." in path.split("/"):
            refuse(missing)
        root = os.path.realpath(policy.allowed_local_media_path)
        inside = Path(os.path.realpath(path)).relative_to(root).parts
        blob = _read_regular(root, inside, policy.max_bytes)
    except (OSError, ValueError):
        refuse(missing)
    if len(blob) > policy.max_bytes:
        refuse(f"the file holds more than {policy.max_bytes} bytes; send a smaller one.")
    if policy.on_bytes is not None:
        policy.on_bytes(len(blob))
    return blob


def _read_regular(root: str, inside: tuple[str, ...], max_bytes: int) -> bytes:
    """At most max_bytes + 1 of a regular file; each step from root is opened without following links, lest one was put there since."""
    if not inside:
        raise FileNotFoundError
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in inside[:-1]:
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = below
        # O_NONBLOCK: opening a pipe would wait for its writer.
        file = os.open(inside[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)
    with open(file, "rb") as handle:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise FileNotFoundError
        return handle.read(max_bytes + 1)
