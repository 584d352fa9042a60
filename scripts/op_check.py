"""Whether what an op does at the sizes of real models is what its reference does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from op_cases import Args
from torch import Tensor

from vlmfx.ops.registry import Op

MAX_INTEGERS_OFF = 0.02  # of drawn tokens and ranks: ties and rounding may fall otherwise on a GPU


def outputs(op: Op, call: Callable[..., Any], args: Args) -> list[Tensor]:
    """What the call returns, and what it leaves in the arguments that the op writes."""
    returned = as_list(call(*args))
    arguments = op.overload._schema.arguments
    written = [a for a, s in zip(args, arguments, strict=True) if s.alias_info is not None and s.alias_info.is_write]
    return [*returned, *written]


def as_list(returned: Any) -> list[Tensor]:
    return [] if returned is None else [returned] if isinstance(returned, Tensor) else list(returned)


def difference(op: Op, got: Sequence[Tensor], expected: Sequence[Tensor], slack: float = 1.0) -> str | None:
    """What is wrong with outputs, None if they are the reference's within slack times the op's tolerance; NaN is always wrong."""
    for mine, right in zip(got, expected, strict=True):
        if mine.shape != right.shape or mine.dtype != right.dtype:
            return f"{tuple(mine.shape)} {mine.dtype} for {tuple(right.shape)} {right.dtype}"
        if not right.is_floating_point():
            off = (mine != right).float().mean().item() if right.numel() else 0.0
            if off > MAX_INTEGERS_OFF:
                return f"{off:.1%} of integers differ"
            continue
        if mine.isnan().any():
            return "NaN"
        tolerance = slack * op.tolerance.get(right.dtype, 0.0)
        if not torch.allclose(mine, right, rtol=tolerance, atol=tolerance):
            worst = (mine.float() - right.float()).abs().nan_to_num(0.0).max().item()
            return f"differs by {worst:.2g}"
    return None
