"""What the vision towers share: the pre-norm transformer block, its attention, the rotary table of rows and columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmfx.models.layers import layer_norm_specs, linear, linear_specs
from vlmfx.models.validate import MAX_LAYERS, multiple_of, one_of, positive_float, positive_int, supported
from vlmfx.ops.activation import ACTIVATIONS, activation
from vlmfx.ops.layer_norm import layer_norm
from vlmfx.ops.rotary import RotaryTable, inverse_frequencies, rotary, rotary_table
from vlmfx.ops.vision_attention import vision_attention
from vlmfx.tree import Tree
from vlmfx.weights import fused


class VisionConfig(Protocol):
    """The sizes a block needs."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def layer_norm_eps(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What changes the arithmetic of a tower as transformers' CLIP and SigLIP write it; image_size / patch_size is the side of the
    square table of positions."""

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
    def patch_multiple(self) -> int:
        """The tower takes a multiple of so many patches."""
        return 1

    @property
    def table_side(self) -> int:
        """Rows, and columns, of the table of positions."""
        return self.image_size // self.patch_size


def encoder_settings(hf: dict[str, Any], *, patch_size: int, hidden_act: str, layer_norm_eps: float) -> dict[str, Any]:
    """The fields of EncoderConfig from a vision_config; the arguments are what the family takes where it says nothing."""
    supported(hf, {"num_channels": 3}, at="vision_config.")
    return {
        "hidden_size": hf.get("hidden_size", 768),
        "intermediate_size": hf.get("intermediate_size", 3072),
        "num_layers": hf.get("num_hidden_layers", 12),
        "num_heads": hf.get("num_attention_heads", 12),
        "image_size": hf.get("image_size", 224),
        "patch_size": hf.get("patch_size", patch_size),
        "hidden_act": hf.get("hidden_act", hidden_act),
        "layer_norm_eps": hf.get("layer_norm_eps", layer_norm_eps),
    }


def block_specs(names: dict[str, str], hidden: int, intermediate: int, qkv: Tree) -> Tree:
    """Specs of one block; names maps norm1, out, norm2, up and down to checkpoint names, qkv is the fused projection's own spec."""
    return {
        "norm1": layer_norm_specs(names["norm1"], hidden),
        "qkv": qkv,
        "out": linear_specs(names["out"], hidden, hidden, ("embed", "heads")),
        "norm2": layer_norm_specs(names["norm2"], hidden),
        "up": linear_specs(names["up"], hidden, intermediate, ("mlp", "embed")),
        "down": linear_specs(names["down"], intermediate, hidden, ("embed", "mlp")),
    }


def encoder_layer_specs(at: str, hidden: int, intermediate: int) -> Tree:
    """Specs of one block of CLIP or SigLIP, whose checkpoint names begin with `at`."""
    names = {
        "norm1": f"{at}.layer_norm1",
        "out": f"{at}.self_attn.out_proj",
        "norm2": f"{at}.layer_norm2",
        "up": f"{at}.mlp.fc1",
        "down": f"{at}.mlp.fc2",
    }
    qkv = [f"{at}.self_attn.{name}_proj" for name in "qkv"]
    fused_qkv = {
        "weight": fused([f"{n}.weight" for n in qkv], [hidden] * 3, (hidden,), ("heads", "embed")),
        "bias": fused([f"{n}.bias" for n in qkv], [hidden] * 3, (), ("heads",), init="zeros"),
    }
    return block_specs(names, hidden, intermediate, fused_qkv)


def block(
    p: Tree,
    cfg: VisionConfig,
    x: Tensor,
    act: str,
    cu_seqlens: Tensor,
    table: RotaryTable | None = None,
) -> Tensor:
    """x (patches, hidden) → (patches, hidden); the segments of cu_seqlens do not see each other. act: of ACTIVATIONS."""
    h = layer_norm(x, p["norm1"]["weight"], p["norm1"]["bias"], cfg.layer_norm_eps)
    x = x + attention(p, h, cfg.num_heads, cu_seqlens, table)
    h = layer_norm(x, p["norm2"]["weight"], p["norm2"]["bias"], cfg.layer_norm_eps)
    return x + linear(p["down"], activation(linear(p["up"], h), act))


def attention(p: Tree, h: Tensor, num_heads: int, cu_seqlens: Tensor, table: RotaryTable | None) -> Tensor:
    """h (patches, hidden), normed → (patches, hidden), with the projections `qkv` and `out` of p."""
    n, head_dim = len(h), h.shape[1] // num_heads
    qk, v = linear(p["qkv"], h).view(n, 3 * num_heads, head_dim).split((2 * num_heads, num_heads), 1)
    q, k = (rotary(qk, table) if table is not None else qk).chunk(2, 1)
    return linear(p["out"], vision_attention(q, k, v, cu_seqlens, cu_seqlens, head_dim**-0.5).view(n, -1))


def rope_2d(head_dim: int, position_ids: Tensor) -> RotaryTable:
    """position_ids (patches, 2), row and column: half of the frequencies turn with the row, half with the column."""
    inv = inverse_frequencies(head_dim // 2, 10000.0, position_ids.device)
    return rotary_table((position_ids[..., None].float() * inv).flatten(1), torch.float32)
