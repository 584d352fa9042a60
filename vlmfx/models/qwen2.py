"""Qwen2's config, the text half of Qwen2-VL: the Llama decoder with biases on q, k and v, and with M-RoPE."""

from __future__ import annotations

from typing import Any

from vlmfx.errors import CheckpointError
from vlmfx.models.decoder import DecoderConfig, head_dim
from vlmfx.models.validate import refuse, supported

SUPPORTED = {"hidden_act": "silu", "use_sliding_window": False}


def text_config(hf: dict[str, Any]) -> DecoderConfig:
    """The decoder of a Qwen2-VL config; its keys lie at the top level, or in text_config when newer code saved it."""
    hf = {**hf, **hf.get("text_config", {})}
    supported(hf, SUPPORTED)
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise CheckpointError(
            f'config.json: rope_scaling type is "{kind}" but must be "mrope" or "default"; use another checkpoint.'
        )
    width = head_dim(hf["hidden_size"], hf["num_attention_heads"])
    section = rope.get("mrope_section")
    if not isinstance(section, list) or len(section) != 3 or any(type(n) is not int or n < 0 for n in section):
        refuse("rope_scaling.mrope_section", section, "three integers of 0 or more (time, height, width)")
    if sum(section) != width // 2:
        raise CheckpointError(
            f"config.json: mrope_section {section} adds up to {sum(section)}, expected head_dim / 2 = {width // 2}; "
            "restore the published config.json."
        )
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=width,
        rms_norm_eps=hf["rms_norm_eps"],
        rope_theta=rope.get("rope_theta", hf.get("rope_theta", 1e6)),
        max_position_embeddings=hf["max_position_embeddings"],
        qkv_bias=True,
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        mrope_section=tuple(section),
    )
