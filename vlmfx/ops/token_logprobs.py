"""Log-probabilities of the sampled token and of the most likely ones, by rank."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfx.ops.registry import Cost, nbytes, refuse, register, wide
from vlmfx.ops.sample import largest


def token_logprobs(logits: Tensor, ids: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits (rows, vocab), the sampled ids (rows,) int64 → ids (rows, 1 + num) int64, their log-probabilities, float32, and the
    rank (rows,) int64 of the sampled one.

    The sampled id comes first, then the num most likely by rank, itself perhaps among them. Rank 1 is the most likely, and of
    equal logits the lower id ranks first; NaN ranks as -inf. float32 log-softmax of the logits as given, before temperature and
    filters. Raises ShapeError."""
    return OP(logits, ids, num)


def reference(logits: Tensor, ids: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of right, and the CPU kernel: of the most likely it sorts no more than num."""
    x = wide(logits.detach())
    x = x.masked_fill(x.isnan(), -torch.inf)  # ranks only: NaN compares with nothing
    chosen = ids[:, None].clone()  # an op must not return its argument
    own = x.gather(1, chosen)
    lower_id = torch.arange(x.shape[1], device=x.device) < chosen
    rank = 1 + (x > own).sum(1) + ((x == own) & lower_id).sum(1)
    if num:
        count = torch.full((len(x), 1), num, device=x.device)
        best = largest(x, x.topk(num).values, count).nonzero()[:, 1].reshape(len(x), num)
        best = best.gather(1, x.gather(1, best).sort(dim=1, descending=True, stable=True).indices)
        chosen = torch.cat([chosen, best], dim=1)
    return chosen, logits.float().log_softmax(dim=-1).gather(1, chosen), rank


def check(logits: Tensor, ids: Tensor, num: int) -> None:
    """Raise ShapeError for what the kernels do not take."""
    if logits.dim() != 2 or not logits.shape[1]:
        refuse("token_logprobs", "logits", logits.shape, "shape (rows, vocab) with a vocab of at least 1")
    if not logits.is_floating_point():
        refuse("token_logprobs", "logits", logits.dtype, "a float dtype")
    if ids.shape != logits.shape[:1]:
        refuse("token_logprobs", "ids", ids.shape, f"shape ({logits.shape[0]},), as logits have {logits.shape[0]} rows")
    if ids.dtype != torch.int64:
        refuse("token_logprobs", "ids", ids.dtype, "torch.int64")
    if not 0 <= num <= logits.shape[1]:
        refuse("token_logprobs", "num", num, f"0 to {logits.shape[1]}, as many as logits have tokens")


def fake(logits: Tensor, ids: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (logits.shape[0], 1 + num)
    return ids.new_empty(shape), logits.new_empty(shape, dtype=torch.float32), ids.new_empty(shape[:1])


def cost(logits: Tensor, ids: Tensor, num: int) -> Cost:
    """A difference, exp, a sum and two comparisons a logit."""
    return Cost(flops=5 * logits.numel(), bytes=nbytes(logits, ids) + logits.shape[0] * (12 * (1 + num) + 8))


OP = register(
    "token_logprobs(Tensor logits, Tensor ids, int num) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=fake,
    check=check,
    cost=cost,
    kernels={"cuda": "triton.token_logprobs"},
    tolerance={torch.float32: 1e-5},
    is_inline=True,
)
