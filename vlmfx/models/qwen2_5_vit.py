"""Qwen2.5-VL's vision tower: Qwen2-VL's with RMS norms, gated MLPs, and attention within windows in most layers.

The host packs patches frame by frame and window by window, so that frames and windows are both runs of neighbouring patches.
Source: huggingface/transformers: src/transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py; arXiv:2502.13923."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from vlmfx.models.layers import linear, linear_specs, norm_spec
from vlmfx.models.qwen2_vit import Qwen2VitConfig, common, patch_spec
from vlmfx.models.validate import MAX_LAYERS, listed, positive_int, refuse, supported
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.models.vit import attention, rope_2d
from vlmfx.ops.activation import activation
from vlmfx.ops.add_rms_norm import add_rms_norm
from vlmfx.ops.gated_activation import gated_activation
from vlmfx.ops.rms_norm import rms_norm
from vlmfx.ops.rotary import RotaryTable
from vlmfx.tree import Tree
from vlmfx.weights import fused

SUPPORTED = {"hidden_act": "silu"}


@dataclass(frozen=True, kw_only=True)
class Qwen25VitConfig(Qwen2VitConfig):
    """window_size: the side of an attention window in pixels; full_layers: the layers that attend to the whole frame;
    tokens_per_second: how far a video's time positions move in a second."""

    HIDDEN: ClassVar[str] = "vision_config.hidden_size"
    INTERMEDIATE: ClassVar[str] = "vision_config.intermediate_size"
    OUTPUT: ClassVar[str] = "vision_config.out_hidden_size"

    window_size: int
    full_layers: tuple[int, ...]
    tokens_per_second: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if positive_int("vision_config.window_size", self.window_size) < self.patch_size * self.merge_size:
            least = self.patch_size * self.merge_size
            refuse("vision_config.window_size", self.window_size, f"at least a merged patch, {least} pixels")
        if any(type(i) is not int or not 0 <= i < MAX_LAYERS for i in self.full_layers):
            refuse("vision_config.fullatt_block_indexes", list(self.full_layers), "numbers of layers, counted from 0")
        positive_int("vision_config.tokens_per_second", self.tokens_per_second)

    @property
    def window(self) -> int:
        """The side of a window in merged patches."""
        return self.window_size // self.merge_size // self.patch_size


def vision_config(hf: dict[str, Any]) -> Qwen25VitConfig:
    """The tower of a Qwen2.5-VL vision_config."""
    supported(hf, SUPPORTED, at="vision_config.")
    return Qwen25VitConfig(
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        output_size=hf["out_hidden_size"],
        window_size=hf.get("window_size", 112),
        full_layers=listed(hf, "fullatt_block_indexes", default=(7, 15, 23, 31), at="vision_config."),
        tokens_per_second=hf.get("tokens_per_second", 4),
        **common(hf, num_layers=32, patch_size=14),
    )


def param_specs(cfg: Qwen25VitConfig, at: str) -> Tree:
    """Specs of the tower whose checkpoint names begin with `at`."""
    c, merged = cfg.hidden_size, cfg.hidden_size * cfg.merge_size**2
    return {
        "patch": patch_spec(cfg, at),
        "blocks": [_block_specs(cfg, f"{at}.blocks.{i}") for i in range(cfg.num_layers)],
        "merger": {
            "norm": norm_spec(f"{at}.merger.ln_q", c),
            "up": linear_specs(f"{at}.merger.mlp.0", merged, merged, ("mlp", "embed")),
            "down": linear_specs(f"{at}.merger.mlp.2", merged, cfg.output_size, ("embed", "mlp")),
        },
    }


def _block_specs(cfg: Qwen25VitConfig, at: str) -> Tree:
    c, rows = cfg.hidden_size, [cfg.intermediate_size] * 2
    gate_up = [f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"]
    return {
        "norm1": norm_spec(f"{at}.norm1", c),
        "qkv": linear_specs(f"{at}.attn.qkv", c, 3 * c, ("heads", "embed")),
        "out": linear_specs(f"{at}.attn.proj", c, c, ("embed", "heads")),
        "norm2": norm_spec(f"{at}.norm2", c),
        "gate_up": {
            "weight": fused([f"{n}.weight" for n in gate_up], rows, (c,), ("mlp", "embed")),
            "bias": fused([f"{n}.bias" for n in gate_up], rows, (), ("mlp",), init="zeros"),
        },
        "down": linear_specs(f"{at}.mlp.down_proj", cfg.intermediate_size, c, ("embed", "mlp")),
    }


def tower(params: Tree, cfg: Qwen25VitConfig, patches: Tensor, inputs: VisionInputs) -> Tensor:
    """Normalised patches (P, in_channels·T·p·p) → the last block's output (P, hidden), both in the order of the windows."""
    x = F.linear(patches, params["patch"])
    table, windows = rope_2d(cfg.hidden_size // cfg.num_heads, inputs.position_ids), inputs.cu_window_seqlens
    assert windows is not None, "processing says which patches a window has"
    for i, p in enumerate(params["blocks"]):
        x = _block(p, cfg, x, inputs.cu_seqlens if i in cfg.full_layers else windows, table)
    return x


def _block(p: Tree, cfg: Qwen25VitConfig, x: Tensor, cu_seqlens: Tensor, table: RotaryTable) -> Tensor:
    """x (patches, hidden) → (patches, hidden); the segments of cu_seqlens do not see each other."""
    h = rms_norm(x, p["norm1"], cfg.layer_norm_eps)
    h, x = add_rms_norm(attention(p, h, cfg.num_heads, cu_seqlens, table), x, p["norm2"], cfg.layer_norm_eps)
    return x + linear(p["down"], gated_activation(linear(p["gate_up"], h)))


def merger(params: Tree, cfg: Qwen25VitConfig, x: Tensor) -> Tensor:
    """(P, hidden) → (P / merge_size², output_size): neighbouring patches, adjacent in P, become one row."""
    p = params["merger"]
    x = rms_norm(x, p["norm"], cfg.layer_norm_eps)
    return linear(p["down"], activation(linear(p["up"], x.view(-1, cfg.merge_size**2 * cfg.hidden_size)), "gelu"))
