"""RMS norm and layer norm over the last axis."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., hidden), weight (hidden,) → x's shape and dtype; eps is added to the mean square.

    Statistics and product are float32, rounded once at the end; transformers rounds before the weight too, which differs
    in the last bit of bfloat16."""
    return F.rms_norm(x, weight.shape, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (..., hidden), weight and bias (hidden,) → x's shape and dtype."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)
