"""Sampling in Triton, without a sort: seven launches, of which a row uses what its parameters ask for.

Work per program: in four launches, 2048 logits of a row (the grid is rows × chunks, so that one row fills a GPU too); in three, a
row, of which it reads the counts, the few candidates of a cut, or one chunk. What passes from launch to launch is a line of
integers a row, and a copy of the candidates, as large as the logits at most. Sums are of integers: in any order the same.

  1 best    each chunk's largest logit and its id
  2 weigh   greedy rows get their id; of others each chunk's mass and, for top_k and top_p, how many tokens are in which bucket of
            logits: from the best downwards, an eighth of a temperature wide and further down wider
  3 bound   a row: the counts bound the mass above each bucket, hence the buckets in which the cut may be
  4 gather  the tokens of these buckets are copied, and each chunk's mass above them is summed
  5 cut     a row: pivots between the least and the most of the copies, until the last value that stays is found
  6 remain  each chunk's mass above that value, and how many equal it
  7 draw    a row: the chunk the random number falls in, and the id in the chunk

Tails: lanes beyond the vocabulary are -inf, which weighs nothing, and are not counted. Limits: greedy rows are one read of the
logits; weighing is bound by exp in float64, which is computed up to three times a logit, but for chunks that weigh nothing.

Pivots in place of a sort: flashinfer-ai/flashinfer: include/flashinfer/sampling.cuh, which draws again until a draw stays; here
the cut is exact, so that a draw is the reference's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_CHUNK = 2048
BUCKETS = tl.constexpr(128)
PIVOTS = tl.constexpr(8)

# A line of work, in int64: these, a number a chunk each ...
BEST = tl.constexpr(0)  # the key of the largest logit
ID = tl.constexpr(1)  # its id
MASS = tl.constexpr(2)
ABOVE = tl.constexpr(3)  # the mass above the first bucket of candidates
EQUAL = tl.constexpr(4)  # how many tokens equal the last that stay
COUNTS = tl.constexpr(5)  # ... then how many tokens are in each bucket, and then:
KIND = tl.constexpr(0)  # 0 greedy or without a distribution, 1 drawn from all tokens, 2 from a part of them
ROW_BEST = tl.constexpr(1)  # the largest logit, the bits of a float64
PER_DEGREE = tl.constexpr(2)  # 1 / temperature, likewise
FIRST_BUCKET = tl.constexpr(3)  # of candidates
LAST_BUCKET = tl.constexpr(4)
SEEN = tl.constexpr(5)  # how many tokens are above the first bucket
LIMIT = tl.constexpr(6)  # how many top_k leaves
TOTAL = tl.constexpr(7)  # the mass of all tokens
CANDIDATES = tl.constexpr(8)  # their number
LAST = tl.constexpr(9)  # the key of the last tokens that stay
LAST_KEPT = tl.constexpr(10)  # how many of them, the lowest ids
LAST_WEIGHT = tl.constexpr(11)  # the weight of each, after min_p
NUM_EXTRA = 12

WEIGHT_OF_BEST = tl.constexpr(2.0**44)
# Added to a float64 of 0 to 2^52 this rounds it to an integer, to even, as torch does; its bits are then those of UNIT and the integer.
UNIT = tl.constexpr(2.0**52)
UNIT_BITS = tl.constexpr(0x4330000000000000)
WEIGHTLESS = tl.constexpr(-31.5)  # 2^44 times exp of it rounds to 0
LOWEST = tl.constexpr(-(2**63))


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    """As the contract; rows may lie apart, elements of a row may not."""
    rows, vocab = logits.shape
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return ids
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    chunk = min(max(triton.next_power_of_2(triton.cdiv(vocab, 64)), 64), MAX_CHUNK)
    chunks = triton.cdiv(vocab, chunk)
    width = COUNTS.value * chunks + BUCKETS.value + NUM_EXTRA
    work = torch.empty((rows, width), dtype=torch.int64, device=logits.device)
    candidates = torch.empty((rows, vocab), dtype=logits.dtype, device=logits.device)
    temperature, top_k, top_p, min_p = (t.contiguous() for t in (temperature, top_k, top_p, min_p))
    seed, position = seed.contiguous(), position.contiguous()
    sizes = {"VOCAB": vocab, "CHUNK": chunk, "CHUNKS": chunks, "PADDED": triton.next_power_of_2(chunks), "WIDTH": width}
    tile = min(chunk, 1024)
    stride, each_chunk, each_row = logits.stride(0), (rows, chunks), (rows,)
    _best[each_chunk](logits, stride, work, **sizes)
    _weigh[each_chunk](logits, stride, work, temperature, top_k, top_p, min_p, ids, **sizes)
    _bound[each_row](work, top_k, top_p, **sizes)
    _gather[each_chunk](logits, stride, work, candidates, **sizes)
    _cut[each_row](work, top_p, min_p, candidates, **sizes, TILE=tile, num_warps=max(tile // 128, 1))
    _remain[each_chunk](logits, stride, work, min_p, **sizes)
    _draw[each_row](logits, stride, work, min_p, seed, position, ids, **sizes)
    return ids


# ---- logits as integers, and their weights


@triton.jit
def key_of(values):
    """Integers in the order of the values, 0 for both zeros and NaN above all; int64 for float64, else int32."""
    if values.dtype == tl.float64:
        bits = values.to(tl.int64, bitcast=True)
        magnitude = bits & 0x7FFFFFFFFFFFFFFF
        key = tl.where(bits < 0, -magnitude, magnitude)
        return tl.where(values != values, 0x7FFFFFFFFFFFFFFF, key)
    else:
        x = values.to(tl.float32)
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        key = tl.where(bits < 0, -magnitude, magnitude)
        return tl.where(x != x, 0x7FFFFFFF, key) >> _spare_bits(values.dtype)


@triton.jit
def value_of(key, DTYPE: tl.constexpr):
    """The float64 value of which this is the key."""
    magnitude = tl.abs(key)
    if DTYPE == tl.float64:  # noqa: SIM300
        value = magnitude.to(tl.float64, bitcast=True)
    else:
        value = (magnitude.to(tl.int32) << _spare_bits(DTYPE)).to(tl.float32, bitcast=True).to(tl.float64)
    return tl.where(key < 0, -value, value)


@triton.constexpr_function
def _spare_bits(dtype):
    """The low bits of a float32 that are 0 when it holds a number of this dtype: the fewer bits of a key, the fewer passes."""
    return {"bf16": 16, "fp16": 13}.get(dtype.name, 0)


@triton.jit
def _ratio(values, best, per_degree):
    """exp of the logits below the best, by temperature: the share of the best's probability, in float64."""
    return tl.exp((values.to(tl.float64) - best) * per_degree)


