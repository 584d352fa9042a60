"""Log-probabilities in Triton, without a sort: three launches.

Work per program: 2048 logits of a row in two launches, a row in the third. A token's place is one int64, its logit above and its id
below, so that of equals the lower id has the larger number and no two are equal: the next best is the largest below the one before.

  1 sum   each chunk's largest logit, its sum of exponentials, its best place and how many of its places are above the sampled token's
  2 best  a chunk with r better ones beside it can hold at most num - r of the num best: so many rounds of finding a maximum, which
          is none in all but num chunks
  3 row   num rounds over what the chunks found, and the sums of sums

Tails: lanes beyond the vocabulary are -inf, which adds nothing to a sum, and have no place. Limits: one read of the logits, and the
rounds. Beyond 64 a sort is quicker, so there, and in float64, it is the reference that runs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmfx.ops.token_logprobs import reference
from vlmfx.ops.triton.sample import key_of

MAX_CHUNK = 2048
MAX_ROUNDS = 64
NO_PLACE = tl.constexpr(-(2**63))
ID_BITS = tl.constexpr(0xFFFFFFFF)


def token_logprobs(logits: Tensor, ids: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """As the contract; rows may lie apart, elements of a row may not."""
    rows, vocab = logits.shape
    if num > MAX_ROUNDS or logits.dtype == torch.float64:
        return reference(logits, ids, num)
    # Requests ask for any number, which is a constant of the kernels: a few of them serve all.
    rounded = min(triton.next_power_of_2(num), vocab) if num else 0
    if rounded > num:
        some_ids, some, rank = token_logprobs(logits, ids, rounded)
        return some_ids[:, : 1 + num].contiguous(), some[:, : 1 + num].contiguous(), rank
    out_ids = torch.empty((rows, 1 + num), dtype=torch.int64, device=logits.device)
    out = torch.empty((rows, 1 + num), dtype=torch.float32, device=logits.device)
    rank = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return out_ids, out, rank
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    ids = ids.contiguous()
    chunk = min(max(triton.next_power_of_2(triton.cdiv(vocab, 64)), 64), MAX_CHUNK)
    chunks = triton.cdiv(vocab, chunk)
    best = torch.empty((rows, chunks, num), dtype=torch.int64, device=logits.device)
    places = torch.empty((rows, 2, chunks), dtype=torch.int64, device=logits.device)  # the best, and how many are above
    sums = torch.empty((rows, 2, chunks), dtype=torch.float32, device=logits.device)  # the largest, and of exponentials
    stride, padded = logits.stride(0), triton.next_power_of_2(chunks)
    sizes = {"VOCAB": vocab, "CHUNKS": chunks, "NUM": num}
    _sum[(rows, chunks)](logits, ids, places, sums, stride, VOCAB=vocab, CHUNKS=chunks, CHUNK=chunk)
    if num:
        _best[(rows, chunks)](logits, places, best, stride, **sizes, CHUNK=chunk, PADDED=padded)
    found = triton.next_power_of_2(max(chunks * num, 1))
    _row[(rows,)](logits, ids, places, best, sums, out_ids, out, rank, stride, **sizes, PADDED=padded, FOUND=found,
                  num_warps=min(max(found // 512, 1), 16))  # fmt: skip
    return out_ids, out, rank


@triton.jit
def _place(values, ids):
    """What ranks a token; NaN ranks as -inf."""
    x = values.to(tl.float32)
    x = tl.where(x != x, -float("inf"), x)
    return (key_of(x).to(tl.int64) << 32) | (ID_BITS - ids)


@triton.jit
def _chunk(logits, stride, row, chunk, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """The logits of a chunk and their places."""
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = ids < VOCAB
    values = tl.load(logits + row * stride + ids, mask=inside, other=-float("inf"))
    return values.to(tl.float32), tl.where(inside, _place(values, ids.to(tl.int64)), NO_PLACE)


@triton.jit
def _sum(logits, ids, places, sums, stride, VOCAB: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x, place = _chunk(logits, stride, row, chunk, VOCAB, CHUNK)
    most = tl.max(x)
    # -inf less -inf is not 0 but NaN. A NaN among the logits makes the sum NaN, here and of the row.
    base = tl.where(most == -float("inf"), 0.0, most)
    at = row * 2 * CHUNKS + chunk
    tl.store(sums + at, most)
    tl.store(sums + at + CHUNKS, tl.sum(tl.exp(x - base)))
    sampled = tl.load(ids + row)
    own = _place(tl.load(logits + row * stride + sampled), sampled)
    tl.store(places + at, tl.max(place))
    tl.store(places + at + CHUNKS, tl.sum((place > own).to(tl.int64)))


@triton.jit
def _best(logits, places, best, stride, VOCAB: tl.constexpr, CHUNKS: tl.constexpr, NUM: tl.constexpr, CHUNK: tl.constexpr,
          PADDED: tl.constexpr):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    each = tl.arange(0, PADDED)
    others = tl.load(places + row * 2 * CHUNKS + each, mask=each < CHUNKS, other=NO_PLACE)
    largest = tl.load(places + row * 2 * CHUNKS + chunk)
    num = NUM - tl.sum((others > largest).to(tl.int32))
    at = best + (row * CHUNKS + chunk) * NUM
    if num > 0:
        _x, place = _chunk(logits, stride, row, chunk, VOCAB, CHUNK)
        for i in range(num):
            tl.store(at + i, largest)
            place = tl.where(place < largest, place, NO_PLACE)
            largest = tl.max(place)
    for i in range(tl.maximum(num, 0), NUM):
        tl.store(at + i, NO_PLACE)


@triton.jit
def _row(logits, ids, places, best, sums, out_ids, out, rank, stride, VOCAB: tl.constexpr, CHUNKS: tl.constexpr,
         NUM: tl.constexpr, PADDED: tl.constexpr, FOUND: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = row * 2 * CHUNKS + tl.arange(0, PADDED)
    here = tl.arange(0, PADDED) < CHUNKS
    mosts = tl.load(sums + chunk, mask=here, other=-float("inf"))
    parts = tl.load(sums + chunk + CHUNKS, mask=here, other=0.0)
    most = tl.max(mosts)
    base = tl.where(most == -float("inf"), 0.0, most)
    log_sum = tl.log(tl.sum(tl.where(mosts == -float("inf"), parts, parts * tl.exp(mosts - base))))
    tl.store(rank + row, 1 + tl.sum(tl.load(places + chunk + CHUNKS, mask=here, other=0)))

    at = row * (1 + NUM)
    token = tl.load(ids + row)
    tl.store(out_ids + at, token)
    tl.store(out + at, tl.load(logits + row * stride + token).to(tl.float32) - base - log_sum)
    if NUM > 0:
        found = tl.arange(0, FOUND)
        place = tl.load(best + row * CHUNKS * NUM + found, mask=found < CHUNKS * NUM, other=NO_PLACE)
        for i in range(1, NUM + 1):
            largest = tl.max(place)
            token = ID_BITS - (largest & ID_BITS)
            tl.store(out_ids + at + i, token)
            tl.store(out + at + i, tl.load(logits + row * stride + token).to(tl.float32) - base - log_sum)
            place = tl.where(place < largest, place, NO_PLACE)
