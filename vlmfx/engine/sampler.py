"""Logits to token ids and log-probabilities, as pure functions of tensors.

A draw depends on its row's logits, its parameters, its seed and its position, and on nothing else: the random number is
counter-based, and probabilities are integers, whose sums do not depend on the order or the length they are taken in.
Semantics follow vllm-project/vllm: vllm/v1/sample/; ties, which vLLM leaves to the sort, always go to the lowest id.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmfx.engine.request import SamplingParams
from vlmfx.errors import ShapeError

# The most likely token weighs 2^44 and the others in proportion: room for 2^18 of that weight in an int64 (and for
# vocabularies up to 2^19 - 1), while what rounds to zero is, all together, less than 2^-26 of the mass.
_WEIGHT_OF_BEST = 2.0**44


def sample(logits: Tensor, params: Sequence[SamplingParams], seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """logits (rows, vocab), any float dtype → the next ids (rows,) int64 on the same device.

    positions[i] is the index of the drawn token in its sequence; it and seeds[i] (64 bits) key the draw. Temperature 0
    is the argmax. Else temperature, top_k, top_p and min_p in this order, then inverse CDF in id order. -inf is never
    drawn; a row with NaN, +inf or nothing but -inf has no distribution and gives its argmax, so that it cannot
    disturb its batch mates. Raises ShapeError."""
    rows = len(params)
    if logits.dim() != 2 or not logits.shape[0] == rows == len(seeds) == len(positions):
        raise ShapeError(
            f"sample: logits have shape {tuple(logits.shape)} beside {rows} params, {len(seeds)} seeds and "
            f"{len(positions)} positions; pass (rows, vocab) logits and one of each a row."
        )
    random = [i for i, p in enumerate(params) if p.temperature > 0]
    if not random:
        return logits.argmax(dim=-1)
    uniforms = [uniform(seeds[i], 0, positions[i]) for i in random]
    if len(random) == rows:
        return _draw(logits, params, uniforms)
    at = torch.tensor(random, device=logits.device)
    ids = logits.argmax(dim=-1)
    ids[at] = _draw(logits[at], [params[i] for i in random], uniforms)
    return ids


def logprobs(logits: Tensor, ids: Tensor, num: Sequence[int | None]) -> list[dict[int, tuple[float, int]] | None]:
    """logits (rows, vocab), the sampled ids (rows,) → for each row {id: (log-probability, rank)}, or None where num is.

    The sampled id comes first, then the num most likely by rank; rank 1 is the most likely, and of equal logits the
    lower id ranks first. float32 log-softmax of the logits as given, before temperature and filters. Raises
    ShapeError."""
    if logits.dim() != 2 or not logits.shape[0] == ids.numel() == len(num):
        raise ShapeError(
            f"logprobs: logits have shape {tuple(logits.shape)} beside {ids.numel()} ids and {len(num)} numbers; "
            "pass (rows, vocab) logits and one of each a row."
        )
    out: list[dict[int, tuple[float, int]] | None] = [None] * len(num)
    asked = [(i, n) for i, n in enumerate(num) if n is not None]
    if not asked:
        return out
    at = torch.tensor([i for i, _ in asked], device=logits.device)
    x = logits[at]
    x = x if x.dtype == torch.float64 else x.float()
    values = x.float().log_softmax(dim=-1)
    x = x.masked_fill(x.isnan(), -torch.inf)  # ranks only: NaN compares with nothing
    chosen = ids[at].reshape(-1, 1)
    own = x.gather(1, chosen)
    lower_id = torch.arange(x.shape[1], device=x.device) < chosen
    rank = 1 + (x > own).sum(1, keepdim=True) + ((x == own) & lower_id).sum(1, keepdim=True)
    most = min(max(n for _, n in asked), x.shape[1])
    if most:
        count = torch.full((len(asked), 1), most, device=x.device)
        best = _largest(x, x.topk(most).values, count).nonzero()[:, 1].reshape(-1, most)
        best = best.gather(1, x.gather(1, best).sort(dim=1, descending=True, stable=True).indices)
        chosen = torch.cat([chosen, best], dim=1)
    table = zip(asked, chosen.tolist(), values.gather(1, chosen).tolist(), rank[:, 0].tolist(), strict=True)
    for (i, n), (first, *rest), (value, *others), own_rank in table:
        out[i] = {first: (value, own_rank)}
        for r, (token, logprob) in enumerate(zip(rest[:n], others[:n], strict=True)):
            out[i].setdefault(token, (logprob, r + 1))  # type: ignore[union-attr]
    return out


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


def _draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """Ids (rows,) of rows that all have a temperature above 0."""
    # float64 and int64 arithmetic is not to be had on every accelerator (MLU370); there the host draws.
    device = logits.device if logits.device.type in ("cpu", "cuda") else torch.device("cpu")

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    x = logits.to(device, torch.float64)
    best = x.amax(dim=1, keepdim=True)
    sound = best.isfinite()
    x = x.masked_fill(~sound, 0.0)
    # The best subtracted first: a quotient is then 0 or below, and the smallest temperature cannot overflow.
    ratio = ((x - best.where(sound, 0.0)) / column([p.temperature for p in params])).exp_()
    weight = (ratio * _WEIGHT_OF_BEST).round_().long()
    cut = [i for i, p in enumerate(params) if p.top_k or p.top_p < 1]
    if len(cut) == len(params):
        weight *= _top_k_top_p(x, weight, params)
    elif cut:
        at = torch.tensor(cut, device=device)
        weight[at] *= _top_k_top_p(x[at], weight[at], [params[i] for i in cut])
    if any(p.min_p for p in params):
        weight.masked_fill_(ratio < column([p.min_p for p in params]), 0)
    cdf = weight.cumsum(dim=1)
    total = cdf[:, -1:]
    target = (column(uniforms) * total).long().minimum(total - 1)
    ids = torch.searchsorted(cdf, target, right=True)  # the first id whose running sum exceeds the target
    return ids[:, 0].to(logits.device).where(sound[:, 0].to(logits.device), logits.argmax(dim=-1))


def _top_k_top_p(x: Tensor, weight: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Which tokens stay: the top_k largest, and of these the fewest whose mass reaches top_p of theirs."""
    vocab = x.shape[1]
    limit = torch.tensor([[min(p.top_k or vocab, vocab)] for p in params], device=x.device)
    top_p = torch.tensor([[p.top_p] for p in params], dtype=torch.float64, device=x.device)
    total = weight.sum(dim=1, keepdim=True)
    # Tokens below (1 - top_p) / vocab of the mass lie outside top_p even all together, so only the others need sorting:
    # some hundreds of 150,000 in real text. Half of it, so that no rounding matters.
    likely = (weight >= (1 - top_p) * total / (2 * vocab)).sum(dim=1, keepdim=True)
    width = limit.where(limit < vocab, likely)
    best = x.topk(int(width.max()), dim=1)  # int() waits for the device; a captured graph needs a fixed width instead
    place = torch.arange(best.values.shape[1], device=x.device)
    mass = weight.gather(1, best.indices).masked_fill_(place >= limit, 0)
    before = mass.cumsum(dim=1) - mass
    wanted = top_p * mass.sum(dim=1, keepdim=True).where(limit < vocab, total)
    count = (before < wanted).sum(dim=1, keepdim=True).clamp_(min=1)
    return _largest(x, best.values, count)


def _largest(x: Tensor, ordered: Tensor, count: Tensor) -> Tensor:
    """True at the count (rows, 1) largest of each row of x, the lowest id first among equals; ordered: x's largest."""
    least = ordered.gather(1, count - 1)
    above, equal = x > least, x == least
    return above | (equal & (equal.cumsum(dim=1) <= count - above.sum(dim=1, keepdim=True)))
