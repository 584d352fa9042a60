"""Gated activations in Triton. One flat grid over the elements of the output, as in triton/activation.py: both halves of a row are read
once, the product written once. Memory limits it.

Tail: lanes beyond the last element, in the last program, are masked. Halves of 3420, as in Qwen2.5-VL's vision tower, are read and
written 8 bytes at a time, as only every second row of them starts at a multiple of 16."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfx.ops.triton.activation import BLOCK, activate
from vlmfx.ops.triton.rows import rows_of, start_of


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    """As the contract; rows may lie at two strides, elements of a row side by side."""
    width, rows = gate_up.shape[-1] // 2, rows_of(gate_up)
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        _kernel[(triton.cdiv(out.numel(), BLOCK),)](
            rows.tensor, out, rows.num, KIND=kind, WIDTH=width, INNER=rows.inner, OUTER_STRIDE=rows.outer_stride,
            INNER_STRIDE=rows.inner_stride, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _kernel(gate_up, out, num_rows, KIND: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr,
            OUTER_STRIDE: tl.constexpr, INNER_STRIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, col = at // WIDTH, at % WIDTH
    inside = row < num_rows
    gate_at = gate_up + start_of(row, INNER, OUTER_STRIDE, INNER_STRIDE) + col
    gate = tl.load(gate_at, mask=inside, other=0.0)
    up = tl.load(gate_at + WIDTH, mask=inside, other=0.0)
    # Rounded before up multiplies it, as where the activation is an op of its own.
    activated = activate(gate.to(tl.float32), KIND).to(gate.dtype).to(tl.float32)
    tl.store(out + at, (activated * up.to(tl.float32)).to(gate.dtype), mask=inside)
