"""Logits to the next token ids: temperature, top-k, top-p and min-p, then one counter-based draw a row.

A draw depends on its row's logits, parameters, seed and position, and on nothing else: the random number is counter-based, and
probabilities are integers, whose sums do not depend on the order or the length they are taken in. Semantics follow
vllm-project/vllm: vllm/v1/sample/; ties, which vLLM leaves to the sort, always go to the lowest id."""

from __future__ import annotations

from math import inf, isfinite

import torch
from torch import Tensor

from vlmfx.ops.registry import Cost, nbytes, refuse, register

# The most likely token weighs 2^44 and the others in proportion: room for 2^18 of that weight in an int64 (and for
# vocabularies up to 2^19 - 1), while what rounds to zero is, all together, less than 2^-26 of the mass.
WEIGHT_OF_BEST = 2.0**44
MAX_VOCAB = 2**19 - 1


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    """logits (rows, vocab) of any float dtype → the next ids (rows,) int64.

    A row each: temperature, top_p, min_p (rows,) float32, top_k (rows,) int32, seed (rows,) int64, whose 64 bits are the key, and
    position (rows, 2) int64: the sample index and the index of the drawn token in its sequence, which are the counter.

    Temperature 0 is the argmax. Else temperature, top_k (0 is off), top_p (1 is off; the fewest whose mass reaches it, one at
    least) and min_p (0 is off) in this order, then inverse CDF in id order. -inf is never drawn; a row with NaN, +inf or nothing
    but -inf has no distribution and gives its argmax, so that it cannot disturb its batch mates.

    Kernels agree with the reference but for the last bit of exp in float64, which moves a token once in some 10^13 draws. That of mlu,
    a chip without float64, has 47 bits of it: a weight is one more or less now and then, which moves a token once in 10^7 to 10^12
    draws, most often where many unlikely tokens stay. Raises ShapeError."""
    return OP(logits, temperature, top_k, top_p, min_p, seed, position)


def reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    """The definition of right: sorted, with the lower id first among equals, a token stays by what comes before it."""
    x = logits.detach()
    best = x.amax(dim=1, keepdim=True)
    is_random = best.isfinite() & (temperature[:, None] > 0)
    x, best = x.masked_fill(~is_random, 0.0), best.masked_fill(~is_random, 0.0)
    ratio, weight = _weights(x, best, temperature.masked_fill(~is_random[:, 0], 1.0))
    vocab = x.shape[1]
    order = x.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(vocab, device=x.device)
    limit = top_k.masked_fill(top_k <= 0, vocab)[:, None]
    mass = weight.gather(1, order).masked_fill_(place >= limit, 0)
    before = mass.cumsum(dim=1) - mass
    # Infinite where top_p is off: what comes before a token can reach all there is, by rounding.
    share = top_p.double().masked_fill(top_p >= 1, inf)[:, None]
    wanted = share * mass.sum(dim=1, keepdim=True)
    mass = mass.masked_fill_((before >= wanted) & (place > 0), 0)
    weight = torch.zeros_like(weight).scatter_(1, order, mass).masked_fill_(ratio < min_p[:, None], 0)
    return _inverse_cdf(weight, seed, position).where(is_random[:, 0], logits.argmax(dim=1))


