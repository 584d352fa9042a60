"""generate, embed and count_tokens: an LLM for one call, or the one that is there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vlmfx.checkpoint import Model
from vlmfx.engine.request import RequestOutput, SamplingParams
from vlmfx.errors import InvalidRequest
from vlmfx.llm import LLM, OnError, as_prompt
from vlmfx.options import processor_of
from vlmfx.processing import prompt

log = logging.getLogger("vlmfx")


def generate(
    model: str | Path | Model | LLM,
    prompts: Any,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    use_tqdm: bool = True,
    on_error: OnError = "return",
    on_text: Callable[[int, str], None] | None = None,
    taps: Sequence[str] | None = None,
    **options: Any,
) -> list[RequestOutput]:
    """`LLM(model, **options).generate(prompts, sampling_params, ...)`; an LLM or Model is used as it is, a name loads on each call."""
    llm = _llm_of(model, options)
    return llm.generate(prompts, sampling_params, use_tqdm=use_tqdm, on_error=on_error, on_text=on_text, taps=taps)


def embed(
    model: str | Path | Model | LLM,
    prompts: Any,
    dimensions: int | None = None,
    *,
    use_tqdm: bool = True,
    **options: Any,
) -> torch.Tensor:
    """The embeddings of one prompt or a list of them, (n, dimensions or hidden) float32 on the CPU, each row of unit length.

    prompts, model and options are as in `generate`; dimensions as in `LLM.embed`. A wrong prompt in a list raises BatchError once the
    others are done, whose outputs are those of `LLM.embed`: a row of a matrix could not say that it failed."""
    llm = _llm_of(model, options, task="embed")
    outputs = llm.embed(prompts, dimensions=dimensions, use_tqdm=use_tqdm, on_error="raise")
    width = dimensions or llm.model.config.text.hidden_size
    return torch.tensor([o.outputs.embedding for o in outputs], dtype=torch.float32).reshape(-1, width)


def count_tokens(model: str | Path | Model | LLM, prompt_or_messages: Any, **options: Any) -> int:
    """Tokens of a prompt in any form that `generate` takes, or of a list of chat messages; image headers are read, no pixel is decoded.

    A name loads the processor on each call, not the weights. options are LLM's; those that change no count (dtype, device, task,
    trust_remote_code, max_num_seqs) play no part. Raises InvalidRequest as `generate` would."""
    if isinstance(model, LLM):
        processor = _llm_of(model, options).model.processor
    else:
        processor = processor_of(model, **options)
    return prompt.count_tokens(processor, as_prompt(prompt_or_messages))


def _llm_of(model: str | Path | Model | LLM, options: dict[str, Any], task: str = "generate") -> LLM:
    """The LLM itself, or one with these options."""
    if isinstance(model, LLM):
        if options:
            raise InvalidRequest(next(iter(options)), "the LLM is built already; pass the option to LLM instead.")
        return model
    if not isinstance(model, Model):
        log.info("%s is loaded on each call; keep vlmfx.LLM(...) or vlmfx.load(...) to load it once", model)
    return LLM(model, **{"task": task, **options})
