"""Qwen2.5-VL: its windowed vision tower joined to Qwen2 as in Qwen2-VL; only the tower and the positions of videos are new.

Source: huggingface/transformers: src/transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py; arXiv:2502.13923."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlmfx.models import decoder, qwen2, qwen2_5_vit
from vlmfx.models.join import forward, logits, merge, text_inputs
from vlmfx.models.qwen2_vl import KEY_PREFIXES, Qwen2VLConfig, extras, is_unused
from vlmfx.models.validate import section
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.tree import Tree

__all__ = ["KEY_PREFIXES", "extras", "forward", "is_unused", "logits", "merge", "text_inputs"]


@dataclass(frozen=True, kw_only=True)
class Qwen25VLConfig(Qwen2VLConfig):
    """As Qwen2-VL's, with this generation's tower."""

    vision: qwen2_5_vit.Qwen25VitConfig


def config(hf: dict[str, Any]) -> Qwen25VLConfig:
    """The model of a config.json, flat as published or nested as newer code saves it."""
    return Qwen25VLConfig(
        text=qwen2.text_config(hf),
        vision=qwen2_5_vit.vision_config(section(hf, "vision_config")),
        image_token_id=hf.get("image_token_id", 151655),
        video_token_id=hf.get("video_token_id", 151656),
    )


def param_specs(cfg: Qwen25VLConfig) -> Tree:
    """The whole truth about weights."""
    return {
        "vision": qwen2_5_vit.param_specs(cfg.vision, "visual"),
        "text": decoder.param_specs(cfg.text, "model", "lm_head"),
    }


def vision_hidden(params: Tree, cfg: Qwen25VLConfig, inputs: VisionInputs) -> Tensor:
    """pixels → the last block's output before the merger, (P, vision hidden), both in the order of the windows."""
    patches = inputs.patches(cfg.vision.patch_size, params["vision"]["patch"].dtype)
    return qwen2_5_vit.tower(params["vision"], cfg.vision, patches, inputs)


def project(params: Tree, cfg: Qwen25VLConfig, x: Tensor, inputs: VisionInputs) -> Tensor:
    """Tower output → rows of the language model's width, one a 2 × 2 block, in the order that the image has them."""
    assert inputs.row_index is not None, "processing says how to undo the order of its windows"
    return qwen2_5_vit.merger(params["vision"], cfg.vision, x)[inputs.row_index]


def encode(params: Tree, cfg: Qwen25VLConfig, inputs: VisionInputs) -> Tensor:
    """Images as pixels → (F, hidden), image after image."""
    return project(params, cfg, vision_hidden(params, cfg, inputs), inputs)
