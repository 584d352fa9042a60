"""Qwen3-VL's vision tower: learned positions resampled to the image beside the rotary ones, and features of several layers.

Source: huggingface/transformers: src/transformers/models/qwen3_vl/modeling_qwen3_vl.py; deepstack is arXiv:2406.04334."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfx.models.layers import layer_norm_specs, linear, linear_specs
from vlmfx.models.qwen2_vit import Qwen2VitConfig, common, patch_spec
from vlmfx.models.validate import listed, positive_int, refuse, supported
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.models.vit import block, block_specs, rope_2d
from vlmfx.ops.activation import activation
from vlmfx.ops.layer_norm import layer_norm
from vlmfx.tree import Tree
from vlmfx.weights import spec

ACTIVATION = "gelu_pytorch_tanh"
SUPPORTED = {"hidden_act": ACTIVATION}


@dataclass(frozen=True, kw_only=True)
class Qwen3VitConfig(Qwen2VitConfig):
    """num_positions: learned positions, a square of them; deepstack_layers: the layers whose output goes to the decoder too."""

    HIDDEN: ClassVar[str] = "vision_config.hidden_size"
    INTERMEDIATE: ClassVar[str] = "vision_config.intermediate_size"
    OUTPUT: ClassVar[str] = "vision_config.out_hidden_size"

    num_positions: int
    deepstack_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions_side**2 != self.num_positions:
            refuse("vision_config.num_position_embeddings", self.num_positions, "the square of an integer")
        layers, expected = self.deepstack_layers, f"increasing numbers of layers from 0 to {self.num_layers - 1}"
        if any(type(i) is not int or not 0 <= i < self.num_layers for i in layers) or sorted(set(layers)) != [*layers]:
            refuse("vision_config.deepstack_visual_indexes", list(layers), expected)

    @property
    def positions_side(self) -> int:
        """The side of the square of learned positions."""
        return isqrt(positive_int("vision_config.num_position_embeddings", self.num_positions))


def vision_config(hf: dict[str, Any]) -> Qwen3VitConfig:
    """The tower of a Qwen3-VL vision_config."""
    supported(hf, SUPPORTED, at="vision_config.")
    return Qwen3VitConfig(
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        output_size=hf["out_hidden_size"],
        num_positions=hf["num_position_embeddings"],
        deepstack_layers=listed(hf, "deepstack_visual_indexes", at="vision_config."),
        **common(hf, num_layers=27, patch_size=16),
    )


def param_specs(cfg: Qwen3VitConfig, at: str) -> Tree:
    """Specs of the tower whose checkpoint names begin with `at`."""
    c = cfg.hidden_size
    return {
        "patch": patch_spec(cfg, at),
        "patch_bias": spec(f"{at}.patch_embed.proj.bias", (c,), ("embed",), init="zeros"),
        "position": spec(f"{at}.pos_embed.weight", (cfg.num_positions, c), (None, "embed")),
        "blocks": [_block_specs(cfg, f"{at}.blocks.{i}") for i in range(cfg.num_layers)],
        "merger": _merger_specs(cfg, f"{at}.merger", c),
        "deepstack": [
            _merger_specs(cfg, f"{at}.deepstack_merger_list.{i}", c * cfg.merge_size**2)
            for i in range(len(cfg.deepstack_layers))
        ],
    }


def _block_specs(cfg: Qwen3VitConfig, at: str) -> Tree:
    c = cfg.hidden_size
    names = {
        "norm1": f"{at}.norm1",
        "out": f"{at}.attn.proj",
        "norm2": f"{at}.norm2",
        "up": f"{at}.mlp.linear_fc1",
        "down": f"{at}.mlp.linear_fc2",
    }
    return block_specs(names, c, cfg.intermediate_size, linear_specs(f"{at}.attn.qkv", c, 3 * c, ("heads", "embed")))


def _merger_specs(cfg: Qwen3VitConfig, at: str, normed: int) -> Tree:
    merged = cfg.hidden_size * cfg.merge_size**2
    return {
        "norm": layer_norm_specs(f"{at}.norm", normed),
        "up": linear_specs(f"{at}.linear_fc1", merged, merged, ("mlp", "embed")),
        "down": linear_specs(f"{at}.linear_fc2", merged, cfg.output_size, ("embed", "mlp")),
    }


def tower(params: Tree, cfg: Qwen3VitConfig, patches: Tensor, inputs: VisionInputs) -> Tensor:
    """Normalised patches (P, in_channels·T·p·p) → (P, (1 + n)·hidden): the last block's output, then those of the n deepstack layers.

    position_ids of inputs are row, column and four learned positions, position_weights (P, 4) the shares of these."""
    x = F.linear(patches, params["patch"], params["patch_bias"])
    assert inputs.position_weights is not None, "processing says how learned positions are mixed"
    learned = F.embedding(inputs.position_ids[:, 2:], params["position"]) * inputs.position_weights[..., None]
    x = x + learned.sum(1).to(x.dtype)
    table = rope_2d(cfg.hidden_size // cfg.num_heads, inputs.position_ids[:, :2])
    kept = []
    for i, p in enumerate(params["blocks"]):
        x = block(p, cfg, x, ACTIVATION, inputs.cu_seqlens, table)
        if i in cfg.deepstack_layers:
            kept.append(x)
    return torch.cat([x, *kept], -1)


def mergers(params: Tree, cfg: Qwen3VitConfig, x: Tensor) -> Tensor:
    """(P, (1 + n)·hidden) → (P / merge_size², (1 + n)·output_size); the deepstack mergers norm a whole 2 × 2 block at once."""
    parts = x.split(cfg.hidden_size, -1)
    rows = [_merger(p, cfg, part) for p, part in zip([params["merger"], *params["deepstack"]], parts, strict=True)]
    return torch.cat(rows, -1)


def _merger(p: Tree, cfg: Qwen3VitConfig, x: Tensor) -> Tensor:
    norm = p["norm"]
    x = layer_norm(x.reshape(-1, norm["weight"].shape[0]), norm["weight"], norm["bias"], cfg.layer_norm_eps)
    return linear(p["down"], activation(linear(p["up"], x.view(-1, cfg.merge_size**2 * cfg.hidden_size)), "gelu"))
