"""Logits as a request's parameters change them before a token is drawn: a mask, a bias, and penalties for what has been said.

Order and meaning follow vllm-project/vllm: vllm/v1/sample/sampler.py: apply_logits_processors (allowed tokens, bad words, min_tokens and
logit_bias, then penalties; temperature and filters come after, in `sample`) and vllm/model_executor/layers/utils.py: apply_penalties.
What forbids tokens is one mask here; a masked token stays masked, whatever is added to it."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmfx.ops.registry import Cost, nbytes, refuse, register, wide


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
    """logits (rows, vocab) of any float dtype → a new tensor of their shape, float32 (float64 of float64).

    float32, because in 16 bits a bias of 0.1 would be lost beside a logit of 20, and tokens that differ would tie; it holds 16 bits
    exactly, so a row that nothing changes is drawn from as it was. vLLM computes in float32, too.

    mask (rows, ceil(vocab / 32)) int32: token i may come where bit i % 32 of word i // 32 is 1, the others become -inf; None is all.
    bias_ids (rows, K) int32, bias (rows, K) float32: what is added to a token's logit; the ids of a row differ, -1 is padding.
    history (rows, L) int32: the tokens of the prompt, then of the answer, -1 is padding; prompt_lens (rows,) int32: how many of them are
    the prompt; newest (rows,) int64: one more token of the answer, -1 for none. repetition (rows,) float32, above 0, divides the
    positive logits, and multiplies the others, of tokens in either (1 is off); frequency · count and presence, (rows,) float32 each, are
    then subtracted from those of tokens in the answer (0 is off). Ids outside the vocabulary count as padding.

    bias_ids and bias are both None or neither, and so are history and what follows it. Raises ShapeError."""
    return OP(logits, mask, bias_ids, bias, history, prompt_lens, newest, presence, frequency, repetition)


def reference(
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
    """The definition of right."""
    x, vocab = wide(logits).clone(), logits.shape[1]
    if mask is not None:
        ids = torch.arange(vocab, device=x.device)
        x = x.masked_fill((mask[:, ids // 32] >> (ids % 32)) & 1 == 0, -torch.inf)
    if bias_ids is not None and bias is not None:
        index = _within(bias_ids, vocab)
        added = bias.new_zeros(len(x), vocab + 1).scatter(1, index, bias)[:, :vocab]
        x = torch.where(_counts(index, vocab) > 0, x + added, x)  # not where nothing is added: -0.0 + 0.0 is 0.0
    if history is None:
        return x
    assert prompt_lens is not None
    assert newest is not None
    assert presence is not None
    assert frequency is not None
    assert repetition is not None
    said = _within(torch.cat([history, newest[:, None]], dim=1), vocab)
    at = torch.arange(said.shape[1], device=x.device)
    is_answer = (at >= prompt_lens[:, None]) | (at == history.shape[1])
    counts = _counts(said.masked_fill(~is_answer, vocab), vocab)
    repetition, presence, frequency = repetition[:, None], presence[:, None], frequency[:, None]
    x = torch.where(_counts(said, vocab) > 0, torch.where(x > 0, x / repetition, x * repetition), x)
    return torch.where(counts > 0, x - frequency * counts - presence, x)


def _within(ids: Tensor, vocab: int) -> Tensor:
    """ids as int64, with vocab in place of those that are not tokens."""
    return ids.long().masked_fill((ids < 0) | (ids >= vocab), vocab)


def _counts(index: Tensor, vocab: int) -> Tensor:
    """(rows, vocab) int32: how often each token is in the rows of index, which are 0 to vocab."""
    counts = index.new_zeros(len(index), vocab + 1, dtype=torch.int32)
    return counts.scatter_add(1, index, torch.ones_like(index, dtype=torch.int32))[:, :vocab]


def check(
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
) -> None:
    """Raise ShapeError for what the kernels do not take."""
    if logits.dim() != 2:
        refuse("adjust_logits", "logits", logits.shape, "shape (rows, vocab)")
    if not logits.is_floating_point():
        refuse("adjust_logits", "logits", logits.dtype, "a float dtype")
    rows, vocab = logits.shape
    num_biases = bias_ids.shape[-1] if bias_ids is not None else 0
    length = history.shape[-1] if history is not None else 0
    for leader, name, tensor, shape, dtype in (
        (mask, "mask", mask, (rows, -(-vocab // 32)), torch.int32),
        (bias_ids, "bias_ids", bias_ids, (rows, num_biases), torch.int32),
        (bias_ids, "bias", bias, (rows, num_biases), torch.float32),
        (history, "history", history, (rows, length), torch.int32),
        (history, "prompt_lens", prompt_lens, (rows,), torch.int32),
        (history, "newest", newest, (rows,), torch.int64),
        (history, "presence", presence, (rows,), torch.float32),
        (history, "frequency", frequency, (rows,), torch.float32),
        (history, "repetition", repetition, (rows,), torch.float32),
    ):
        if (tensor is None) != (leader is None):
            whole = "bias_ids" if name == "bias" else "history"
            refuse("adjust_logits", name, "none" if tensor is None else "a tensor", f"to go with {whole}")
        if tensor is not None and tensor.shape != shape:
            refuse("adjust_logits", name, tensor.shape, f"shape {shape}, as logits have shape {tuple(logits.shape)}")
        if tensor is not None and tensor.dtype != dtype:
            refuse("adjust_logits", name, tensor.dtype, str(dtype))


def fake(logits: Tensor, *_: Tensor | None) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


def cost(logits: Tensor, *state: Tensor | None) -> Cost:
    """A few operations a token of the history, and of the others none."""
    history = state[3]
    return Cost(
        flops=5 * (history.numel() if history is not None else 0),
        bytes=nbytes(logits, *state) + logits.numel() * (8 if logits.dtype == torch.float64 else 4),
    )


OP = register(
    "adjust_logits(Tensor logits, Tensor? mask, Tensor? bias_ids, Tensor? bias, Tensor? history, Tensor? prompt_lens, "
    "Tensor? newest, Tensor? presence, Tensor? frequency, Tensor? repetition) -> Tensor",
    reference=reference,
    fake=fake,
    check=check,
    cost=cost,
    kernels={"cuda": "triton.adjust_logits"},
    tolerance={torch.float64: 1e-12, torch.float32: 2e-6},
    is_inline=True,
)
