"""Logits made less likely where their token has been said, as vLLM's repetition, presence and frequency penalties do."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfx.ops.registry import Cost, nbytes, refuse, register, wide


def penalize(
    logits: Tensor, counts: Tensor, in_prompt: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """logits (rows, vocab) → a new tensor of their shape and dtype.

    counts (rows, vocab) int32: how often a token has been generated; in_prompt (rows, vocab) bool: whether the prompt has it. A
    row each, (rows,) float32: repetition divides the positive logits, and multiplies the negative, of tokens in either (1 is
    off); frequency · count and then presence (of tokens generated) are subtracted (0 is off). In float32, rounded once at the
    end. Source: vllm-project/vllm: vllm/model_executor/layers/utils.py. Raises ShapeError."""
    return OP(logits, counts, in_prompt, repetition, presence, frequency)


def reference(
    logits: Tensor, counts: Tensor, in_prompt: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """The definition of right."""
    x = wide(logits)
    repetition, presence, frequency = repetition[:, None], presence[:, None], frequency[:, None]
    x = torch.where(in_prompt | (counts > 0), torch.where(x > 0, x / repetition, x * repetition), x)
    return (x - frequency * counts - presence * (counts > 0)).to(logits.dtype)


def check(
    logits: Tensor, counts: Tensor, in_prompt: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Raise ShapeError for what the kernels do not take."""
    if logits.dim() != 2:
        refuse("penalize", "logits", logits.shape, "shape (rows, vocab)")
    if not logits.is_floating_point():
        refuse("penalize", "logits", logits.dtype, "a float dtype")
    for name, tensor, shape, dtype in (
        ("counts", counts, logits.shape, torch.int32),
        ("in_prompt", in_prompt, logits.shape, torch.bool),
        ("repetition", repetition, logits.shape[:1], torch.float32),
        ("presence", presence, logits.shape[:1], torch.float32),
        ("frequency", frequency, logits.shape[:1], torch.float32),
    ):
        if tensor.shape != shape:
            refuse("penalize", name, tensor.shape, f"shape {tuple(shape)}, as logits have shape {tuple(logits.shape)}")
        if tensor.dtype != dtype:
            refuse("penalize", name, tensor.dtype, str(dtype))


OP = register(
    "penalize(Tensor logits, Tensor counts, Tensor in_prompt, Tensor repetition, Tensor presence, Tensor frequency) -> Tensor",
    reference=reference,
    fake=lambda logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
    check=check,
    cost=lambda logits, *state: Cost(flops=5 * logits.numel(), bytes=nbytes(logits, logits, *state)),
    kernels={"cuda": "triton.penalize"},
    tolerance={torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3},
    is_inline=True,
)