def cpu(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    """As the reference, but a row that does not draw is an argmax, and a row sorts only what a filter may cut among."""
    best = logits.amax(dim=1, keepdim=True)
    degrees = zip(temperature.tolist(), best.tolist(), strict=True)
    draws = [i for i, (degree, (top,)) in enumerate(degrees) if degree > 0 and isfinite(top)]
    if not draws or len(draws) < len(logits):
        ids = logits.argmax(dim=1)
        if draws:
            at = torch.tensor(draws)
            state = (t.index_select(0, at) for t in (logits, temperature, top_k, top_p, min_p, seed, position))
            ids.index_copy_(0, at, cpu(*state))
        return ids
    ratio, weight = _weights(logits, best, temperature)
    cut = [i for i, (k, p) in enumerate(zip(top_k.tolist(), top_p.tolist(), strict=True)) if k > 0 or p < 1]
    if len(cut) == len(logits):
        weight *= kept(logits, weight, top_k, top_p)
    elif cut:
        at = torch.tensor(cut)
        weight[at] *= kept(logits[at], weight[at], top_k[at], top_p[at])
    if any(min_p.tolist()):
        weight.masked_fill_(ratio < min_p[:, None], 0)
    return _inverse_cdf(weight, seed, position)


def kept(x: Tensor, weight: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Which tokens stay (rows, vocab): the top_k largest of x, and of these the fewest whose weight reaches top_p of theirs."""
    vocab = x.shape[1]
    limits = [k if 0 < k < vocab else vocab for k in top_k.tolist()]
    limit = torch.tensor([[k] for k in limits])
    share = torch.tensor([[p if p < 1 else inf] for p in top_p.tolist()], dtype=torch.float64)
    total = weight.sum(dim=1, keepdim=True)
    # Tokens below (1 - top_p) / vocab of the mass lie outside top_p even all together, so only the others need sorting:
    # some hundreds of 150,000 in real text. Half of it, so that no rounding matters.
    likely = (weight >= (1 - share) * total / (2 * vocab)).sum(dim=1).tolist()
    width = max(many if k == vocab else k for k, many in zip(limits, likely, strict=True))
    best = x.topk(width, dim=1)
    is_within = torch.arange(width) < limit
    mass = weight.gather(1, best.indices).mul_(is_within)
    before = mass.cumsum(dim=1) - mass
    wanted = share * mass.sum(dim=1, keepdim=True).where(limit < vocab, total)
    count = ((before < wanted) & is_within).sum(dim=1, keepdim=True).clamp_(min=1)
    return largest(x, best.values, count)


def largest(x: Tensor, ordered: Tensor, count: Tensor) -> Tensor:
    """True at the count (rows, 1) largest of each row of x, the lowest id first among equals; ordered: x's largest."""
    least = ordered.gather(1, count - 1)
    above, equal = x > least, x == least
    return above | (equal & (equal.cumsum(dim=1) <= count - above.sum(dim=1, keepdim=True)))


def uniform(seed: int, sample_index: int, position: int) -> float:
    """A multiple of 2^-53 in [0, 1): Philox4x32-10 with the 64 bits of seed as key and the rest as counter.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011); its known answers are in the tests."""
    word = 0xFFFFFFFF
    counter = (position & word, position >> 32 & word, sample_index & word, 0)
    a, b, _, _ = philox4x32(counter, (seed & word, seed >> 32 & word))
    return ((a >> 5) * 2**26 + (b >> 6)) / 2**53


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random 32-bit words, after ten rounds."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = q >> 32 ^ b ^ k0, q & 0xFFFFFFFF, p >> 32 ^ d ^ k1, p & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return a, b, c, d


def _weights(x: Tensor, best: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's share of the best's probability, in float64, and as an integer; best (rows, 1) is finite."""
    # The best subtracted first: the exponent is then 0 or below, and the smallest temperature cannot overflow.
    below = x.double() - best
    ratio = below.mul_(temperature.double().reciprocal_()[:, None]).exp_()
    return ratio, (ratio * WEIGHT_OF_BEST).round_().long()


def _inverse_cdf(weight: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """Each row's first id whose running sum exceeds its random share of the whole."""
    keys = zip(seed.tolist(), position.tolist(), strict=True)
    number = torch.tensor([uniform(s, *at) for s, at in keys], dtype=torch.float64, device=weight.device)
    cdf = weight.cumsum(dim=1)
    total = cdf[:, -1:]
    target = (number[:, None] * total).long().minimum(total - 1)
    return torch.searchsorted(cdf, target, right=True)[:, 0]


def check(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> None:
    """Raise ShapeError for what the kernels do not take."""
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_VOCAB:
        refuse("sample", "logits", logits.shape, f"shape (rows, vocab) with a vocab of 1 to {MAX_VOCAB}")
    if not logits.is_floating_point():
        refuse("sample", "logits", logits.dtype, "a float dtype")
    rows = logits.shape[0]
    for name, tensor, shape, dtype in (
        ("temperature", temperature, (rows,), torch.float32),
        ("top_k", top_k, (rows,), torch.int32),
        ("top_p", top_p, (rows,), torch.float32),
        ("min_p", min_p, (rows,), torch.float32),
        ("seed", seed, (rows,), torch.int64),
        ("position", position, (rows, 2), torch.int64),
    ):
        if tensor.shape != shape:
            refuse("sample", name, tensor.shape, f"shape {shape}, as logits have {rows} rows")
        if tensor.dtype != dtype:
            refuse("sample", name, tensor.dtype, str(dtype))


OP = register(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor position) -> Tensor",
    reference=reference,
    cpu=cpu,
    fake=lambda logits, *_: logits.new_empty(logits.shape[:1], dtype=torch.int64),
    check=check,
    # of float64: a difference, a product, exp and a sum a logit
    cost=lambda logits, *state: Cost(flops=24 * logits.numel(), bytes=nbytes(logits, *state) + 8 * logits.shape[0]),
    kernels={"cuda": "triton.sample"},
    tolerance={},
)
