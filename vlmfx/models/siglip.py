"""SigLIP's vision tower in its NaViT form, as MiniCPM-V uses it: images of any size, each a segment, with learned positions.

Source: huggingface/transformers: src/transformers/models/idefics2/modeling_idefics2.py, which MiniCPM-V's tower follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfx.models.layers import layer_norm_specs, linear
from vlmfx.models.validate import MAX_LAYERS, multiple_of, one_of, positive_float, positive_int, supported
from vlmfx.models.vit import block, encoder_layer_specs
from vlmfx.ops.activation import ACTIVATIONS
from vlmfx.ops.norm import layer_norm
from vlmfx.tree import Tree
from vlmfx.weights import ParamSpec, spec

SUPPORTED = {"num_channels": 3}


@dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """What changes the tower's arithmetic; image_size / patch_size is the side of the square table of positions."""

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
        positive_int("vision_config.patch_size", self.patch_size, most=self.image_size)
        one_of("vision_config.hidden_act", self.hidden_act, ACTIVATIONS)
        positive_float("vision_config.layer_norm_eps", self.layer_norm_eps)

    @property
    def table_side(self) -> int:
        """Rows, and columns, of the table of positions."""
        return self.image_size // self.patch_size


def vision_config(hf: dict[str, Any]) -> SiglipConfig:
    """The tower of a siglip vision_config; missing keys have the defaults of transformers' SiglipVisionConfig."""
    supported(hf, SUPPORTED, at="vision_config.")
    return SiglipConfig(
        hidden_size=hf.get("hidden_size", 768),
        intermediate_size=hf.get("intermediate_size", 3072),
        num_layers=hf.get("num_hidden_layers", 12),
        num_heads=hf.get("num_attention_heads", 12),
        image_size=hf.get("image_size", 224),
        patch_size=hf.get("patch_size", 16),
        hidden_act=hf.get("hidden_act", "gelu_pytorch_tanh"),
        layer_norm_eps=hf.get("layer_norm_eps", 1e-6),
    )


def param_specs(cfg: SiglipConfig, at: str) -> Tree:
    """Specs of the tower whose checkpoint names begin with `at`."""
    c, patch, emb = cfg.hidden_size, cfg.patch_size, f"{at}.embeddings"
    return {
        "patch": {
            "weight": ParamSpec(
                shape=(c, 3 * patch * patch),
                axes=("embed", None),
                sources=((f"{emb}.patch_embedding.weight", (c, 3, patch, patch)),),
            ),
            "bias": spec(f"{emb}.patch_embedding.bias", (c,), ("embed",), init="zeros"),
        },
        "positions": spec(f"{emb}.position_embedding.weight", (cfg.table_side**2, c), (None, "embed")),
        "layers": [
            encoder_layer_specs(f"{at}.encoder.layers.{i}", c, cfg.intermediate_size) for i in range(cfg.num_layers)
        ],
        "post_norm": layer_norm_specs(f"{at}.post_layernorm", c),
    }


def table_places(n: int, table_side: int) -> Tensor:
    """(n,) int64: which row (or column) of the table each of n patches takes, so that they are spread over all of it.

    In float32, and with the step rounded to it as in the reference: computed more exactly, patches on a boundary (with n = 49 or 50,
    for one) would take another place."""
    step = float(1 / torch.tensor(n, dtype=torch.float32))
    fractions = torch.arange(0, 1 - 1e-6, step, dtype=torch.float32)
    boundaries = torch.arange(1 / table_side, 1.0, 1 / table_side, dtype=torch.float32)
    return torch.bucketize(fractions, boundaries, right=True)


def embed(params: Tree, patches: Tensor, table_index: Tensor) -> Tensor:
    """Normalised patches (P, 3·p·p) → (P, hidden), each with row table_index (P,) int64 of the learned positions added."""
    return linear(params["patch"], patches) + F.embedding(table_index, params["positions"])


def tower(params: Tree, cfg: SiglipConfig, x: Tensor, seq_lens: tuple[int, ...]) -> Tensor:
    """Embedded patches (P, hidden) → (P, hidden) after the last norm; segments of seq_lens patches do not see each other."""
    for p in params["layers"]:
        x = block(p, cfg, x, ACTIVATIONS[cfg.hidden_act], seq_lens)
    norm = params["post_norm"]
    return layer_norm(x, norm["weight"], norm["bias"], cfg.layer_norm_eps)
