"""Every error that vlmfx raises on purpose; each message is one sentence that ends in what to do next.

VlmfxError
├── InvalidRequest      a prompt, image or parameter of one request; carries field, found, expected
│   ├── ModelNotFound       it names a model that is not served
│   └── ImageNotFound       it names an image that is not stored
├── BatchError          some requests of a batch failed; carries the outputs of all
├── InternalError       a request failed by a fault of ours
├── DeadlineExceeded    a request that was not done in its time
├── EngineFull          more requests wait than may, or none are taken any more
├── CheckpointError     a folder or hub id that cannot be loaded
│   └── UnsupportedModel    its architecture is not one of ours
├── PlanError           a plan of compiled sizes that is not sound, or a step that it has no bucket for
├── CompileError        a function that cannot be made a program as asked, or a program called otherwise than it was lowered
├── ShapeError          an op or model function was called with tensors that do not fit
└── DeviceError         a device that is unknown or not present
"""

from __future__ import annotations

import logging
import re
import reprlib
from typing import Any


class VlmfxError(Exception):
    """Base of all errors below."""


class InvalidRequest(VlmfxError):
    """One request cannot be served as written; others of the same batch are not affected.

    field names the argument ("multi_modal_data.image", "temperature"); found and expected say what it held and what
    fits.
    """

    def __init__(self, field: str, message: str, *, found: Any = None, expected: Any = None) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
        self.found = found
        self.expected = expected

    def __reduce__(self) -> tuple[Any, ...]:
        return _invalid_request, (type(self), self.field, self.message, self.found, self.expected)


class ModelNotFound(InvalidRequest):
    """A request names a model that is not the one that is served."""


class ImageNotFound(InvalidRequest):
    """A request names an image that is not stored, or not for whoever asks."""


class CheckpointError(VlmfxError):
    """A checkpoint is missing something, or holds something that does not fit its config."""


class UnsupportedModel(CheckpointError):
    """The checkpoint's architecture is not implemented here."""


class PlanError(VlmfxError):
    """A plan that is not sound, or a step whose size it does not cover: nothing is compiled for it while serving."""


class CompileError(VlmfxError):
    """A function that cannot be made a program as asked, or a program that was called otherwise than it was lowered."""


class ShapeError(VlmfxError):
    """Tensors that do not fit together, found before any compute."""


class DeviceError(VlmfxError):
    """A device that is not known or not present on this machine."""


class BatchError(VlmfxError):
    """Some requests of a batch failed, raised with on_error="raise" once the others are done; outputs holds every result."""

    def __init__(self, message: str, outputs: list[Any]) -> None:
        super().__init__(message, outputs)
        self.message = message
        self.outputs = outputs

    def __str__(self) -> str:
        return self.message


class InternalError(VlmfxError):
    """A request failed by a fault of ours, not of the request; `__cause__` is the exception."""


class DeadlineExceeded(VlmfxError):
    """A request was not done by its deadline."""


class EngineFull(VlmfxError):
    """An engine takes no more requests now."""


class _Repr(reprlib.Repr):
    """Repr that cuts, and names the type of what has no repr of its own, without its address."""

    def repr_instance(self, x: Any, level: int) -> str:
        try:
            text = repr(x)
        except Exception:
            text = " at 0x"
        return f"<{type(x).__name__}>" if " at 0x" in text else text[: self.maxother]


def shown(value: object, limit: int = 80) -> str:
    """A user's value for a message: one line of repr, at most `limit` characters long, whatever the value is.

    It cannot fail: neither 10**5000, nor a list that holds itself, nor a broken __repr__ hides the error that it is part of."""
    short = _Repr()
    short.maxstring = short.maxlong = short.maxother = limit
    try:
        text = " ".join(line.strip() for line in short.repr(value).splitlines())
    except Exception:
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 1] + "…"


_PRIVATE = re.compile(
    r"""\[Errno\ -?\d+\]\s*
    | (?::\s*)? <[^<>]*\ object(?:\ at\ 0x[0-9a-fA-F]+)?>      # what a repr says of an object
    | (?::\s*)? <_io\.[^<>]*>
    | (?:\ at)? \ 0x[0-9a-fA-F]{6,}
    | :\s* '<none>'
    | (?::\s*)? (?P<quote>['"]) (?:/|[A-Za-z]:\\) [^'"]+ (?P=quote)
    | (?<![\w:/.<]) (?:/[^\s/'"(),;]+){2,}/? """,
    re.VERBOSE,
)


def reason_of(error: BaseException, limit: int = 200) -> str:
    """Why a library failed, for a message: its first line as part of a sentence, without memory addresses, Errno numbers and paths.

    It cannot fail and is never empty: what says nothing is told by its type."""
    try:
        lines = str(error)[:4000].strip().splitlines() or [""]
    except Exception:
        lines = [""]
    text = " ".join(_PRIVATE.sub("", lines[0]).split())
    text = re.sub(r"[.!?]+ (?=\S)", "; ", text).rstrip(".:,; ")
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return text or type(error).__name__


def _invalid_request(kind: type[InvalidRequest], field: str, message: str, found: Any, expected: Any) -> InvalidRequest:
    """Unpickles an InvalidRequest, whose arguments are keywords in part."""
    return kind(field, message, found=found, expected=expected)


def as_vlmfx_error(error: Exception, doing: str) -> VlmfxError:
    """The error itself if it is one of ours; else an InternalError that it caused, logged with its traceback."""
    if isinstance(error, VlmfxError):
        return error
    logging.getLogger("vlmfx").error(doing, exc_info=error)
    failure = InternalError(f"{doing} ({type(error).__name__}: {error}); please report it with the log's traceback.")
    failure.__cause__ = error
    return failure
