"""The parts that model families share: specs and functions of norms, projections, attention and MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfx.ops.attention import Slots
from vlmfx.tree import Tree
from vlmfx.weights import ParamSpec, spec

Cache = Sequence[tuple[Tensor, Tensor]]  # (k, v) a layer, each [num_blocks, num_kv_heads, block_size, head_dim]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What attention must know of one step's packed tokens, besides the tokens themselves.

    seq_lens: new tokens of each sequence in packed order; tokens after them are padding. None is a decode step: one new token
    a sequence, which attends to its block of the cache. slots: where new keys and values go in a cache, see `cache_write`.
    mask, broadcast to (num_seqs, heads, queries, keys): in decode what is added to the scores, −inf beyond each context, None
    where all are equally long; in prefill True for the pairs that attend, None for the causal rule."""

    seq_lens: tuple[int, ...] | None
    slots: Slots | None = None
    mask: Tensor | None = None


def no_extras(
    cfg: object,
    max_lens: Sequence[int],
    seq_lens: Sequence[int],
    num_tokens: int,
    features: Tensor | None,
    feature_index: Tensor | None,
) -> Tree:
    """What a family's forward wants of a step beyond the common inputs: nothing, here.

    max_lens: the most tokens each sequence may ever have; seq_lens: its tokens in this step, of num_tokens with padding; features
    and feature_index as in `merge`."""
    return ()


def norm_spec(at: str, size: int) -> ParamSpec:
    """The weight of an RMS norm."""
    return spec(f"{at}.weight", (size,), ("embed",), init="ones")


def layer_norm_specs(at: str, size: int) -> Tree:
    """Weight and bias of a layer norm."""
    return {"weight": norm_spec(at, size), "bias": spec(f"{at}.bias", (size,), ("embed",), init="zeros")}


def linear_specs(at: str, inputs: int, outputs: int, axes: tuple[str | None, str | None]) -> Tree:
    """Weight (outputs, inputs) and bias (outputs,) of an affine map; axes name (outputs, inputs)."""
    return {
        "weight": spec(f"{at}.weight", (outputs, inputs), axes),
        "bias": spec(f"{at}.bias", (outputs,), axes[:1], init="zeros"),
    }


def linear(p: Tree, x: Tensor) -> Tensor:
    """x (..., inputs) → (..., outputs)."""
    return F.linear(x, p["weight"], p.get("bias"))


def add_linear(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """residual + x·weightᵀ, the addition inside the matmul; residual (tokens, outputs), x (tokens, inputs)."""
    return torch.addmm(residual, x, weight.t())
