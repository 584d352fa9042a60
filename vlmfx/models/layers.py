"""The parts that model families share: specs and functions of norms, projections, attention and MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from vlmfx.ops.paged_decode_attention import DecodeWork
from vlmfx.tree import Tree, node
from vlmfx.weights import ParamSpec, spec

Cache = Sequence[tuple[Tensor, Tensor]]  # (k, v) a layer, each [num_blocks, num_kv_heads, block_size, head_dim]


@node()
@dataclass(frozen=True, kw_only=True)
class Batch:
    """What attention must know of one step's packed tokens, besides the tokens themselves; all numbers are int32.

    Prefill: cu_seqlens (num_seqs + 1,), the new tokens of each sequence, those after the last being padding; prefix_lens (num_seqs,),
    how many tokens each has in the cache already, None for none. Decode: context_lens (num_seqs,), the tokens of each sequence, of
    which the last is new; work, how the contexts are shared out, see `decode_work`. In both slot_mapping (tokens,) is where new keys
    and values go, −1 for nowhere, and block_table (num_seqs, max_blocks) where a sequence's are, None where sequence i owns block i.

    mask (num_seqs, 1, T, T) bool, for sequences of one length T without a cache, says which pairs attend in place of the causal
    rule: training packs several answers to one picture into a sequence."""

    cu_seqlens: Tensor | None = None
    prefix_lens: Tensor | None = None
    context_lens: Tensor | None = None
    work: DecodeWork | None = None
    slot_mapping: Tensor | None = None
    block_table: Tensor | None = None
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
