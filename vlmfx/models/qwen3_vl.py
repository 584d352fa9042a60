"""Qwen3-VL, dense: its tower joined to Qwen3, with features of several layers of the tower added in the decoder's first layers.

A feature row is (1 + n)·hidden wide: what replaces the placeholder's embedding, then what is added after each of n layers.
Source: huggingface/transformers: src/transformers/models/qwen3_vl/modeling_qwen3_vl.py; deepstack is arXiv:2406.04334."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfx.models import decoder, join, qwen3, qwen3_vit
from vlmfx.models.join import logits
from vlmfx.models.layers import Batch, Cache
from vlmfx.models.qwen2_vl import Qwen2VLConfig, is_unused
from vlmfx.models.validate import refuse, section
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.tree import Tree

__all__ = ["is_unused", "logits"]

# Published as newer code saves it; these are the names that the generations before had.
KEY_PREFIXES = (
    ("model.layers.", "model.language_model.layers."),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.norm.", "model.language_model.norm."),
    ("visual.", "model.visual."),
)


@dataclass(frozen=True, kw_only=True)
class Qwen3VLConfig(Qwen2VLConfig):
    """As Qwen2-VL's, with this generation's tower."""

    vision: qwen3_vit.Qwen3VitConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = self.vision.deepstack_layers
        if len(layers) > self.text.num_layers:
            most = f"at most {self.text.num_layers} layers, as many as the text model has"
            refuse("vision_config.deepstack_visual_indexes", list(layers), most)

    @property
    def row_size(self) -> int:
        """The width of a feature row."""
        return self.text.hidden_size * (1 + len(self.vision.deepstack_layers))


def config(hf: dict[str, Any]) -> Qwen3VLConfig:
    """The model of a config.json."""
    return Qwen3VLConfig(
        text=qwen3.text_config(hf),
        vision=qwen3_vit.vision_config(section(hf, "vision_config")),
        image_token_id=hf.get("image_token_id", 151655),
        video_token_id=hf.get("video_token_id", 151656),
    )


def param_specs(cfg: Qwen3VLConfig) -> Tree:
    """The whole truth about weights."""
    return {
        "vision": qwen3_vit.param_specs(cfg.vision, "model.visual"),
        "text": decoder.param_specs(cfg.text, "model.language_model", "lm_head"),
    }


def vision_hidden(params: Tree, cfg: Qwen3VLConfig, inputs: VisionInputs) -> Tensor:
    """pixels → (P, (1 + n)·vision hidden) before the mergers: the last block's output, then the deepstack layers'."""
    patches = inputs.patches(cfg.vision.patch_size, params["vision"]["patch"].dtype)
    return qwen3_vit.tower(params["vision"], cfg.vision, patches, inputs)


def project(params: Tree, cfg: Qwen3VLConfig, x: Tensor, inputs: VisionInputs) -> Tensor:
    """Tower output → feature rows, one a 2 × 2 block."""
    return qwen3_vit.mergers(params["vision"], cfg.vision, x)


def encode(params: Tree, cfg: Qwen3VLConfig, inputs: VisionInputs) -> Tensor:
    """Images as pixels → (F, (1 + n)·hidden), image after image."""
    return project(params, cfg, vision_hidden(params, cfg, inputs), inputs)


def merge(
    params: Tree, cfg: Qwen3VLConfig, ids: Tensor, features: Tensor | None, feature_index: Tensor | None
) -> Tensor:
    """ids (tokens,) → embeddings (tokens, hidden) with the first part of feature rows where feature_index is 0 or more."""
    rows = features[:, : cfg.text.hidden_size] if features is not None else None
    return join.merge(params, cfg, ids, rows, feature_index)


def extras(
    cfg: Qwen3VLConfig,
    max_lens: Sequence[int],
    seq_lens: Sequence[int],
    num_tokens: int,
    features: Tensor | None,
    feature_index: Tensor | None,
) -> Tree:
    """{"rows": the other parts of the feature rows, "index": feature_index}; () where a step has no features."""
    if features is None or feature_index is None:
        return ()
    return {"rows": features[:, cfg.text.hidden_size :], "index": feature_index}


def forward(
    params: Tree, cfg: Qwen3VLConfig, x: Tensor, positions: Tensor, cache: Cache | None, batch: Batch, extras: Tree = ()
) -> tuple[Tensor, Cache | None]:
    """x (tokens, hidden), positions (3, tokens) → hidden states after the final norm, and the cache; extras as above."""
    more = text_inputs(cfg, x, extras)
    return decoder.forward(params["text"], cfg.text, x, positions, cache, batch, **more)


def text_inputs(cfg: Qwen3VLConfig, x: Tensor, extras: Tree) -> dict[str, Tensor | None]:
    """{"deepstack": (n, tokens, hidden)}, 0 for text, of extras that are not empty."""
    if not extras:
        return {}
    rows = F.embedding(extras["index"].clamp(min=0), extras["rows"])
    rows = torch.where(extras["index"][:, None] >= 0, rows, 0)
    return {"deepstack": rows.view(len(x), -1, cfg.text.hidden_size).transpose(0, 1)}
