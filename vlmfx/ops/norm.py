"""RMS norm and layer norm over the last axis."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., hidden), weight (hidden,) → x's shape and dtype; eps is added to the mean square.

    Statistics are float32. Off the CPU the product is too, rounded once at the end; on it x is rounded before the weight
    multiplies it, as in transformers, which differs in the last bit of bfloat16."""
    if not x.is_cpu:
        return F.rms_norm(x, weight.shape, weight, eps)
    # F.rms_norm is ten small kernels on the CPU, layer norm a single one; and of x beside −x the mean is 0, the variance x's mean square.
    size = x.shape[-1]
    return torch.layer_norm(torch.cat((x, -x), -1), (2 * size,), None, None, eps).narrow(-1, 0, size) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (..., hidden), weight and bias (hidden,) → x's shape and dtype."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)
