"""A step as one block run L times, between a prologue and an epilogue: depth then costs nothing to compile.

The pieces are those of `programs.step`, which is the whole form; all layers share a block's program, as their parameters are its
arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from vlmfx.compile.programs import Sampling, Step, choose
from vlmfx.models import decoder
from vlmfx.models.decoder import Carry
from vlmfx.models.layers import Batch, Cache
from vlmfx.models.rope import rope
from vlmfx.ops.rms_norm import rms_norm
from vlmfx.ops.rotary import RotaryTable
from vlmfx.tree import Tree, node

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


@node()
@dataclass(frozen=True, kw_only=True)
class Entered:
    """What the prologue gives the blocks: the carry, the rotary table, and what is added after each of the first layers, if anything."""

    carry: Carry
    table: RotaryTable
    deepstack: Tensor | None


def enter(functions: ModuleType, config: Any, params: Tree, first_norm: Tensor, inputs: Step) -> Entered:
    """The prologue: merge, rotary table, first norm. Of params only the embedding is used."""
    x = functions.merge(params, config, inputs.ids, inputs.features, inputs.feature_index)
    more = functions.text_inputs(config, x, inputs.extras)
    table = rope(config.text, inputs.positions, x.dtype, more.get("factors"))
    carry = Carry(h=rms_norm(x, first_norm, config.text.rms_norm_eps), x=x)
    return Entered(carry=carry, table=table, deepstack=more.get("deepstack"))


def carries(
    block: Callable[..., Carry], params: Tree, entered: Entered, batch: Batch, cache: Cache | None
) -> Iterator[Carry]:
    """The carry after each layer, computed when it is asked for. block: `decoder.block` of a config; the cache is written in place."""
    text, norms = params["text"], decoder.norm_weights(params["text"])
    carry, deepstack = entered.carry, entered.deepstack
    layer_caches = [None] * len(text["layers"]) if cache is None else cache
    for i, (p, kv) in enumerate(zip(text["layers"], layer_caches, strict=True)):
        added = deepstack[i] if deepstack is not None and i < len(deepstack) else None
        carry = block(p, norms[i + 1], carry, entered.table, kv, batch, added)
        yield carry


def leave(
    functions: ModuleType, config: Any, params: Tree, h: Tensor, last: Tensor | None, sampling: Sampling | None
) -> tuple[Tensor, Tensor]:
    """The epilogue: logits of the last tokens, and the next ids. Of params only the head is used, or the embedding it is tied to."""
    return choose(functions.logits(params, config, h if last is None else h[last]), sampling)


class LayeredStep:
    """`programs.step` of a family, from three programs; wrap compiles each of them, or leaves it as it is."""

    def __init__(self, functions: ModuleType, config: Any, wrap: Wrap = lambda fn: fn) -> None:
        self._enter = wrap(partial(enter, functions, config))
        self._block = wrap(partial(decoder.block, config.text))
        self._leave = wrap(partial(leave, functions, config))

    def __call__(self, params: Tree, cache: Cache, inputs: Step) -> tuple[Tensor, Tensor]:
        """The next ids (num_seqs,) int64 and their logits (num_seqs, vocab); the cache is written in place."""
        text = params["text"]
        outer = {"text": {name: text[name] for name in ("embed", "head") if name in text}}
        entered = self._enter(outer, decoder.norm_weights(text)[0], inputs)
        for carry in carries(self._block, params, entered, inputs.batch, cache):
            h = carry.h
        ids, logits = self._leave(outer, h, inputs.last, inputs.sampling)
        return ids, logits
