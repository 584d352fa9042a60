"""LLaVA-1.5: CLIP features of one layer, a two-layer projector, Llama.

Source: huggingface/transformers: src/transformers/models/llava/modeling_llava.py."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfx.errors import CheckpointError
from vlmfx.models import clip, decoder, llama
from vlmfx.models.join import forward, is_head_copy_or_buffer, logits, merge, text_inputs
from vlmfx.models.layers import linear, linear_specs, no_extras
from vlmfx.models.text_config import is_tied
from vlmfx.models.validate import one_of, refuse, section, token_id
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.ops.activation import ACTIVATIONS, activation
from vlmfx.tree import Tree

__all__ = ["forward", "logits", "merge", "text_inputs"]

# Newer code saves other prefixes than the published checkpoints, whose names the specs use; transformers 5 writes the
# tower's without "vision_model".
KEY_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
    ("vision_tower.vision_model.", "vision_tower.vision_model."),
    ("vision_tower.", "vision_tower.vision_model."),
)
extras = no_extras


@dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """feature_layers: the hidden states taken from the tower, counted from 0, the embedding output."""

    text: decoder.DecoderConfig
    vision: clip.ClipConfig
    feature_layers: tuple[int, ...]
    keep_class_token: bool
    projector_act: str
    image_token_id: int

    def __post_init__(self) -> None:
        one_of("projector_hidden_act", self.projector_act, ACTIVATIONS)
        token_id("image_token_index", self.image_token_id, self.text.vocab_size)

    @property
    def features_per_image(self) -> int:
        """Rows that one image fills in the prompt."""
        return self.vision.num_patches + self.keep_class_token


def config(hf: dict[str, Any]) -> LlavaConfig:
    """The model of a config.json. Raises CheckpointError for a feature layer the tower does not have."""
    vision = clip.vision_config(section(hf, "vision_config"))
    layers = hf.get("vision_feature_layer", -2)
    listed = layers if isinstance(layers, list) else [layers]
    if not listed or any(type(i) is not int for i in listed):
        refuse("vision_feature_layer", layers, "an integer or a list of them")
    counted = tuple(i if i >= 0 else vision.num_layers + 1 + i for i in listed)
    if any(not 0 <= i <= vision.num_layers for i in counted):
        raise CheckpointError(
            f"config.json: vision_feature_layer is {layers} but the tower has {vision.num_layers} layers; "
            "restore the published config.json."
        )
    strategy = one_of(
        "vision_feature_select_strategy", hf.get("vision_feature_select_strategy", "default"), ("default", "full")
    )
    text = section(hf, "text_config")
    return LlavaConfig(
        text=llama.text_config({**text, "tie_word_embeddings": is_tied(hf, text)}),
        vision=vision,
        feature_layers=counted,
        keep_class_token=strategy == "full",
        projector_act=hf.get("projector_hidden_act", "gelu"),
        image_token_id=hf.get("image_token_index", hf.get("image_token_id", 32000)),
    )


def param_specs(cfg: LlavaConfig) -> Tree:
    """The whole truth about weights."""
    at, width = "multi_modal_projector", cfg.vision.hidden_size * len(cfg.feature_layers)
    return {
        "vision": clip.param_specs(cfg.vision, "vision_tower.vision_model", max(cfg.feature_layers)),
        "projector": {
            "up": linear_specs(f"{at}.linear_1", width, cfg.text.hidden_size, ("mlp", "embed")),
            "down": linear_specs(f"{at}.linear_2", cfg.text.hidden_size, cfg.text.hidden_size, ("embed", "mlp")),
        },
        "text": decoder.param_specs(cfg.text, "language_model.model", "language_model.lm_head"),
    }


def is_unused(cfg: LlavaConfig, name: str) -> bool:
    """True for checkpoint names that are right to be there and are not needed: layers above the feature layer, a copy of tied
    embeddings, buffers."""
    tower = "vision_tower.vision_model."
    layer = re.match(rf"{re.escape(tower)}encoder\.layers\.([0-9]{{1,4}})\.", name)
    if layer:
        return int(layer[1]) >= max(cfg.feature_layers)
    if name.startswith(f"{tower}post_layernorm."):
        return True
    return is_head_copy_or_buffer(cfg, name, "language_model.lm_head.weight")


def vision_hidden(params: Tree, cfg: LlavaConfig, inputs: VisionInputs) -> Tensor:
    """pixels → the tower's features before the projector, (n·features_per_image, vision hidden)."""
    patches = inputs.patches(cfg.vision.patch_size, params["vision"]["patch"].dtype)
    x = torch.cat(clip.hidden_states(params["vision"], cfg.vision, patches, cfg.feature_layers), -1)
    return (x if cfg.keep_class_token else x[:, 1:]).flatten(0, 1)


def project(params: Tree, cfg: LlavaConfig, x: Tensor, inputs: VisionInputs) -> Tensor:
    """Tower features → rows of the language model's width."""
    p = params["projector"]
    return linear(p["down"], activation(linear(p["up"], x), cfg.projector_act))


def encode(params: Tree, cfg: LlavaConfig, inputs: VisionInputs) -> Tensor:
    """Images as pixels → (F, hidden), image after image."""
    return project(params, cfg, vision_hidden(params, cfg, inputs), inputs)
