"""Ready embeddings, as a user hands them over, to checked rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlmfx.errors import InvalidRequest
from vlmfx.processing.inputs import MediaLayout

FIELD = "multi_modal_data.image"
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
Layout = TypeVar("Layout", bound=MediaLayout)


def rows_of(value: Any, hidden_size: int) -> Tensor:
    """A tensor or array (rows, hidden) or (n, rows, hidden), a list of them, or a list of rows of numbers → (all rows, hidden) in float32.

    Raises InvalidRequest for another width or rank, for values that are not finite in float32, and for what is not a tensor."""
    is_several = isinstance(value, (list, tuple)) and not _is_table(value)
    parts = [_as_tensor(v) for v in (value if is_several else [value])]
    for part in parts:
        if part.ndim not in (2, 3) or part.shape[-1] != hidden_size:
            raise InvalidRequest(
                FIELD,
                f"embeddings have shape {tuple(part.shape)}, expected (rows, {hidden_size}) or (images, rows, {hidden_size}); "
                "pass features that are projected to the language model's width.",
                found=tuple(part.shape),
                expected=hidden_size,
            )
        if not bool(torch.isfinite(part).all()):
            raise InvalidRequest(
                FIELD, "embeddings hold values that, in float32, are not finite; check what made them."
            )
    if not parts:
        return torch.empty(0, hidden_size)
    return torch.cat([part.reshape(-1, hidden_size).to(parts[0].device) for part in parts])


def joined(value: Any, read: Callable[[Any], tuple[Tensor, list[Layout]]]) -> tuple[Tensor, list[Layout]]:
    """The rows and layouts of embeddings that come as one item, or as a flat list of items, each of which `read` takes.

    Rows lie on the device of the first. Raises InvalidRequest for a list that is empty, or in another."""
    if not isinstance(value, (list, tuple)):
        return read(value)
    for number, item in enumerate(value):
        if isinstance(item, (list, tuple)):
            what = "a list in the list" if item else "an empty list"
            raise InvalidRequest(
                f"{FIELD}[{number}]", f"it is {what}; give the embeddings of each image, or leave it out."
            )
    if not value:
        raise InvalidRequest(FIELD, "it is an empty list; give the embeddings of each image.", found=0)
    parts = [read(item) for item in value]
    device = parts[0][0].device
    return torch.cat([rows.to(device) for rows, _ in parts]), [item for _, layouts in parts for item in layouts]


def _is_table(value: Any) -> bool:
    """Whether it is rows of numbers, as JSON has them."""
    return (
        bool(value) and isinstance(value[0], (list, tuple)) and all(isinstance(x, (int, float)) for x in value[0][:1])
    )


def _as_tensor(value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value, dtype=torch.float32 if isinstance(value, (list, tuple)) else None)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        tensor = None
    if tensor is None or not is_plain(tensor) or not tensor.is_floating_point():
        kind = type(value).__name__ if tensor is None else f"a tensor of {tensor.dtype}"
        if tensor is not None and not is_plain(tensor):
            kind += " that is sparse, nested or on the meta device"
        raise InvalidRequest(
            FIELD, f"embeddings are {kind}; pass a floating-point tensor.", found=kind, expected="tensor"
        )
    return tensor.float()


def integer_table(value: Any, columns: int) -> list[list[int]]:
    """The rows of a table of integers (n, columns), of which a single row may come alone; empty for anything else."""
    try:
        table = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return []
    if not is_plain(table) or table.dtype not in INTEGERS or table.shape[-1:] != (columns,):
        return []
    rows: list[list[int]] = table.reshape(-1, columns).tolist()
    return rows


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense and holds values."""
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta
