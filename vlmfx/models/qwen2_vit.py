"""Qwen2-VL's vision tower: any resolution, 2-D rotary positions, a merger of 2 × 2 patches.

Source: huggingface/transformers: src/transformers/models/qwen2_vl/modeling_qwen2_vl.py."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from vlmfx.models.layers import layer_norm_specs, linear, linear_specs
from vlmfx.models.validate import MAX_LAYERS, multiple_of, one_of, positive_float, positive_int, refuse, supported
from vlmfx.models.vit import block, block_specs, rope_2d
from vlmfx.ops.activation import activation
from vlmfx.ops.layer_norm import layer_norm
from vlmfx.tree import Tree
from vlmfx.weights import ParamSpec

ACTIVATION = "quick_gelu"
SUPPORTED = {"hidden_act": ACTIVATION}


@dataclass(frozen=True, kw_only=True)
class Qwen2VitConfig:
    """What changes the tower's arithmetic; output_size is the language model's width.

    The later generations extend it, and give the upper-case names of keys anew."""

    HIDDEN: ClassVar[str] = "vision_config.embed_dim"
    INTERMEDIATE: ClassVar[str] = "vision_config.mlp_ratio · embed_dim"
    OUTPUT: ClassVar[str] = "vision_config.hidden_size"

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
        positive_int(self.HIDDEN, self.hidden_size)
        positive_int(self.INTERMEDIATE, self.intermediate_size)
        positive_int("vision_config.depth", self.num_layers, most=MAX_LAYERS)
        positive_int("vision_config.num_heads", self.num_heads)
        multiple_of(self.HIDDEN, self.hidden_size, "num_heads", self.num_heads)
        if self.hidden_size // self.num_heads % 4:
            refuse(f"{self.HIDDEN} / num_heads", self.hidden_size // self.num_heads, "a multiple of 4")
        positive_int(self.OUTPUT, self.output_size)
        one_of("vision_config.in_channels", self.in_channels, (3,))
        positive_int("vision_config.patch_size", self.patch_size)
        positive_int("vision_config.temporal_patch_size", self.temporal_patch_size)
        positive_int("vision_config.spatial_merge_size", self.merge_size)
        positive_float("layer_norm_eps", self.layer_norm_eps)

    @property
    def patch_multiple(self) -> int:
        """The tower takes a multiple of so many patches, which are merged into one row."""
        return self.merge_size**2


def vision_config(hf: dict[str, Any]) -> Qwen2VitConfig:
    """The tower of a Qwen2-VL vision_config, whose hidden_size is the language model's width."""
    supported(hf, SUPPORTED, at="vision_config.")
    embed_dim = positive_int("vision_config.embed_dim", hf.get("embed_dim", 1280))
    return Qwen2VitConfig(
        hidden_size=embed_dim,
        intermediate_size=int(embed_dim * positive_float("vision_config.mlp_ratio", hf.get("mlp_ratio", 4))),
        output_size=hf.get("hidden_size", 3584),
        **common(hf, num_layers=32, patch_size=14),
    )


def common(hf: dict[str, Any], *, num_layers: int, patch_size: int) -> dict[str, Any]:
    """The fields whose keys are the same in all generations, with a generation's own defaults."""
    return {
        "num_layers": hf.get("depth", num_layers),
        "num_heads": hf.get("num_heads", 16),
        "in_channels": hf.get("in_channels", hf.get("in_chans", 3)),
        "patch_size": hf.get("patch_size", patch_size),
        "temporal_patch_size": hf.get("temporal_patch_size", 2),
        "merge_size": hf.get("spatial_merge_size", 2),
    }


def param_specs(cfg: Qwen2VitConfig, at: str) -> Tree:
    """Specs of the tower whose checkpoint names begin with `at`."""
    c, merged = cfg.hidden_size, cfg.hidden_size * cfg.merge_size**2
    return {
        "patch": patch_spec(cfg, at),
        "blocks": [_block_specs(cfg, f"{at}.blocks.{i}") for i in range(cfg.num_layers)],
        "merger": {
            "norm": layer_norm_specs(f"{at}.merger.ln_q", c),
            "up": linear_specs(f"{at}.merger.mlp.0", merged, merged, ("mlp", "embed")),
            "down": linear_specs(f"{at}.merger.mlp.2", merged, cfg.output_size, ("embed", "mlp")),
        },
    }


def patch_spec(cfg: Qwen2VitConfig, at: str) -> ParamSpec:
    """The patch embedding: a convolution whose stride is its kernel, as a matmul."""
    c, kernel = cfg.hidden_size, (cfg.in_channels, cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)
    return ParamSpec(
        shape=(c, prod(kernel)), axes=("embed", None), sources=((f"{at}.patch_embed.proj.weight", (c, *kernel)),)
    )


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


def tower(params: Tree, cfg: Qwen2VitConfig, patches: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Normalised patches (P, in_channels·T·p·p) → the last block's output (P, hidden); each frame is one segment."""
    x = F.linear(patches, params["patch"])
    table = rope_2d(cfg.hidden_size // cfg.num_heads, position_ids)
    for p in params["blocks"]:
        x = block(p, cfg, x, ACTIVATION, cu_seqlens, table)
    return x


def merger(params: Tree, cfg: Qwen2VitConfig, x: Tensor) -> Tensor:
    """(P, hidden) → (P / merge_size², output_size): neighbouring patches, adjacent in P, become one row."""
    p = params["merger"]
    x = layer_norm(x, p["norm"]["weight"], p["norm"]["bias"], cfg.layer_norm_eps)
    return linear(p["down"], activation(linear(p["up"], x.view(-1, cfg.merge_size**2 * cfg.hidden_size)), "gelu"))
