"""Qwen2-VL's vision tower: any resolution, 2-D rotary positions, a merger of 2 × 2 patches.

Source: huggingface/transformers: src/transformers/models/qwen2_vl/modeling_qwen2_vl.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfx.models.layers import layer_norm_specs, linear, linear_specs
from vlmfx.models.validate import MAX_LAYERS, multiple_of, one_of, positive_float, positive_int, refuse, supported
from vlmfx.models.vit import block, block_specs
from vlmfx.ops.activation import quick_gelu
from vlmfx.ops.norm import layer_norm
from vlmfx.ops.rotary import RotaryTable, inverse_frequencies, rotary_table
from vlmfx.tree import Tree
from vlmfx.weights import ParamSpec

SUPPORTED = {"hidden_act": "quick_gelu"}


@dataclass(frozen=True, kw_only=True)
class Qwen2VitConfig:
    """What changes the tower's arithmetic; output_size is the language model's width."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    output_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        positive_int("vision_config.embed_dim", self.hidden_size)
        positive_int("vision_config.mlp_ratio · embed_dim", self.intermediate_size)
        positive_int("vision_config.depth", self.num_layers, most=MAX_LAYERS)
        positive_int("vision_config.num_heads", self.num_heads)
        multiple_of("vision_config.embed_dim", self.hidden_size, "num_heads", self.num_heads)
        if self.hidden_size // self.num_heads % 4:
            refuse("vision_config.embed_dim / num_heads", self.hidden_size // self.num_heads, "a multiple of 4")
        positive_int("vision_config.hidden_size", self.output_size)
        one_of("vision_config.in_channels", self.in_channels, (3,))
        positive_int("vision_config.patch_size", self.patch_size)
        positive_int("vision_config.temporal_patch_size", self.temporal_patch_size)
        positive_int("vision_config.spatial_merge_size", self.merge_size)
        positive_float("layer_norm_eps", self.layer_norm_eps)


def vision_config(hf: dict[str, Any]) -> Qwen2VitConfig:
    """The tower of a Qwen2-VL vision_config, whose hidden_size is the language model's width."""
    supported(hf, SUPPORTED, at="vision_config.")
    embed_dim = positive_int("vision_config.embed_dim", hf.get("embed_dim", 1280))
    return Qwen2VitConfig(
        hidden_size=embed_dim,
        intermediate_size=int(embed_dim * positive_float("vision_config.mlp_ratio", hf.get("mlp_ratio", 4))),
        num_layers=hf.get("depth", 32),
        num_heads=hf.get("num_heads", 16),
        output_size=hf.get("hidden_size", 3584),
        in_channels=hf.get("in_channels", hf.get("in_chans", 3)),
        patch_size=hf.get("patch_size", 14),
        temporal_patch_size=hf.get("temporal_patch_size", 2),
        merge_size=hf.get("spatial_merge_size", 2),
    )


def param_specs(cfg: Qwen2VitConfig, at: str) -> Tree:
    """Specs of the tower whose checkpoint names begin with `at`."""
    c, merged = cfg.hidden_size, cfg.hidden_size * cfg.merge_size**2
    kernel = (cfg.in_channels, cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)
    return {
        "patch": ParamSpec(
            shape=(c, kernel[0] * kernel[1] * kernel[2] * kernel[3]),
            axes=("embed", None),
            sources=((f"{at}.patch_embed.proj.weight", (c, *kernel)),),
        ),
        "blocks": [_block_specs(cfg, f"{at}.blocks.{i}") for i in range(cfg.num_layers)],
        "merger": {
            "norm": layer_norm_specs(f"{at}.merger.ln_q", c),
            "up": linear_specs(f"{at}.merger.mlp.0", merged, merged, ("mlp", "embed")),
            "down": linear_specs(f"{at}.merger.mlp.2", merged, cfg.output_size, ("embed", "mlp")),
        },
    }


def _block_specs(cfg: Qwen2VitConfig, at: str) -> Tree:
    c = cfg.hidden_size
    names = {
        "norm1": f"{at}.norm1",
        "out": f"{at}.attn.proj",
        "norm2": f"{at}.norm2",
        "up": f"{at}.mlp.fc1",
        "down": f"{at}.mlp.fc2",
    }
    return block_specs(names, c, cfg.intermediate_size, linear_specs(f"{at}.attn.qkv", c, 3 * c, ("heads", "embed")))


def rope(cfg: Qwen2VitConfig, position_ids: Tensor, dtype: torch.dtype) -> RotaryTable:
    """position_ids (patches, 2), row and column: half of the frequencies turn with the row, half with the column."""
    inv = inverse_frequencies(cfg.hidden_size // cfg.num_heads // 2, 10000.0, position_ids.device)
    return rotary_table((position_ids[..., None].float() * inv).flatten(1), dtype)


def tower(
    params: Tree, cfg: Qwen2VitConfig, patches: Tensor, position_ids: Tensor, seq_lens: tuple[int, ...]
) -> Tensor:
    """Normalised patches (P, in_channels·T·p·p) → the last block's output (P, hidden); each frame is one segment."""
    x = F.linear(patches, params["patch"])
    table = rope(cfg, position_ids, x.dtype)
    for p in params["blocks"]:
        x = block(p, cfg, x, quick_gelu, seq_lens, table)
    return x


def merger(params: Tree, cfg: Qwen2VitConfig, x: Tensor) -> Tensor:
    """(P, hidden) → (P / merge_size², output_size): neighbouring patches, adjacent in P, become one row."""
    p = params["merger"]
    x = layer_norm(x, p["norm"]["weight"], p["norm"]["bias"], cfg.layer_norm_eps)
    return linear(p["down"], F.gelu(linear(p["up"], x.view(-1, cfg.merge_size**2 * cfg.hidden_size))))
