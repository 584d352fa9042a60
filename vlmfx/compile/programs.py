"""The programs of a model: pure functions of parameters and of tensors whose shapes a bucket fixes.

A family's module and config are fixed when a program is made, by functools.partial; what is left are trees of tensors. The merge of
text and features is inside a step, and so is the choice of the next token: ids may stay on the device from step to step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from vlmfx.models import pooling
from vlmfx.models.layers import Batch, Cache
from vlmfx.models.pooling import Pooling
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.ops.adjust_logits import adjust_logits
from vlmfx.ops.sample import sample
from vlmfx.tree import Tree, node


@dataclass(frozen=True, kw_only=True, eq=False)
class ProgramSet:
    """The programs of one model: a family's functions with all that is fixed in them."""

    functions: ModuleType
    config: Any
    dtype: torch.dtype
    device: torch.device
    pooling: Pooling = "last"

    def program(self, name: str) -> Callable[..., Tree]:
        """encode(params, inputs), prefill(params, cache, inputs), decode(params, cache, inputs) or pool(params, inputs)."""
        fn: Any
        if name == "pool":
            fn = partial(pool, self.functions, self.config, self.pooling)
        else:
            fn = partial(encode if name == "encode" else step, self.functions, self.config)
        fn.__name__ = name  # what errors call it
        return cast(Callable[..., Tree], fn)

    @property
    def row_size(self) -> int:
        """The width of a feature row."""
        return int(getattr(self.config, "row_size", self.config.text.hidden_size))


@node()
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token of each row is drawn; fields as `vlmfx.ops.sample` takes them."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    position: Tensor


@node()
@dataclass(frozen=True, kw_only=True)
class Adjustments:
    """What changes the logits of each row before its next token is drawn; fields as `vlmfx.ops.adjust_logits` takes them."""

    mask: Tensor | None
    bias_ids: Tensor | None
    bias: Tensor | None
    history: Tensor | None
    prompt_lens: Tensor | None
    newest: Tensor | None
    presence: Tensor | None
    frequency: Tensor | None
    repetition: Tensor | None


@node()
@dataclass(frozen=True, kw_only=True)
class Step:
    """The tensors of one prefill or decode step.

    ids (tokens,) int64; positions (tokens,), or (3, tokens) with M-RoPE; features (F, row) and feature_index (tokens,) as `merge` takes
    them, None for text only; extras as the family's `extras` made them. last (num_seqs,) int64: the tokens whose logits are wanted,
    None for all. sampling: None for greedy."""

    ids: Tensor
    positions: Tensor
    batch: Batch
    features: Tensor | None = None
    feature_index: Tensor | None = None
    extras: Tree = ()
    last: Tensor | None = None
    sampling: Sampling | None = None

    @property
    def num_seqs(self) -> int:
        """One a token in decoding."""
        return len(self.ids) if self.batch.cu_seqlens is None else len(self.batch.cu_seqlens) - 1


def encode(functions: ModuleType, config: Any, params: Tree, inputs: VisionInputs) -> Tensor:
    """Feature rows (F, row) of images and videos, in order."""
    rows: Tensor = functions.encode(params, config, inputs)
    return rows


def step(functions: ModuleType, config: Any, params: Tree, cache: Cache, inputs: Step) -> tuple[Tensor, Tensor]:
    """Prefill or decode: the next ids (num_seqs,) int64 and their logits (num_seqs, vocab); the cache is written in place."""
    return choose(functions.logits(params, config, _hidden(functions, config, params, inputs, cache)), inputs.sampling)


def choose(logits: Tensor, sampling: Sampling | None, adjustments: Adjustments | None = None) -> tuple[Tensor, Tensor]:
    """The next ids (rows,) int64 of logits (rows, vocab), and the logits, as they were: adjustments show only in the ids."""
    a, s, adjusted = adjustments, sampling, logits
    if a is not None:
        said = a.history, a.prompt_lens, a.newest, a.presence, a.frequency, a.repetition
        adjusted = adjust_logits(logits, a.mask, a.bias_ids, a.bias, *said)
    if s is None:
        return adjusted.argmax(-1), logits
    return sample(adjusted, s.temperature, s.top_k, s.top_p, s.min_p, s.seed, s.position), logits


def pool(functions: ModuleType, config: Any, kind: Pooling, params: Tree, inputs: Step) -> Tensor:
    """One vector a sequence (num_seqs, hidden) float32, not yet of unit length; `last` of the inputs is not used, nor is a cache."""
    hidden = _hidden(functions, config, params, inputs, None)
    assert inputs.batch.cu_seqlens is not None, "pooling knows where sequences end"
    return pooling.pool(hidden, inputs.batch.cu_seqlens, kind)


def _hidden(functions: ModuleType, config: Any, params: Tree, inputs: Step, cache: Cache | None) -> Tensor:
    x = functions.merge(params, config, inputs.ids, inputs.features, inputs.feature_index)
    hidden: Tensor
    hidden, _ = functions.forward(params, config, x, inputs.positions, cache, inputs.batch, inputs.extras)
    return hidden if inputs.last is None else hidden[inputs.last]
