"""Phi-3's config, the text half of Phi-3.5-vision: the Llama decoder with fused weights, and with "su" (long) rope.

Source: huggingface/transformers: src/transformers/models/phi3/; docs/adr/0006-phi3-long-rope-per-request.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from vlmfx.models.decoder import DecoderConfig, head_dim
from vlmfx.models.rope import LongRope, row_factors
from vlmfx.models.text_config import is_tied, rope_settings
from vlmfx.models.validate import positive_float, positive_int, refuse, supported
from vlmfx.tree import Tree

SUPPORTED = {"hidden_act": "silu", "partial_rotary_factor": 1.0}
LONG, PLAIN = ("su", "longrope"), "default"


def text_config(hf: dict[str, Any]) -> DecoderConfig:
    """The decoder of a Phi-3 config. Raises CheckpointError for a sliding window that is shorter than the context."""
    supported(hf, SUPPORTED)
    kind, rope = rope_settings(hf, (*LONG, PLAIN))
    supported(rope, {"partial_rotary_factor": 1.0}, at="rope_scaling.")
    width = head_dim(hf["hidden_size"], hf["num_attention_heads"])
    context, window = positive_int("max_position_embeddings", hf["max_position_embeddings"]), hf.get("sliding_window")
    if window is not None and positive_int("sliding_window", window) < context:
        refuse("sliding_window", window, f"null or at least max_position_embeddings, {context}")
    kv_heads = hf.get("num_key_value_heads")
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_attention_heads"] if kv_heads is None else kv_heads,
        head_dim=width,
        rms_norm_eps=hf.get("rms_norm_eps", 1e-5),
        rope_theta=rope.get("rope_theta", hf.get("rope_theta", 10000.0)),
        max_position_embeddings=context,
        tie_word_embeddings=is_tied(hf),
        long_rope=_long_rope(hf, rope, width // 2, context) if kind in LONG else None,
        stored_fused=True,
    )


def _long_rope(hf: dict[str, Any], rope: dict[str, Any], num_frequencies: int, context: int) -> LongRope:
    """The two lists of factors, and the scale sqrt(1 + ln(context/original)/ln(original)) of cos and sin unless the file gives it."""
    key = "original_max_position_embeddings"
    found = hf.get(key)
    original = positive_int(key, rope.get(key) if found is None else found, most=context)
    if original == 1:
        refuse(key, original, "at least 2, as its logarithm divides")
    stretch = math.log(context / original)
    scale = math.sqrt(1 + stretch / math.log(original)) if stretch else 1.0
    given = rope.get("attention_factor")
    return LongRope(
        short_factor=_factors("short_factor", rope.get("short_factor"), num_frequencies),
        long_factor=_factors("long_factor", rope.get("long_factor"), num_frequencies),
        original_max_position_embeddings=original,
        scale=scale if given is None else positive_float("rope_scaling.attention_factor", given),
    )


def _factors(name: str, value: Any, length: int) -> tuple[float, ...]:
    key = f"rope_scaling.{name}"
    if not isinstance(value, list) or len(value) != length:
        refuse(key, value, f"{length} numbers, one for each pair of a head's dimensions")
    return tuple(positive_float(key, factor) for factor in value)


def long_extras(cfg: DecoderConfig, max_lens: Sequence[int], seq_lens: Sequence[int], num_tokens: int) -> Tree:
    """{"factors": (num_tokens, head_dim/2) float32}, the long ones for the tokens of sequences that may become longer than the original
    context; () for plain rope. They are the same in all steps of a request, so that its cache never holds keys of both kinds."""
    if cfg.long_rope is None:
        return ()
    is_long = torch.tensor([n > cfg.long_rope.original_max_position_embeddings for n in max_lens], dtype=torch.bool)
    padded = torch.zeros(num_tokens, dtype=torch.bool)
    padded[: sum(seq_lens)] = is_long.repeat_interleave(torch.tensor(seq_lens, dtype=torch.int64))
    return {"factors": row_factors(cfg.long_rope, padded)}
