"""The pre-norm transformer block that the vision towers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from vlmfx.models.layers import layer_norm_specs, linear, linear_specs
from vlmfx.ops.attention import vision_attention
from vlmfx.ops.norm import layer_norm
from vlmfx.ops.rotary import RotaryTable, rotary
from vlmfx.tree import Tree


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


def block(
    p: Tree,
    cfg: VisionConfig,
    x: Tensor,
    activation: Callable[[Tensor], Tensor],
    seq_lens: tuple[int, ...],
    table: RotaryTable | None = None,
) -> Tensor:
    """x (patches, hidden) → (patches, hidden); segments of seq_lens patches do not see each other."""
    n, head_dim = len(x), cfg.hidden_size // cfg.num_heads
    h = layer_norm(x, p["norm1"]["weight"], p["norm1"]["bias"], cfg.layer_norm_eps)
    qkv = linear(p["qkv"], h).view(n, 3 * cfg.num_heads, head_dim)
    qk, v = qkv.split((2 * cfg.num_heads, cfg.num_heads), 1)
    q, k = (rotary(qk, table) if table is not None else qk).chunk(2, 1)
    x = x + linear(p["out"], vision_attention(q, k, v, seq_lens, head_dim**-0.5).reshape(n, -1))
    h = layer_norm(x, p["norm2"]["weight"], p["norm2"]["bias"], cfg.layer_norm_eps)
    return x + linear(p["down"], activation(linear(p["up"], h)))
