"""SigLIP's vision tower in its NaViT form, as MiniCPM-V uses it: images of any size, each a segment, with learned positions.

Source: huggingface/transformers: src/transformers/models/idefics2/modeling_idefics2.py, which MiniCPM-V's tower follows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfx.models.layers import layer_norm_specs, linear
from vlmfx.models.vit import EncoderConfig, block, encoder_layer_specs, encoder_settings
from vlmfx.ops.layer_norm import layer_norm
from vlmfx.tree import Tree
from vlmfx.weights import ParamSpec, spec


def vision_config(hf: dict[str, Any]) -> EncoderConfig:
    """The tower of a siglip vision_config; missing keys have the defaults of transformers' SiglipVisionConfig."""
    return EncoderConfig(**encoder_settings(hf, patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6))


def param_specs(cfg: EncoderConfig, at: str) -> Tree:
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


def tower(params: Tree, cfg: EncoderConfig, x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Embedded patches (P, hidden) → (P, hidden) after the last norm; the segments of cu_seqlens do not see each other."""
    for p in params["layers"]:
        x = block(p, cfg, x, cfg.hidden_act, cu_seqlens)
    norm = params["post_norm"]
    return layer_norm(x, norm["weight"], norm["bias"], cfg.layer_norm_eps)