@triton.jit
def _weight(ratio):
    return (ratio * WEIGHT_OF_BEST + UNIT).to(tl.int64, bitcast=True) - UNIT_BITS


# ---- what programs read


@triton.jit
def _line(work, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """The program's row, its line of work, and where in it the numbers after the buckets are."""
    row = tl.program_id(0).to(tl.int64)
    line = work + row * WIDTH
    return row, line, line + COUNTS * CHUNKS + BUCKETS


@triton.jit
def _scale(extra):
    """The row's largest logit and 1 / temperature."""
    best, per_degree = tl.load(extra + ROW_BEST), tl.load(extra + PER_DEGREE)
    return best.to(tl.float64, bitcast=True), per_degree.to(tl.float64, bitcast=True)


@triton.jit
def _filters(row, top_k, top_p, VOCAB: tl.constexpr):
    """How many tokens top_k leaves, and top_p."""
    limit = tl.load(top_k + row)
    return tl.where((limit <= 0) | (limit > VOCAB), VOCAB, limit), tl.load(top_p + row).to(tl.float64)


@triton.jit
def _each(line, KIND: tl.constexpr, other, CHUNKS: tl.constexpr, PADDED: tl.constexpr):
    """One number of each chunk."""
    at = tl.arange(0, PADDED)
    return tl.load(line + KIND * CHUNKS + at, mask=at < CHUNKS, other=other)


@triton.jit
def _chunk(logits, stride, row, chunk, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """The ids of a chunk, which are inside, and the logits."""
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = ids < VOCAB
    return ids, inside, tl.load(logits + row * stride + ids, mask=inside, other=-float("inf"))


# ---- 1 and 2: a chunk each


@triton.jit
def _best(logits, stride, work, VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PADDED: tl.constexpr,
          WIDTH: tl.constexpr):  # fmt: skip
    row, line, extra = _line(work, CHUNKS, WIDTH)
    chunk = tl.program_id(1)
    ids, _, values = _chunk(logits, stride, row, chunk, VOCAB, CHUNK)
    key = key_of(values)
    best = tl.max(key)
    tl.store(line + BEST * CHUNKS + chunk, best.to(tl.int64))
    tl.store(line + ID * CHUNKS + chunk, tl.min(tl.where(key == best, ids, VOCAB)).to(tl.int64))
    if chunk == 0:
        tl.store(line + COUNTS * CHUNKS + tl.arange(0, BUCKETS), tl.zeros([BUCKETS], tl.int64))
        tl.store(extra + CANDIDATES, 0)
        tl.store(extra + LAST, LOWEST)  # nothing is cut
        tl.store(extra + LAST_KEPT, 0)
        tl.store(extra + LAST_WEIGHT, 0)


@triton.jit
def _weigh(logits, stride, work, temperature, top_k, top_p, min_p, out, VOCAB: tl.constexpr, CHUNK: tl.constexpr,
           CHUNKS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    row, line, extra = _line(work, CHUNKS, WIDTH)
    chunk = tl.program_id(1)
    keys = _each(line, BEST, LOWEST, CHUNKS, PADDED)
    best_key = tl.max(keys)
    best = value_of(best_key, logits.dtype.element_ty)
    degrees = tl.load(temperature + row).to(tl.float64)
    per_degree = 1.0 / tl.where(degrees > 0, degrees, 1.0)
    limit, p = _filters(row, top_k, top_p, VOCAB)
    is_random = (degrees > 0) & (tl.abs(best) < float("inf"))
    is_cut = (limit < VOCAB) | (p < 1)
    if is_random:
        mass = tl.full([], 0, tl.int64)
        own = value_of(tl.load(line + BEST * CHUNKS + chunk), logits.dtype.element_ty)
        if (own - best) * per_degree > WEIGHTLESS:
            _ids, _inside, values = _chunk(logits, stride, row, chunk, VOCAB, CHUNK)
            ratio = _ratio(values, best, per_degree)
            weight = _weight(ratio)
            if is_cut:
                bucket = _bucket((values.to(tl.float64) - best) * per_degree)
                count = tl.histogram(bucket, BUCKETS)
                at = tl.arange(0, BUCKETS)
                tl.atomic_add(line + COUNTS * CHUNKS + at, count.to(tl.int64), mask=count > 0, sem="relaxed")
            else:
                weight = tl.where(ratio < tl.load(min_p + row).to(tl.float64), 0, weight)
            mass = tl.sum(weight)
        tl.store(line + MASS * CHUNKS + chunk, mass)
        tl.store(line + EQUAL * CHUNKS + chunk, 0)
    if chunk == 0:
        tl.store(extra + KIND, tl.where(is_random, tl.where(is_cut, 2, 1), 0))
        tl.store(extra + ROW_BEST, best.to(tl.int64, bitcast=True))
        tl.store(extra + PER_DEGREE, per_degree.to(tl.int64, bitcast=True))
        if not is_random:
            tl.store(out + row, tl.min(tl.where(keys == best_key, _each(line, ID, VOCAB, CHUNKS, PADDED), VOCAB)))


# ---- buckets: counts of tokens by logit, which bound masses


@triton.jit
def _bucket(exponent):
    """64 buckets of 1/8, 32 of 1/4 and 32 of 1/2: 0 to -32; the last holds all below -31.5 and weighs nothing."""
    x = -tl.maximum(exponent, -32.0).to(tl.float32)
    return tl.minimum(tl.where(x < 8, x * 8, tl.where(x < 16, x * 4 + 32, x * 2 + 64)).to(tl.int32), BUCKETS - 1)


@triton.jit
def _top_of(bucket):
    """The largest exponent of a bucket."""
    b = bucket.to(tl.float64)
    return -tl.where(b < 64, b * 0.125, tl.where(b < 96, (b - 32) * 0.25, (b - 64) * 0.5))


@triton.jit
def _bound(work, top_k, top_p, VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PADDED: tl.constexpr,
           WIDTH: tl.constexpr):  # fmt: skip
    """A bucket's mass is between its count times the least and the most that a token of it can weigh, and so are sums from either end.

    Slack: an exponent is rounded to float32 before it is put in its bucket, a weight to an integer, a sum to float64."""
    row, line, extra = _line(work, CHUNKS, WIDTH)
    if tl.load(extra + KIND) == 2:
        limit, p = _filters(row, top_k, top_p, VOCAB)
        bucket = tl.arange(0, BUCKETS)
        count = tl.load(line + COUNTS * CHUNKS + bucket)
        count = tl.where(bucket < BUCKETS - 1, count, 0)  # the last weighs nothing
        mass = tl.sum(_each(line, MASS, 0, CHUNKS, PADDED))
        total = mass.to(tl.float64)
        most = count.to(tl.float64) * (tl.exp(_top_of(bucket)) * (WEIGHT_OF_BEST * (1 + 1e-5)) + 1)
        least = count.to(tl.float64) * tl.maximum(tl.exp(_top_of(bucket + 1)) * (WEIGHT_OF_BEST * (1 - 1e-5)) - 1, 0)
        most_so_far, least_so_far = tl.cumsum(most, 0), tl.cumsum(least, 0)
        most_so_far, least_so_far = (
            tl.minimum(most_so_far, total - (tl.sum(least) - least_so_far)),
            tl.maximum(least_so_far, total - (tl.sum(most) - most_so_far)),
        )
        limit = tl.where(tl.sum(count) <= limit, VOCAB, limit)
        # Where top_k cuts; where it does not, the last that weighs something.
        last = tl.minimum(tl.sum((tl.cumsum(count, 0) < limit).to(tl.int32)), BUCKETS - 2)
        first = last
        if p < 1:
            least_kept, most_kept = total, total
            if limit < VOCAB:
                least_kept = tl.sum(tl.where(bucket == last - 1, least_so_far, 0))
                most_kept = tl.sum(tl.where(bucket == last, most_so_far, 0))
            first = tl.minimum(tl.sum((most_so_far < p * least_kept * (1 - 1e-9)).to(tl.int32)), last)
            if limit == VOCAB:  # else what top_p is a part of takes all tokens down to the cut of top_k
                last = tl.minimum(tl.sum((least_so_far < p * most_kept * (1 + 1e-9)).to(tl.int32)), last)
        tl.store(extra + FIRST_BUCKET, first)
        tl.store(extra + LAST_BUCKET, last)
        tl.store(extra + SEEN, tl.sum(tl.where(bucket < first, count, 0)))
        tl.store(extra + LIMIT, limit)
        tl.store(extra + TOTAL, mass)


# ---- 4 and 5


@triton.jit
def _gather(logits, stride, work, candidates, VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
            PADDED: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    row, line, extra = _line(work, CHUNKS, WIDTH)
    if tl.load(extra + KIND) == 2:
        chunk = tl.program_id(1)
        best, per_degree = _scale(extra)
        first, last = tl.load(extra + FIRST_BUCKET), tl.load(extra + LAST_BUCKET)
        above = tl.full([], 0, tl.int64)
        own = value_of(tl.load(line + BEST * CHUNKS + chunk), logits.dtype.element_ty)
        if _bucket((own - best) * per_degree) <= last:
            _ids, inside, values = _chunk(logits, stride, row, chunk, VOCAB, CHUNK)
            bucket = _bucket((values.to(tl.float64) - best) * per_degree)
            above = tl.sum(tl.where(bucket < first, _weight(_ratio(values, best, per_degree)), 0))
            is_candidate = (bucket >= first) & (bucket <= last) & inside
            place = tl.cumsum(is_candidate.to(tl.int32), 0) - 1
            # In whatever order the chunks come: what is asked of candidates are sums.
            start = tl.atomic_add(extra + CANDIDATES, tl.sum(is_candidate.to(tl.int64)), sem="relaxed")
            tl.store(candidates + row * VOCAB + start + place, values, mask=is_candidate)
        tl.store(line + ABOVE * CHUNKS + chunk, above)


@triton.jit
def _cut(work, top_p, min_p, candidates, VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
         PADDED: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    row, line, extra = _line(work, CHUNKS, WIDTH)
    if tl.load(extra + KIND) == 2:
        num = tl.load(extra + CANDIDATES).to(tl.int32)
        if num > 0:
            best, per_degree = _scale(extra)
            seen, limit, kept = tl.load(extra + SEEN), tl.load(extra + LIMIT), tl.load(extra + TOTAL)
            p = tl.load(top_p + row).to(tl.float64)
            mass = tl.sum(_each(line, ABOVE, 0, CHUNKS, PADDED))
            base = candidates + row * VOCAB
            wanted = tl.full([], float("inf"), tl.float64)
            if (limit < VOCAB) & (p < 1):
                # What top_k leaves is what top_p is a part of.
                last, before, above = _search(base, num, seen, mass, limit, wanted, best, per_degree, False, TILE)
                kept = above + (limit - before) * _weight(
                    _ratio(value_of(last, base.dtype.element_ty), best, per_degree)
                )
            if p < 1:
                wanted = tl.maximum(p * kept.to(tl.float64), 0.5)  # one token stays, whatever top_p is
            last, before, above = _search(base, num, seen, mass, limit, wanted, best, per_degree, True, TILE)
            ratio = _ratio(value_of(last, base.dtype.element_ty), best, per_degree)
            weight = _weight(ratio)
            few, many = tl.full([], 1, tl.int64), limit - before
            while (
                few < many
            ):  # the most of equal tokens that stay: before the last of them the mass is below what is wanted
                half = (few + many + 1) // 2
                is_kept = (above + (half - 1) * weight).to(tl.float64) < wanted
                few = tl.where(is_kept, half, few)
                many = tl.where(is_kept, many, half - 1)
            tl.store(extra + LAST, last)
            tl.store(extra + LAST_KEPT, few)
            tl.store(extra + LAST_WEIGHT, tl.where(ratio < tl.load(min_p + row).to(tl.float64), 0, weight))


@triton.jit
def _search(base, num, seen, mass, limit, wanted, best, per_degree, MAY_MOVE: tl.constexpr, TILE: tl.constexpr):
    """The least key with fewer than `limit` tokens above it, and those of less mass than `wanted`; the number and the mass.

    base: num candidates; seen, mass: the number and the mass of the tokens above them all. MAY_MOVE: the candidates between the
    bounds reached so far may be moved to the front, and the others lost, so that the next pass is shorter."""
    at = tl.arange(0, TILE)
    index = tl.arange(0, PIVOTS)
    lows, highs = tl.full([TILE], 2**63 - 1, tl.int64), tl.full([TILE], -(2**63), tl.int64)
    for start in range(0, num, TILE):
        inside = start + at < num
        key = key_of(tl.load(base + start + at, mask=inside, other=0.0)).to(tl.int64)
        lows = tl.minimum(lows, tl.where(inside, key, 2**63 - 1))
        highs = tl.maximum(highs, tl.where(inside, key, -(2**63)))
    low, high = tl.min(lows), tl.max(highs)
    before = tl.full([], 0, tl.int64) + seen  # of high
    above = mass
    while low < high:
        # Unsigned: keys of float64 may be more than 2^63 apart.
        step = tl.maximum((high - low).to(tl.uint64) >> 3, 1).to(tl.int64)
        pivot = low + index * step
        counts, masses = tl.zeros([PIVOTS, TILE], tl.int32), tl.zeros([PIVOTS, TILE], tl.int64)
        for start in range(0, num, TILE):
            inside = start + at < num
            values = tl.load(base + start + at, mask=inside, other=-float("inf"))
            weight = _weight(_ratio(values, best, per_degree))
            is_above = (key_of(values).to(tl.int64)[None, :] > pivot[:, None]) & inside[None, :]
            counts += is_above.to(tl.int32)
            masses += tl.where(is_above, weight[None, :], 0)
        count = seen + tl.sum(counts, 1)
        weigh = mass + tl.sum(masses, 1)
        is_high = (count < limit) & (weigh.to(tl.float64) < wanted)
        low = tl.maximum(low, tl.max(tl.where(is_high, low, pivot + 1)))
        lowest = tl.min(tl.where(is_high, pivot, high))
        if lowest < high:
            high = lowest
            before = tl.sum(tl.where(pivot == high, count, 0)).to(tl.int64)
            above = tl.sum(tl.where(pivot == high, weigh, 0))
        if (num > TILE) & MAY_MOVE:
            left = 0
            for start in range(0, num, TILE):
                inside = start + at < num
                values = tl.load(base + start + at, mask=inside, other=0.0)
                key = key_of(values).to(tl.int64)
                stays = ((key >= low) & (key <= high) & inside).to(tl.int32)
                # Never behind where it was read: what is overwritten has been read.
                tl.store(base + left + tl.cumsum(stays, 0) - 1, values, mask=stays > 0)
                left += tl.sum(stays)
            tl.debug_barrier()  # the next pass reads what other threads wrote
            num = left
            seen = before
            mass = above
    return high, before, above


# ---- 6 and 7


@triton.jit
def _remain(logits, stride, work, min_p, VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
            PADDED: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    row, line, extra = _line(work, CHUNKS, WIDTH)
    if tl.load(extra + KIND) == 2:
        chunk = tl.program_id(1)
        mass, equal = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
        last = tl.load(extra + LAST)
        if tl.load(line + BEST * CHUNKS + chunk) >= last:
            best, per_degree = _scale(extra)
            _ids, inside, values = _chunk(logits, stride, row, chunk, VOCAB, CHUNK)
            key, ratio = key_of(values).to(tl.int64), _ratio(values, best, per_degree)
            stays = (key > last) & (ratio >= tl.load(min_p + row).to(tl.float64))
            mass = tl.sum(tl.where(stays, _weight(ratio), 0))
            equal = tl.sum(((key == last) & inside).to(tl.int64))
        tl.store(line + MASS * CHUNKS + chunk, mass)
        tl.store(line + EQUAL * CHUNKS + chunk, equal)


@triton.jit
def _draw(logits, stride, work, min_p, seed, position, out, VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
          PADDED: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    row, line, extra = _line(work, CHUNKS, WIDTH)
    if tl.load(extra + KIND) > 0:
        best, per_degree = _scale(extra)
        last, last_kept, last_weight = tl.load(extra + LAST), tl.load(extra + LAST_KEPT), tl.load(extra + LAST_WEIGHT)
        at = tl.arange(0, PADDED)
        equal = _each(line, EQUAL, 0, CHUNKS, PADDED)
        equal_kept = tl.minimum(tl.maximum(last_kept - (tl.cumsum(equal, 0) - equal), 0), equal)
        mass = _each(line, MASS, 0, CHUNKS, PADDED) + equal_kept * last_weight
        total = tl.sum(mass)
        number = uniform(tl.load(seed + row), tl.load(position + row * 2), tl.load(position + row * 2 + 1))
        target = tl.minimum((number * total.to(tl.float64)).to(tl.int64), total - 1)
        chunk = tl.sum((tl.cumsum(mass, 0) <= target).to(tl.int32))
        chunk = tl.minimum(chunk, CHUNKS - 1)
        _ids, inside, values = _chunk(logits, stride, row, chunk, VOCAB, CHUNK)
        key, ratio = key_of(values).to(tl.int64), _ratio(values, best, per_degree)
        is_last = (key == last).to(tl.int64)
        place = tl.sum(tl.where(at < chunk, equal, 0)) + tl.cumsum(is_last, 0)  # among equals, from 1
        stays = ((key > last) | ((is_last > 0) & (place <= last_kept))) & (ratio >= tl.load(min_p + row).to(tl.float64))
        cdf = tl.sum(tl.where(at < chunk, mass, 0)) + tl.cumsum(tl.where(stays, _weight(ratio), 0), 0)
        tl.store(out + row, chunk * CHUNK + tl.sum(((cdf <= target) & inside).to(tl.int64)))


@triton.jit
def uniform(seed, sample_index, position):
    """As the contract's: Triton's Philox has the words in the same order."""
    low, high = position & 0xFFFFFFFF, (position >> 32) & 0xFFFFFFFF
    index = (sample_index & 0xFFFFFFFF).to(tl.uint32)
    a, b, _, _ = tl.philox(seed, low.to(tl.uint32), high.to(tl.uint32), index, index * 0)
    return ((a >> 5).to(tl.float64) * 2.0**26 + (b >> 6).to(tl.float64)) * 2.0**-53
