"""Every error that vlmfx raises on purpose; each message is one sentence that ends in what to do next.

VlmfxError
├── InvalidRequest      a prompt, image or parameter of one request; carries field, found, expected
├── BatchError          some requests of a batch failed; carries the outputs of all
├── InternalError       a request failed by a fault of ours
├── CheckpointError     a folder or hub id that cannot be loaded
│   └── UnsupportedModel    its architecture is not one of ours
├── ShapeError          an op or model function was called with tensors that do not fit
└── DeviceError         a device that is unknown or not present
"""

from __future__ import annotations

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
        return _invalid_request, (self.field, self.message, self.found, self.expected)


class CheckpointError(VlmfxError):
    """A checkpoint is missing something, or holds something that does not fit its config."""


class UnsupportedModel(CheckpointError):
    """The checkpoint's architecture is not implemented here."""


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


def _invalid_request(field: str, message: str, found: Any, expected: Any) -> InvalidRequest:
    """Unpickles an InvalidRequest, whose arguments are keywords in part."""
    return InvalidRequest(field, message, found=found, expected=expected)
