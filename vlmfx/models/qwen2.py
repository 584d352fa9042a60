"""Qwen2's config, the text half of Qwen2-VL and MiniCPM-V: the Llama decoder with biases on q, k and v; in Qwen2-VL with M-RoPE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlmfx.errors import CheckpointError
from vlmfx.models.decoder import DecoderConfig, head_dim
from vlmfx.models.text_config import is_tied, rope_settings
from vlmfx.models.validate import refuse, section, supported

SUPPORTED = {"hidden_act": "silu", "use_sliding_window": False}
MROPE_TYPES = ("mrope", "default")


def text_config(hf: dict[str, Any]) -> DecoderConfig:
    """The decoder of a Qwen2-VL config; its keys lie at the top level, or in text_config when newer code saved it."""
    nested = section(hf, "text_config", optional=True)
    text = {**hf, **nested}
    plain = plain_text_config(text, rope_types=MROPE_TYPES)
    _, rope = rope_settings(text, MROPE_TYPES)
    return replace(plain, mrope_section=mrope_section(rope, plain.head_dim), tie_word_embeddings=is_tied(hf, nested))


def mrope_section(rope: dict[str, Any], width: int) -> tuple[int, ...]:
    """How many frequencies of a head of `width` follow time, height and width. Raises CheckpointError unless they are half of it."""
    section = rope.get("mrope_section")
    if not isinstance(section, list) or len(section) != 3 or any(type(n) is not int or n < 0 for n in section):
        refuse("rope_scaling.mrope_section", section, "three integers of 0 or more (time, height, width)")
    if sum(section) != width // 2:
        raise CheckpointError(
            f"config.json: mrope_section {section} adds up to {sum(section)}, expected head_dim / 2 = {width // 2}; "
            "restore the published config.json."
        )
    return tuple(section)


def plain_text_config(hf: dict[str, Any], *, rope_types: tuple[str, ...] = ("default",)) -> DecoderConfig:
    """The decoder of a Qwen2 config, with one position a token."""
    supported(hf, SUPPORTED)
    _, rope = rope_settings(hf, rope_types)
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=head_dim(hf["hidden_size"], hf["num_attention_heads"]),
        rms_norm_eps=hf["rms_norm_eps"],
        rope_theta=rope.get("rope_theta", hf.get("rope_theta", 1e6)),
        max_position_embeddings=hf["max_position_embeddings"],
        qkv_bias=True,
        tie_word_embeddings=is_tied(hf),
    )
