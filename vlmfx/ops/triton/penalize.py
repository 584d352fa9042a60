"""Penalties in Triton. One program takes 1024 logits of a row, reads each tensor once and writes once: memory limits it, at 9 bytes a
logit in 16 bits.

Tails: lanes beyond the vocabulary load nothing and store nothing. Division and multiplication round as torch's do, and products are
not fused with the differences that follow them, so that a logit is the reference's to the bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024


def penalize(
    logits: Tensor, counts: Tensor, in_prompt: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """As the contract; rows may lie apart, elements of a row may not."""
    rows, vocab = logits.shape
    out = torch.empty((rows, vocab), dtype=logits.dtype, device=logits.device)
    if not out.numel():
        return out
    by_row = [t if t.stride(1) == 1 else t.contiguous() for t in (logits, counts, in_prompt)]
    penalties = [t.contiguous() for t in (repetition, presence, frequency)]
    block = min(max(triton.next_power_of_2(triton.cdiv(vocab, 16)), 64), MAX_BLOCK)
    _kernel[(rows, triton.cdiv(vocab, block))](
        *by_row, *penalties, out, *(t.stride(0) for t in by_row), VOCAB=vocab, BLOCK=block, enable_fp_fusion=False
    )
    return out


@triton.jit(do_not_specialize=["logits_stride", "counts_stride", "prompt_stride"])
def _kernel(logits, counts, in_prompt, repetition, presence, frequency, out, logits_stride, counts_stride, prompt_stride,
            VOCAB: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < VOCAB
    values = tl.load(logits + row * logits_stride + ids, mask=inside, other=0.0)
    count = tl.load(counts + row * counts_stride + ids, mask=inside, other=0)
    prompt = tl.load(in_prompt + row * prompt_stride + ids, mask=inside, other=0)
    x = values.to(_float_of(values.dtype))
    repeated = tl.load(repetition + row).to(x.dtype)
    # The exact quotient also where Triton's "/" is the hardware's, two units off.
    smaller = x / repeated if x.dtype == tl.float64 else tl.div_rn(x, repeated)
    x = tl.where((prompt != 0) | (count > 0), tl.where(x > 0, smaller, x * repeated), x)
    x = x - (tl.load(frequency + row) * count.to(tl.float32)).to(x.dtype)
    x = x - (tl.load(presence + row) * (count > 0).to(tl.float32)).to(x.dtype)
    tl.store(out + row * VOCAB + ids, x.to(values.dtype), mask=inside)


@triton.constexpr_function
def _float_of(dtype):
    """What logits of a dtype are computed in."""
    return tl.float64 if dtype == tl.float64 else tl.float32
