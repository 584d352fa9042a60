"""The gated product in the MLP of Llama and its kin, whose gate and up projections are one matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfx.ops import activation
from vlmfx.ops.registry import Cost, nbytes, refuse, register


def gated_activation(gate_up: Tensor, kind: str = "silu") -> Tensor:
    """gate_up (..., 2·intermediate), the gate first → act(gate)·up (..., intermediate) in gate_up's dtype; kinds: activation.ACTIVATIONS.

    The activation is rounded to that dtype before up multiplies it, as in huggingface/transformers:
    src/transformers/models/llama/modeling_llama.py. Raises ShapeError."""
    return OP(gate_up, kind)


def reference(gate_up: Tensor, kind: str) -> Tensor:
    """The definition of right."""
    gate, up = gate_up.chunk(2, -1)
    return activation.reference(gate, kind) * up


def cpu(gate_up: Tensor, kind: str) -> Tensor:
    """As the reference, with torch's own activations."""
    gate, up = gate_up.chunk(2, -1)
    return (activation.ACTIVATIONS[kind](gate) * up).contiguous()


def check(gate_up: Tensor, kind: str) -> None:
    """Raise ShapeError for what the kernels do not take."""
    if kind not in activation.ACTIVATIONS:
        refuse("gated_activation", "kind", repr(kind), f"one of {', '.join(activation.ACTIVATIONS)}")
    if not gate_up.dim() or gate_up.shape[-1] % 2:
        refuse("gated_activation", "gate_up", gate_up.shape, "a last axis of even size, gate and up side by side")
    if not gate_up.is_floating_point():
        refuse("gated_activation", "gate_up", gate_up.dtype, "a floating-point dtype")


OP = register(
    "gated_activation(Tensor gate_up, str kind) -> Tensor",
    reference=reference,
    cpu=cpu,
    fake=lambda gate_up, kind: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
    check=check,
    cost=lambda gate_up, kind: Cost(flops=11 * gate_up.numel() // 2, bytes=nbytes(gate_up) * 3 // 2),
    kernels={"cuda": "triton.gated_activation"},
    tolerance={torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2},
    is_inline=True,
)
