"""RMS norm and layer norm over the last axis."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., hidden), weight (hidden,) → x's shape and dtype; eps is added to the mean square.

    Statistics are float32; x is rounded to its own dtype before weight multiplies it, as in
    huggingface/transformers: src/transformers/models/llama/modeling_llama.py."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (..., hidden), weight and bias (hidden,) → x's shape and dtype."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)
