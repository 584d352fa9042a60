"""Ready embeddings from files: safetensors or npy, as bytes, base64 or a path. Nothing is ever unpickled."""

from __future__ import annotations

import base64
import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors.torch import load as load_safetensors
from torch import Tensor

from vlmfx.errors import InvalidRequest, reason_of

SUFFIXES = (".safetensors", ".npy")
PICKLES = (b"PK", b"\x80")  # what torch.save, npz and pickle files begin with
EXPECTED = "a safetensors or npy file"
MAX_TENSORS = 8  # in a safetensors file; no family takes more than three


def from_base64(text: str, field: str, max_bytes: int) -> bytes:
    """The bytes of a base64 text, at most max_bytes. Raises InvalidRequest."""
    if len(text) > max_bytes * 4 // 3 + 4:
        message = f"the text holds more than {max_bytes} bytes; send a smaller file."
        raise InvalidRequest(field, message, found=len(text), expected=max_bytes)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        message = f"the text is not base64 ({reason_of(error)}); send {EXPECTED} in base64."
        raise InvalidRequest(field, message, found=text[:40], expected=EXPECTED) from None


def read_files(value: Any, field: str) -> Any:
    """multi_modal_data["image"] with its safetensors and npy files read: paths by their suffix, in a dict also bytes; the rest as it is."""
    if isinstance(value, (list, tuple)):
        return [item if isinstance(item, (list, tuple)) else _read_item(item, field) for item in value]
    return _read_item(value, field)


def _read_item(value: Any, field: str) -> Any:
    if isinstance(value, dict):
        return {
            key: read(v, f"{field}.{key}") if isinstance(v, bytes) or _is_path(v) else v for key, v in value.items()
        }
    return read(value, field) if _is_path(value) else value


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and os.fspath(value).endswith(SUFFIXES)


def read(source: bytes | bytearray | memoryview | str | os.PathLike[str], field: str) -> Tensor | dict[str, Tensor]:
    """The tensor in a file, given as its bytes or path; those of a safetensors file with several, by name. Raises InvalidRequest."""
    try:
        if isinstance(source, (str, os.PathLike)):
            if not Path(source).is_file():
                message = f"{str(source)[:200]!r} is not a file; give the path of {EXPECTED}."
                raise InvalidRequest(field, message, found=str(source)[:200])
            source = Path(source).read_bytes()
        blob = bytes(source)
        if blob.startswith(PICKLES):
            message = "it is a pickle or zip file, which can run code when opened and is never read; "
            raise InvalidRequest(field, f"{message}save the tensor as {EXPECTED}.", expected=EXPECTED)
        if blob.startswith(npy.MAGIC_PREFIX):
            return _read_npy(blob)
        tensors: dict[str, Any] = load_safetensors(blob)
    except InvalidRequest:
        raise
    except Exception as error:  # safetensors raises its own type, numpy's header reader almost any
        message = f"it is not {EXPECTED} ({reason_of(error)}); send a whole one."
        raise InvalidRequest(field, message, expected=EXPECTED) from None
    if not tensors:
        raise InvalidRequest(field, "the file holds no tensor; put one there.", expected=EXPECTED)
    if len(tensors) > MAX_TENSORS:
        message = f"the file holds {len(tensors)} tensors, expected at most {MAX_TENSORS}; send those of one request."
        raise InvalidRequest(field, message, found=len(tensors), expected=MAX_TENSORS)
    return next(iter(tensors.values())) if len(tensors) == 1 else tensors


def _read_npy(blob: bytes) -> Tensor:
    """The array of an npy file: numbers of the size that its header claims, which numpy itself would allocate first."""
    file = io.BytesIO(blob)
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy version {version} is not known")
    shape, is_fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
    if dtype.kind not in "fiu" or dtype.itemsize > 8:
        raise ValueError(f"its values are of type {str(dtype)[:40]}, not numbers")
    at, expected = file.tell(), math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or len(blob) - at != expected:
        raise ValueError(f"its header asks for {expected} bytes but {len(blob) - at} follow")
    values = np.frombuffer(blob, dtype, offset=at).reshape(shape, order="F" if is_fortran else "C")
    native = dtype.newbyteorder("=")
    return torch.from_numpy(
        np.array(values, {"u2": "i4", "u4": "i8", "u8": "i8"}.get(native.str[1:], native), order="C")
    )
