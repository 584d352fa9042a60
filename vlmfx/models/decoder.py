"""The decoder of Llama and its kin (RMS norm, rotary grouped-query attention, SwiGLU), which Qwen2 extends by biases and M-RoPE.

Source: huggingface/transformers: src/transformers/models/{llama,qwen2,qwen2_vl}/."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfx.models.layers import Batch, Cache, norm_spec
from vlmfx.models.rope import LongRope, rope
from vlmfx.models.validate import MAX_LAYERS, multiple_of, one_of, positive_float, positive_int, refuse
from vlmfx.ops.add_rms_norm import add_rms_norm
from vlmfx.ops.gated_activation import gated_activation
from vlmfx.ops.paged_decode_attention import paged_decode_attention
from vlmfx.ops.prefill_attention import prefill_attention
from vlmfx.ops.rms_norm import rms_norm
from vlmfx.ops.rotary import RotaryTable, rotary
from vlmfx.ops.rotary_cache_write import rotary_cache_write
from vlmfx.tree import Tree, node
from vlmfx.weights import fused, spec


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What changes the decoder's arithmetic, and what its weights are called.

    mrope_section: how many of the head_dim/2 frequencies follow time, height and width; empty for one position a token.
    qk_norm: an RMS norm on each head of q and k. stored_fused: the checkpoint keeps q, k, v, and gate and up, as one matrix each."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    qkv_bias: bool = False
    tie_word_embeddings: bool = False
    mrope_section: tuple[int, ...] = ()
    mrope_interleaved: bool = False
    long_rope: LongRope | None = None
    qk_norm: bool = False
    stored_fused: bool = False

    def __post_init__(self) -> None:
        positive_int("vocab_size", self.vocab_size)
        positive_int("hidden_size", self.hidden_size)
        positive_int("intermediate_size", self.intermediate_size)
        positive_int("num_hidden_layers", self.num_layers, most=MAX_LAYERS)
        positive_int("num_attention_heads", self.num_heads)
        positive_int("num_key_value_heads", self.num_kv_heads)
        multiple_of("num_attention_heads", self.num_heads, "num_key_value_heads", self.num_kv_heads)
        if positive_int("head_dim", self.head_dim) % 2:
            refuse(
                "head_dim", self.head_dim, "an even number (it is hidden_size / num_attention_heads where not given)"
            )
        positive_float("rms_norm_eps", self.rms_norm_eps)
        positive_float("rope_theta", self.rope_theta)
        positive_int("max_position_embeddings", self.max_position_embeddings)
        one_of("attention_bias", self.qkv_bias, (True, False))
        one_of("tie_word_embeddings", self.tie_word_embeddings, (True, False))


def head_dim(hidden_size: Any, num_heads: Any) -> int:
    """hidden_size / num_attention_heads, the width of a head that a config does not give."""
    heads = positive_int("num_attention_heads", num_heads)
    return multiple_of("hidden_size", positive_int("hidden_size", hidden_size), "num_attention_heads", heads) // heads


def param_specs(cfg: DecoderConfig, at: str, head: str) -> Tree:
    """Specs of the decoder whose checkpoint names begin with `at`; `head` is the name of the output matrix, absent when tied."""
    specs = {
        "embed": spec(f"{at}.embed_tokens.weight", (cfg.vocab_size, cfg.hidden_size), ("vocab", "embed")),
        "layers": [_layer_specs(cfg, f"{at}.layers.{i}") for i in range(cfg.num_layers)],
        "norm": norm_spec(f"{at}.norm", cfg.hidden_size),
    }
    if not cfg.tie_word_embeddings:
        specs["head"] = spec(f"{head}.weight", (cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"))
    return specs


def _layer_specs(cfg: DecoderConfig, at: str) -> Tree:
    hidden, inter = cfg.hidden_size, cfg.intermediate_size
    q_size, kv_size = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    rows = [q_size, kv_size, kv_size]
    qkv = [f"{at}.self_attn.{name}_proj" for name in "qkv"]
    gate_up, gate_up_rows = [f"{at}.mlp.gate_proj.weight", f"{at}.mlp.up_proj.weight"], [inter, inter]
    if cfg.stored_fused:
        qkv, rows = [f"{at}.self_attn.qkv_proj"], [sum(rows)]
        gate_up, gate_up_rows = [f"{at}.mlp.gate_up_proj.weight"], [2 * inter]
    specs = {
        "input_norm": norm_spec(f"{at}.input_layernorm", hidden),
        "qkv": fused([f"{n}.weight" for n in qkv], rows, (hidden,), ("heads", "embed")),
        "out": spec(f"{at}.self_attn.o_proj.weight", (hidden, q_size), ("embed", "heads")),
        "post_norm": norm_spec(f"{at}.post_attention_layernorm", hidden),
        "gate_up": fused(gate_up, gate_up_rows, (hidden,), ("mlp", "embed")),
        "down": spec(f"{at}.mlp.down_proj.weight", (hidden, inter), ("embed", "mlp")),
    }
    if cfg.qkv_bias:
        specs["qkv_bias"] = fused([f"{n}.bias" for n in qkv], rows, (), ("heads",), init="zeros")
    if cfg.qk_norm:
        specs["q_norm"] = norm_spec(f"{at}.self_attn.q_norm", cfg.head_dim)
        specs["k_norm"] = norm_spec(f"{at}.self_attn.k_norm", cfg.head_dim)
    return specs


@node()
@dataclass(frozen=True, kw_only=True)
class Carry:
    """What goes from layer to layer: the residual stream x (tokens, hidden), and h, x normed for the part that comes next."""

    h: Tensor
    x: Tensor


def forward(
    params: Tree,
    cfg: DecoderConfig,
    x: Tensor,
    positions: Tensor,
    cache: Cache | None,
    batch: Batch,
    *,
    factors: Tensor | None = None,
    deepstack: Tensor | None = None,
) -> tuple[Tensor, Cache | None]:
    """x (tokens, hidden), positions and factors as `rope` takes them → hidden states after the final norm, and the cache, written in
    place. deepstack (n, tokens, hidden): what is added after each of the first n layers (Qwen3-VL)."""
    table = rope(cfg, positions, x.dtype, factors)
    norms = norm_weights(params)
    carry = Carry(h=rms_norm(x, norms[0], cfg.rms_norm_eps), x=x)
    for i, p in enumerate(params["layers"]):
        added = deepstack[i] if deepstack is not None and i < len(deepstack) else None
        carry = block(cfg, p, norms[i + 1], carry, table, cache[i] if cache is not None else None, batch, added)
    return carry.h, cache


def norm_weights(params: Tree) -> list[Tensor]:
    """The norm before each layer, and the last one."""
    return [*(p["input_norm"] for p in params["layers"]), params["norm"]]


def block(
    cfg: DecoderConfig,
    p: Tree,
    next_norm: Tensor,
    carry: Carry,
    table: RotaryTable,
    kv: tuple[Tensor, Tensor] | None,
    batch: Batch,
    added: Tensor | None = None,
) -> Carry:
    """One layer of parameters p. Each residual add is one op with the norm behind it, so the layer ends with the next one's first norm,
    and a program may run it as many times as there are layers. added (tokens, hidden) is added to its output."""
    attended = F.linear(_attention(p, cfg, carry.h, table, kv, batch), p["out"])
    h, x = add_rms_norm(attended, carry.x, p["post_norm"], cfg.rms_norm_eps)
    change = F.linear(gated_activation(F.linear(h, p["gate_up"])), p["down"])
    if added is not None:
        change = change + added
    h, x = add_rms_norm(change, x, next_norm, cfg.rms_norm_eps)
    return Carry(h=h, x=x)


def _attention(
    p: Tree, cfg: DecoderConfig, h: Tensor, table: RotaryTable, kv: tuple[Tensor, Tensor] | None, batch: Batch
) -> Tensor:
    """(tokens, num_heads·head_dim) before the output projection."""
    heads, kv_heads, scale = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim**-0.5
    qkv = F.linear(h, p["qkv"], p.get("qkv_bias")).view(-1, heads + 2 * kv_heads, cfg.head_dim)
    if cfg.qk_norm:
        q, k, v = qkv.split_with_sizes((heads, kv_heads, kv_heads), 1)
        q, k = rms_norm(q, p["q_norm"], cfg.rms_norm_eps), rms_norm(k, p["k_norm"], cfg.rms_norm_eps)
        qkv = torch.cat((q, k, v), 1)
    if kv is None or batch.slot_mapping is None:
        qk = rotary(qkv[:, : heads + kv_heads], table)
    else:
        qk = rotary_cache_write(qkv, table, *kv, batch.slot_mapping)
    q, k = qk.split_with_sizes((heads, kv_heads), 1)
    if batch.context_lens is not None:
        assert kv is not None, "decoding reads a cache"
        items, item_offsets = batch.work or (None, None)
        out = paged_decode_attention(q, *kv, batch.block_table, batch.context_lens, items, item_offsets, scale)
    else:
        out = _prefill_attention(q, k, qkv[:, heads + kv_heads :], kv, batch, scale)
    return out.reshape(h.shape[0], -1)


def _prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, kv: tuple[Tensor, Tensor] | None, batch: Batch, scale: float
) -> Tensor:
    """(tokens, num_heads, head_dim): new tokens attend to earlier ones of their sequence, or as the mask says."""
    if batch.mask is not None:
        num_seqs, groups = len(batch.mask), q.shape[1] // k.shape[1]
        q, k, v = (t.unflatten(0, (num_seqs, -1)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=batch.mask, scale=scale).transpose(1, 2).flatten(0, 1)
    assert batch.cu_seqlens is not None, "prefill knows where sequences end"
    k_cache, v_cache = kv if kv is not None and batch.prefix_lens is not None else (None, None)
    block_table = batch.block_table if batch.prefix_lens is not None else None
    return prefill_attention(q, k, v, batch.cu_seqlens, k_cache, v_cache, block_table, batch.prefix_lens, scale=scale)


def logits(params: Tree, hidden: Tensor) -> Tensor:
    """hidden (rows, hidden) → (rows, vocab), padded vocabulary rows included."""
    return F.linear(hidden, params.get("head", params["embed"]))
