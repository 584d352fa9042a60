"""Llama's config, the text half of LLaVA-1.5; missing keys have the defaults of transformers' LlamaConfig."""

from __future__ import annotations

from typing import Any

from vlmfx.models.decoder import DecoderConfig, head_dim
from vlmfx.models.text_config import is_tied, rope_settings
from vlmfx.models.validate import supported

SUPPORTED = {"hidden_act": "silu"}


def text_config(hf: dict[str, Any]) -> DecoderConfig:
    """The decoder that a Llama text_config describes; published LLaVA configs hold little more than the vocabulary size."""
    supported(hf, SUPPORTED, at="text_config.")
    _, rope = rope_settings(hf)
    num_heads, num_kv_heads = hf.get("num_attention_heads", 32), hf.get("num_key_value_heads")
    hidden_size, width = hf.get("hidden_size", 4096), hf.get("head_dim")
    return DecoderConfig(
        vocab_size=hf.get("vocab_size", 32000),
        hidden_size=hidden_size,
        intermediate_size=hf.get("intermediate_size", 11008),
        num_layers=hf.get("num_hidden_layers", 32),
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=head_dim(hidden_size, num_heads) if width is None else width,
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", hf.get("rope_theta", 10000.0)),
        max_position_embeddings=hf.get("max_position_embeddings", 2048),
        qkv_bias=hf.get("attention_bias", False),
        tie_word_embeddings=is_tied(hf),
    )
