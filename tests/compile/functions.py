"""Small functions to lower: an MLP of two layers, and a decode step that writes a cache and reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.strategies import normal
from vlmfx.models.layers import Batch, Cache
from vlmfx.ops.gated_activation import gated_activation
from vlmfx.ops.paged_decode_attention import paged_decode_attention
from vlmfx.ops.rms_norm import rms_norm
from vlmfx.ops.rotary import RotaryTable
from vlmfx.ops.rotary_cache_write import rotary_cache_write
from vlmfx.tree import Tree

needs_compiler = pytest.mark.skipif(torch.__version__ < "2.11", reason="programs want torch 2.11")


@dataclass(frozen=True)
class Config:
    eps: float = 1e-6
    num_heads: int = 4


def mlp(params: Tree, cfg: Config, x: Tensor, scale: Tensor | None = None) -> dict[str, Any]:
    """{"y": (rows, hidden), "means": [(rows,) a layer], "count": 2}"""
    means = []
    for p in params["layers"]:
        x = x + F.linear(gated_activation(F.linear(rms_norm(x, p["norm"], cfg.eps), p["gate_up"])), p["down"])
        means.append(x.mean(-1))
    return {"y": x if scale is None else x * scale, "means": means, "count": len(means)}


def mlp_args(rows: int = 3, hidden: int = 8, inter: int = 6) -> tuple[Tree, Config, Tensor]:
    layers = [
        {
            "norm": normal(i, hidden),
            "gate_up": normal(i + 1, 2 * inter, hidden) / hidden,
            "down": normal(i + 2, hidden, inter) / inter,
        }
        for i in (0, 10)
    ]
    return {"layers": layers}, Config(), normal(99, rows, hidden)


def step(cfg: Config, qkv: Tensor, table: Tree, cache: Cache, batch: Batch) -> tuple[Tensor, Cache]:
    """Attention of each row's new token, (rows, heads, head_dim), and the cache, written in place."""
    (kv,) = cache
    assert batch.slot_mapping is not None
    assert batch.context_lens is not None
    qk = rotary_cache_write(qkv, RotaryTable(*table), *kv, batch.slot_mapping)
    q, _ = qk.split_with_sizes((cfg.num_heads, kv[0].shape[1]), 1)
    return paged_decode_attention(q, *kv, batch.block_table, batch.context_lens, None, None, 0.25), cache


def step_args() -> tuple[Config, Tensor, Tree, Cache, Batch]:
    """Two sequences whose tokens 3 and 6 are new, in blocks of 4; 2 heads of keys and values, each 16 wide."""
    cache = [(normal(1, 5, 2, 4, 16), normal(2, 5, 2, 4, 16))]
    block_table = torch.tensor([[1, 0], [3, 2]], dtype=torch.int32)
    slots = torch.tensor([1 * 4 + 2, 2 * 4 + 1], dtype=torch.int32)
    lens = torch.tensor([3, 6], dtype=torch.int32)
    batch = Batch(slot_mapping=slots, context_lens=lens, block_table=block_table)
    return Config(), normal(3, 2, 8, 16), (normal(4, 2, 16), normal(5, 2, 16)), cache, batch
