"""Qwen2-VL: its vision tower and merger, joined to Qwen2 by M-RoPE positions.

Source: huggingface/transformers: src/transformers/models/qwen2_vl/modeling_qwen2_vl.py; arXiv:2409.12191."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlmfx.models import decoder, qwen2, qwen2_vit
from vlmfx.models.join import forward, is_head_copy_or_buffer, logits, merge, text_inputs
from vlmfx.models.layers import no_extras
from vlmfx.models.validate import refuse, section, token_id
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.tree import Tree

__all__ = ["forward", "logits", "merge", "text_inputs"]

# Newer code saves other prefixes than the published checkpoints, whose names the specs use.
KEY_PREFIXES = (("model.language_model.", "model."), ("model.visual.", "visual."))

extras = no_extras


@dataclass(frozen=True, kw_only=True)
class Qwen2VLConfig:
    """The two halves and the ids that mark images and videos in a prompt."""

    text: decoder.DecoderConfig
    vision: qwen2_vit.Qwen2VitConfig
    image_token_id: int
    video_token_id: int

    def __post_init__(self) -> None:
        if self.vision.output_size != self.text.hidden_size:
            refuse(self.vision.OUTPUT, self.vision.output_size, f"the text's, {self.text.hidden_size}")
        for key in ("image_token_id", "video_token_id"):
            token_id(key, getattr(self, key), self.text.vocab_size)


def config(hf: dict[str, Any]) -> Qwen2VLConfig:
    """The model of a config.json, flat as published or nested as newer code saves it."""
    return Qwen2VLConfig(
        text=qwen2.text_config(hf),
        vision=qwen2_vit.vision_config(section(hf, "vision_config")),
        image_token_id=hf.get("image_token_id", 151655),
        video_token_id=hf.get("video_token_id", 151656),
    )


def param_specs(cfg: Qwen2VLConfig) -> Tree:
    """The whole truth about weights."""
    return {
        "vision": qwen2_vit.param_specs(cfg.vision, "visual"),
        "text": decoder.param_specs(cfg.text, "model", "lm_head"),
    }


def is_unused(cfg: Qwen2VLConfig, name: str) -> bool:
    """True for checkpoint names that are right to be there and are not needed: a copy of tied embeddings, buffers."""
    return is_head_copy_or_buffer(cfg, name, "lm_head.weight")


def vision_hidden(params: Tree, cfg: Qwen2VLConfig, inputs: VisionInputs) -> Tensor:
    """pixels → the last block's output before the merger, (P, vision hidden)."""
    patches = inputs.patches(cfg.vision.patch_size, params["vision"]["patch"].dtype)
    return qwen2_vit.tower(params["vision"], cfg.vision, patches, inputs.position_ids, inputs.cu_seqlens)


def project(params: Tree, cfg: Qwen2VLConfig, x: Tensor, inputs: VisionInputs) -> Tensor:
    """Tower output → rows of the language model's width, one a 2 × 2 block."""
    return qwen2_vit.merger(params["vision"], cfg.vision, x)


def encode(params: Tree, cfg: Qwen2VLConfig, inputs: VisionInputs) -> Tensor:
    """Images as pixels → (F, hidden), image after image."""
    return project(params, cfg, vision_hidden(params, cfg, inputs), inputs)
