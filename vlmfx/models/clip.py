"""CLIP's vision tower as LLaVA and Phi-3.5-vision use it: hidden states of some layers, no pooling.

Source: huggingface/transformers: src/transformers/models/clip/modeling_clip.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfx.models.layers import layer_norm_specs
from vlmfx.models.validate import MAX_LAYERS, multiple_of, one_of, positive_float, positive_int, supported
from vlmfx.models.vit import block, encoder_layer_specs
from vlmfx.ops.activation import ACTIVATIONS
from vlmfx.ops.norm import layer_norm
from vlmfx.tree import Tree
from vlmfx.weights import ParamSpec, spec

SUPPORTED = {"num_channels": 3}


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """What changes the tower's arithmetic."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float

    def __post_init__(self) -> None:
        positive_int("vision_config.hidden_size", self.hidden_size)
        positive_int("vision_config.intermediate_size", self.intermediate_size)
        positive_int("vision_config.num_hidden_layers", self.num_layers, most=MAX_LAYERS)
        positive_int("vision_config.num_attention_heads", self.num_heads)
        multiple_of("vision_config.hidden_size", self.hidden_size, "num_attention_heads", self.num_heads)
        positive_int("vision_config.image_size", self.image_size)
        positive_int("vision_config.patch_size", self.patch_size)
        multiple_of("vision_config.image_size", self.image_size, "patch_size", self.patch_size)
        one_of("vision_config.hidden_act", self.hidden_act, ACTIVATIONS)
        positive_float("vision_config.layer_norm_eps", self.layer_norm_eps)

    @property
    def num_patches(self) -> int:
        """Patches of one image, the class token not counted."""
        return (self.image_size // self.patch_size) ** 2


def vision_config(hf: dict[str, Any]) -> ClipConfig:
    """The tower of a clip_vision_model config; missing keys have the defaults of transformers' CLIPVisionConfig."""
    supported(hf, SUPPORTED, at="vision_config.")
    return ClipConfig(
        hidden_size=hf.get("hidden_size", 768),
        intermediate_size=hf.get("intermediate_size", 3072),
        num_layers=hf.get("num_hidden_layers", 12),
        num_heads=hf.get("num_attention_heads", 12),
        image_size=hf.get("image_size", 224),
        patch_size=hf.get("patch_size", 32),
        hidden_act=hf.get("hidden_act", "quick_gelu"),
        layer_norm_eps=hf.get("layer_norm_eps", 1e-5),
    )


def param_specs(cfg: ClipConfig, at: str, num_layers: int) -> Tree:
    """Specs of the embeddings and the first num_layers layers; what comes after them is not needed."""
    c, patch = cfg.hidden_size, cfg.patch_size
    emb = f"{at}.embeddings"
    return {
        "class_embedding": spec(f"{emb}.class_embedding", (c,), ("embed",)),
        "patch": ParamSpec(
            shape=(c, 3 * patch * patch),
            axes=("embed", None),
            sources=((f"{emb}.patch_embedding.weight", (c, 3, patch, patch)),),
        ),
        "positions": spec(f"{emb}.position_embedding.weight", (cfg.num_patches + 1, c), (None, "embed")),
        "pre_norm": layer_norm_specs(f"{at}.pre_layrnorm", c),  # the published spelling
        "layers": [
            encoder_layer_specs(f"{at}.encoder.layers.{i}", c, cfg.intermediate_size) for i in range(num_layers)
        ],
    }


def hidden_states(params: Tree, cfg: ClipConfig, patches: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """patches (n·num_patches, 3·p·p), normalised → for each of layers, where 0 is the embedding output, (n, num_patches + 1, hidden)."""
    n, tokens = len(patches) // cfg.num_patches, cfg.num_patches + 1
    x = F.linear(patches, params["patch"]).view(n, cfg.num_patches, cfg.hidden_size)
    x = torch.cat((params["class_embedding"].expand(n, 1, -1), x), 1) + params["positions"]
    norm = params["pre_norm"]
    x = layer_norm(x, norm["weight"], norm["bias"], cfg.layer_norm_eps).flatten(0, 1)
    kept = {0: x} if 0 in layers else {}
    for i, p in enumerate(params["layers"], 1):
        x = block(p, cfg, x, ACTIVATIONS[cfg.hidden_act], (tokens,) * n)
        if i in layers:
            kept[i] = x
    return [kept[i].view(n, tokens, -1) for i in layers]
