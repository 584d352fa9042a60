"""A kernel on a device reads arguments that lie there as they lie here, and only what it may write comes back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.ops.kernels import Kernel, laid_out_on
from vlmfx.ops import cache_write

ELSEWHERE = "cpu:0"  # to torch where "cpu" is; to `Kernel`, which goes by the name, a device, with memory of its own


def views() -> list[Tensor]:
    """A slice along every axis that begins at an odd element, axes in another order, elements apart, one expanded, one empty."""
    x = torch.arange(120.0).view(4, 5, 6)
    return [x[1:, 1:3, 1:4], x.permute(2, 0, 1)[1:], x[..., ::2], x[1:2, :, 1].expand(3, 5), x[:0], x.half()[2:, 3]]


def test_strides_offset_and_neighbours_survive():
    for x in views():
        for device in (ELSEWHERE, "meta"):
            there = laid_out_on(device, x)
            assert (there.shape, there.stride(), there.storage_offset()) == (x.shape, x.stride(), x.storage_offset())
            assert there.untyped_storage().nbytes() == x.untyped_storage().nbytes()
        there = laid_out_on(ELSEWHERE, x)
        assert torch.equal(there, x)
        assert not x.numel() or there.data_ptr() != x.data_ptr()


def test_only_what_the_schema_says_is_written_comes_back():
    def overwrite(*args: Any) -> Tensor:
        for a in args:
            a.fill_(7)
        return args[0]

    beside = [torch.zeros(4, 6) for _ in range(5)]
    arguments = [x[:, 1::2] for x in beside]
    out = Kernel(cache_write.OP, "overwrite", ELSEWHERE, overwrite)(*arguments)
    assert [a.unique().tolist() for a in arguments] == [[0], [0], [7], [7], [0]]
    assert [x[:, ::2].unique().tolist() for x in beside] == [[0]] * 5
    assert (out == 7).all()
