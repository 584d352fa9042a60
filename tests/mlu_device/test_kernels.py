"""How tests run an op on a card: what they compare is what the device gave, and what it wrote."""

from __future__ import annotations

import torch

from tests.ops import emulated
from tests.ops.kernels import Kernel, assert_equal
from tests.strategies import normal
from vlmfx.ops import cache_write, rms_norm


def test_outputs_come_back():
    case = (normal(0, 3, 70), normal(1, 70), 1e-6)
    kernel = Kernel(rms_norm.OP, "mlu-card", "mlu", emulated.on_card(rms_norm.OP))
    assert_equal(rms_norm.OP, kernel(*case), rms_norm.reference(*case))


def test_what_is_written_comes_back():
    k, v = normal(0, 2, 1, 8), normal(1, 2, 1, 8)
    slots = torch.tensor([5, 0], dtype=torch.int32)
    mine, right = ([torch.zeros(2, 1, 4, 8) for _ in range(2)] for _ in range(2))
    Kernel(cache_write.OP, "mlu-card", "mlu", emulated.on_card(cache_write.OP))(k, v, *mine, slots)
    cache_write.reference(k, v, right[0], right[1], slots)
    for got, expected in zip(mine, right, strict=True):
        assert torch.equal(got, expected)
        assert got.any()
