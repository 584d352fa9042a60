"""Activations by the names that checkpoints use, and the gated product of Llama's MLP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def quick_gelu(x: Tensor) -> Tensor:
    """x·sigmoid(1.702 x), CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


def gated_activation(gate_up: Tensor) -> Tensor:
    """gate_up (..., 2·intermediate) → silu(gate)·up (..., intermediate)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
