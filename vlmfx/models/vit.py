"""What the vision towers share: the pre-norm transformer block, its attention, the rotary table of rows and columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from vlmfx.models.layers import layer_norm_specs, linear, linear_specs
from vlmfx.ops.attention import vision_attention
from vlmfx.ops.norm import layer_norm
from vlmfx.ops.rotary import RotaryTable, inverse_frequencies, rotary, rotary_table
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
    activation: Callable[[Tensor], Tensor],
    seq_lens: tuple[int, ...],
    table: RotaryTable | None = None,
) -> Tensor:
    """x (patches, hidden) → (patches, hidden); segments of seq_lens patches do not see each other."""
    h = layer_norm(x, p["norm1"]["weight"], p["norm1"]["bias"], cfg.layer_norm_eps)
    x = x + attention(p, h, cfg.num_heads, seq_lens, table)
    h = layer_norm(x, p["norm2"]["weight"], p["norm2"]["bias"], cfg.layer_norm_eps)
    return x + linear(p["down"], activation(linear(p["up"], h)))


def attention(p: Tree, h: Tensor, num_heads: int, seq_lens: tuple[int, ...], table: RotaryTable | None) -> Tensor:
    """h (patches, hidden), normed → (patches, hidden), with the projections `qkv` and `out` of p."""
    n, head_dim = len(h), h.shape[1] // num_heads
    qk, v = linear(p["qkv"], h).view(n, 3 * num_heads, head_dim).split((2 * num_heads, num_heads), 1)
    q, k = (rotary(qk, table) if table is not None else qk).chunk(2, 1)
    return linear(p["out"], vision_attention(q, k, v, seq_lens, head_dim**-0.5).reshape(n, -1))


def rope_2d(head_dim: int, position_ids: Tensor) -> RotaryTable:
    """position_ids (patches, 2), row and column: half of the frequencies turn with the row, half with the column."""
    inv = inverse_frequencies(head_dim // 2, 10000.0, position_ids.device)
    return rotary_table((position_ids[..., None].float() * inv).flatten(1), torch.float32)
