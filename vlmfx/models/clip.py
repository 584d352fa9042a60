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
from vlmfx.models.validate import multiple_of
from vlmfx.models.vit import EncoderConfig, block, encoder_layer_specs, encoder_settings
from vlmfx.ops.layer_norm import layer_norm
from vlmfx.tree import Tree
from vlmfx.weights import ParamSpec, spec


@dataclass(frozen=True, kw_only=True)
class ClipConfig(EncoderConfig):
    """The table has a place for each patch of an image, which is a square of image_size, and one for the class token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        multiple_of("vision_config.image_size", self.image_size, "patch_size", self.patch_size)

    @property
    def patch_multiple(self) -> int:
        """The tower takes whole images."""
        return self.num_patches

    @property
    def num_patches(self) -> int:
        """Patches of one image, the class token not counted."""
        return self.table_side**2


def vision_config(hf: dict[str, Any]) -> ClipConfig:
    """The tower of a clip_vision_model config; missing keys have the defaults of transformers' CLIPVisionConfig."""
    return ClipConfig(**encoder_settings(hf, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5))


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
    cu_seqlens = torch.arange(n + 1, dtype=torch.int32, device=x.device) * tokens
    for i, p in enumerate(params["layers"], 1):
        x = block(p, cfg, x, cfg.hidden_act, cu_seqlens)
        if i in layers:
            kept[i] = x
    return [kept[i].view(n, tokens, -1) for i in layers]
