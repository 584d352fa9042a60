"""Cost: operations and bytes of small graphs, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.compile.functions import mlp, mlp_args, needs_compiler, step, step_args
from vlmfx.compile.stages import jit
from vlmfx.ops import paged_decode_attention, rotary_cache_write
from vlmfx.ops.registry import Cost

pytestmark = needs_compiler
X, W, B = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5)
Q = torch.zeros(2, 3, 7, 8)  # batch, heads, positions, head_dim


def inplace(x: Any, w: Any) -> Any:
    return x[:2].copy_(w[:2])


@pytest.mark.parametrize(
    ("fn", "args", "flops", "elements"),
    [
        (lambda x, w: F.linear(x, w), (X, W), 2 * 3 * 4 * 5, 3 * 4 + 5 * 4 + 3 * 5),
        (lambda x, w, b: F.linear(x, w, b), (X, W, B), 2 * 3 * 4 * 5, 3 * 4 + 5 * 4 + 5 + 3 * 5),
        (lambda x, w: x @ w.T + 1, (X, W), 2 * 3 * 4 * 5, 3 * 4 + 5 * 4 + 3 * 5 + 2 * 3 * 5),
        (lambda x: x * x, (X,), 0, 2 * 12),  # read once, though given twice
        (lambda x: x.T.reshape(2, 6)[0], (X,), 0, 2 * 12),  # reshape copies here
        (lambda x: x.view(2, 6)[0], (X,), 0, 0),
        (inplace, (X, W), 0, 2 * 2 * 4),
        (lambda q: F.scaled_dot_product_attention(q, q, q), (Q,), 2 * 2 * 6 * 7 * 7 * 8, 2 * Q.numel()),
    ],
)
def test_the_cost_by_hand(fn, args, flops, elements):
    assert jit(fn, donate=0).lower(*args).cost_analysis() == (flops, 4 * elements)


def test_an_op_costs_what_its_contract_says():
    _, qkv, table, cache, batch = args = step_args()
    (cos, sin), ((k, v),) = table, cache
    assert batch.slot_mapping is not None
    assert batch.context_lens is not None
    write = rotary_cache_write.cost(qkv, cos, sin, k, v, batch.slot_mapping)
    read = paged_decode_attention.cost(qkv[:, :4], k, v, batch.block_table, batch.context_lens, None, None, 0.25, 0)
    cost = jit(step, static="cfg", donate="cache").lower(*args).cost_analysis()
    assert cost == Cost(write.flops + read.flops, write.bytes + read.bytes)


def test_the_matmuls_of_an_mlp_are_counted():
    rows, hidden, inter = 3, 8, 6
    cost = jit(mlp, static="cfg").lower(*mlp_args(rows, hidden, inter)).cost_analysis()
    assert cost.flops == 2 * (2 * rows * hidden * 2 * inter + 2 * rows * inter * hidden)
