"""Ready embeddings, as a user hands them over, to checked rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmfx.errors import InvalidRequest

FIELD = "multi_modal_data.image"
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def rows_of(value: Any, hidden_size: int) -> Tensor:
    """A tensor or array (rows, hidden) or (n, rows, hidden), or a list of them → (all rows, hidden) in float32.

    Raises InvalidRequest for another width or rank, for values that are not finite in float32, and for what is not a tensor."""
    parts = [_as_tensor(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
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


def _as_tensor(value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
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
