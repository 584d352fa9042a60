"""Qwen3's config, the text half of Qwen3-VL: the Llama decoder with an RMS norm on q and k, and with interleaved M-RoPE.

Source: huggingface/transformers: src/transformers/models/qwen3_vl/."""

from __future__ import annotations

from typing import Any

from vlmfx.models.decoder import DecoderConfig
from vlmfx.models.qwen2 import MROPE_TYPES, mrope_section
from vlmfx.models.text_config import is_tied, rope_settings
from vlmfx.models.validate import positive_int, section, supported

SUPPORTED = {"hidden_act": "silu", "attention_bias": False}


def text_config(hf: dict[str, Any]) -> DecoderConfig:
    """The decoder of a Qwen3-VL config, which keeps it in text_config."""
    text = section(hf, "text_config")
    supported(text, SUPPORTED, at="text_config.")
    _, rope = rope_settings(text, MROPE_TYPES)
    supported(rope, {"mrope_interleaved": True}, at="text_config.rope_scaling.")
    # Of this family the reference asks the top level alone; versions before transformers 5 asked the text half.
    says = text if hf.get("tie_word_embeddings") is None else hf
    width = positive_int("head_dim", text.get("head_dim", 128))
    return DecoderConfig(
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_layers=text["num_hidden_layers"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        head_dim=width,
        rms_norm_eps=text["rms_norm_eps"],
        rope_theta=rope.get("rope_theta", text.get("rope_theta", 500_000.0)),
        max_position_embeddings=text["max_position_embeddings"],
        tie_word_embeddings=is_tied(says),
        qk_norm=True,
        mrope_section=mrope_section(rope, width),
        mrope_interleaved=True,
    )
