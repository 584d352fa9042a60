"""Adjusted logits in Triton: one launch for a mask, one more for biases, and two more for penalties.

  1 copy    1024 logits of a row a program: to float32, -inf where the mask says so; one read and one write of all
  2 start   512 ids of a row a program: biases are added; the counts of the tokens of the history are set to 0
  3 count   how often each is in the answer, by atomics
  4 apply   of the programs that have a token, the first to take its count changes its logit

Counts have room for every token of the vocabulary, but only those of the history are ever touched: no pass over all of them.

Tails: lanes beyond the vocabulary or the history, padding and ids outside the vocabulary load nothing and store nothing. Division
rounds as torch's does, and products are not fused with the differences that follow them, so that a logit is the reference's to the
bit. Limits: launch 1 is memory's; a row without penalties ends its programs of 2 to 4 at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024
TILE = 512  # of ids
TAKEN = tl.constexpr(-1)
NO_ID = tl.constexpr(-1)


def adjust_logits(
    logits: Tensor,
    mask: Tensor | None,
    bias_ids: Tensor | None,
    bias: Tensor | None,
    history: Tensor | None,
    prompt_lens: Tensor | None,
    newest: Tensor | None,
    presence: Tensor | None,
    frequency: Tensor | None,
    repetition: Tensor | None,
) -> Tensor:
    """As the contract; rows of logits may lie apart, elements of a row may not."""
    rows, vocab = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    out = torch.empty((rows, vocab), dtype=dtype, device=logits.device)
    if not out.numel():
        return out
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    block = min(max(triton.next_power_of_2(triton.cdiv(vocab, 16)), 64), MAX_BLOCK)
    words = out if mask is None else mask.contiguous()  # out where there is none: a kernel wants a pointer
    _copy[(rows, triton.cdiv(vocab, block))](
        logits, words, out, logits.stride(0), VOCAB=vocab, BLOCK=block, HAS_MASK=mask is not None
    )
    num_biases = bias_ids.shape[1] if bias_ids is not None else 0
    length = history.shape[1] if history is not None else 0
    has_history = history is not None
    biases = [out if t is None else t.contiguous() for t in (bias_ids, bias)]
    counts = torch.empty((rows, vocab), dtype=torch.int32, device=logits.device) if has_history else out
    state = (history, prompt_lens, newest, presence, frequency, repetition)
    said = [counts, *(out if t is None else t.contiguous() for t in state)]
    sizes = {"VOCAB": vocab, "TILE": TILE}
    if num_biases or has_history:
        tiles = triton.cdiv(max(num_biases, length + has_history), TILE)
        _start[(rows, tiles)](out, *biases, *said, num_biases, length, HAS_HISTORY=has_history, **sizes)
    if has_history:
        each_id = (rows, triton.cdiv(length + 1, TILE))
        _count[each_id](*said, length, **sizes)
        _apply[each_id](out, *said, length, **sizes, enable_fp_fusion=False)
    return out


@triton.jit(do_not_specialize=["stride"])
def _copy(logits, mask, out, stride, VOCAB: tl.constexpr, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < VOCAB
    x = tl.load(logits + row * stride + ids, mask=inside, other=0.0).to(out.dtype.element_ty)
    if HAS_MASK:
        word = tl.load(mask + row * ((VOCAB + 31) // 32) + ids // 32, mask=inside, other=0)
        x = tl.where(((word >> (ids % 32)) & 1) != 0, x, -float("inf"))
    tl.store(out + row * VOCAB + ids, x, mask=inside)


@triton.jit
def _said(history, newest, row, at, length, VOCAB: tl.constexpr):
    """The tokens at these places of prompt and answer, the newest behind them, and which are tokens of the vocabulary."""
    ids = tl.load(history + row * length + at, mask=at < length, other=NO_ID).to(tl.int64)
    ids = tl.where(at == length, tl.load(newest + row), ids)
    return ids, (ids >= 0) & (ids < VOCAB)


@triton.jit
def _is_off(presence, frequency, repetition, row):
    """Whether a row has no penalties."""
    is_off = (tl.load(presence + row) == 0) & (tl.load(frequency + row) == 0)
    return is_off & (tl.load(repetition + row) == 1)


@triton.jit(do_not_specialize=["num_biases", "length"])
def _start(out, bias_ids, bias, counts, history, prompt_lens, newest, presence, frequency, repetition, num_biases, length,
           HAS_HISTORY: tl.constexpr, VOCAB: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * TILE + tl.arange(0, TILE)
    if num_biases > 0:
        ids = tl.load(bias_ids + row * num_biases + at, mask=at < num_biases, other=NO_ID).to(tl.int32)
        inside = (ids >= 0) & (ids < VOCAB)
        here = out + row * VOCAB + ids
        x = tl.load(here, mask=inside, other=0.0)
        added = tl.load(bias + row * num_biases + at, mask=inside, other=0.0)
        tl.store(here, x + added.to(x.dtype), mask=inside)
    if HAS_HISTORY:  # noqa: SIM102
        if not _is_off(presence, frequency, repetition, row):
            ids, inside = _said(history, newest, row, at, length, VOCAB)
            tl.store(counts + row * VOCAB + ids, 0, mask=inside)


@triton.jit(do_not_specialize=["length"])
def _count(counts, history, prompt_lens, newest, presence, frequency, repetition, length, VOCAB: tl.constexpr,
           TILE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if not _is_off(presence, frequency, repetition, row):
        at = tl.program_id(1) * TILE + tl.arange(0, TILE)
        ids, inside = _said(history, newest, row, at, length, VOCAB)
        is_answer = (at >= tl.load(prompt_lens + row)) | (at == length)
        tl.atomic_add(counts + row * VOCAB + ids, 1, mask=inside & is_answer, sem="relaxed")


@triton.jit(do_not_specialize=["length"])
def _apply(out, counts, history, prompt_lens, newest, presence, frequency, repetition, length, VOCAB: tl.constexpr,
           TILE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if not _is_off(presence, frequency, repetition, row):
        at = tl.program_id(1) * TILE + tl.arange(0, TILE)
        ids, inside = _said(history, newest, row, at, length, VOCAB)
        count = tl.atomic_xchg(counts + row * VOCAB + ids, tl.full([TILE], TAKEN, tl.int32), mask=inside, sem="relaxed")
        is_first = inside & (count != TAKEN)
        here = out + row * VOCAB + ids
        x = tl.load(here, mask=is_first, other=0.0)
        repeated = tl.load(repetition + row).to(x.dtype)
        # The exact quotient also where Triton's "/" is the hardware's, two units off.
        smaller = x / repeated if x.dtype == tl.float64 else tl.div_rn(x, repeated)
        x = tl.where(x > 0, smaller, x * repeated)
        less = x - (tl.load(frequency + row) * count.to(tl.float32)).to(x.dtype)
        less = less - tl.load(presence + row).to(x.dtype)
        tl.store(here, tl.where(count > 0, less, x), mask=is_first)
