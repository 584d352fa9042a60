"""Log-probabilities of a prompt's own tokens: what the model thought of each, given those before it."""

from __future__ import annotations

from functools import lru_cache

import torch

from vlmfx.checkpoint import Model
from vlmfx.engine.request import Logprob
from vlmfx.engine.sampler import logprobs
from vlmfx.engine.taps import tap
from vlmfx.processing.inputs import ModelInputs

MAX_TILE_BYTES = 2**26  # of float32 logits: 110 rows of a vocabulary of 152,064


@torch.no_grad()
def prompt_logprobs(
    model: Model, inputs: ModelInputs, num: int, *, max_len: int | None = None
) -> list[dict[int, Logprob] | None]:
    """An entry a token of the prompt: None for the first, then {id: Logprob}, the token itself first and after it the num most likely.

    As vLLM's `RequestOutput.prompt_logprobs`: of the logits as the model gives them, in float32; an image's places are its placeholders.
    Computed in a pass of the prompt by itself, as `tap` is, with its max_len; logits are made for some rows at a time, never for all of
    a long prompt."""
    hidden = tap(model, inputs, ["hidden"], max_len=max_len)["hidden"][:-1]
    ids, tokenizer = torch.tensor(inputs.token_ids[1:], device=hidden.device), model.processor.tokenizer
    text = lru_cache(maxsize=None)(lambda i: tokenizer.decode([i], skip_special_tokens=False))  # of few tokens, often
    rows = max(1, MAX_TILE_BYTES // (4 * model.config.text.vocab_size))
    out: list[dict[int, Logprob] | None] = [None]
    for start in range(0, len(hidden), rows):
        tile = slice(start, start + rows)
        logits = model.functions.logits(model.params, model.config, hidden[tile])
        for found in logprobs(logits, ids[tile], [num] * len(logits)):
            out.append({i: Logprob(value, rank, text(i)) for i, (value, rank) in (found or {}).items()})
    return out
