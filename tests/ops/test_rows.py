"""rows_of: every row is found, and nothing is copied that two strides reach."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.rows import laid_out, leading
from tests.strategies import SEEDS, normal
from vlmfx.ops.triton.rows import rows_of, tile_of


@given(data=st.data(), width=st.integers(1, 9), seed=SEEDS)
def test_every_row_is_found(data, width, seed):
    values = normal(seed, *data.draw(leading(width)), width)
    rows = rows_of(data.draw(laid_out(values, values.dtype)))
    row = torch.arange(rows.num)
    starts = (row // rows.inner) * rows.outer_stride + (row % rows.inner) * rows.inner_stride
    flat = torch.as_strided(rows.tensor, (rows.tensor.untyped_storage().nbytes() // 4,), (1,), 0)
    found = flat[rows.tensor.storage_offset() + starts[:, None] + torch.arange(width)]
    assert torch.equal(found, values.reshape(-1, width))


def test_two_strides_need_no_copy():
    projection = torch.zeros(5, 7, 12)
    for view in (
        projection,
        projection[:, 2:6],
        projection[:, :, :8],
        projection[1:, 2:6, :8],
        projection[0],
        projection[:1, :2],
    ):
        assert rows_of(view).tensor is view
    apart = torch.zeros(2, 5, 7, 12)
    assert rows_of(apart[:, :3]).tensor.data_ptr() == apart.data_ptr()
    assert rows_of(apart[:, :1, 2:6]).tensor.data_ptr() == apart[:, :1, 2:6].data_ptr()
    assert rows_of(apart[:, :3, :2]).tensor.data_ptr() != apart.data_ptr()
    assert rows_of(apart.transpose(2, 3)).tensor.data_ptr() != apart.data_ptr()


def test_the_number_of_rows_changes_no_constant():
    """One token in the batch or many: inner and both strides, compile-time constants of a kernel, are the same, so it is compiled once.
    Where an axis has one element its stride, which then leads nowhere, is kept for that."""
    heads = torch.zeros(9, 20, 8)[:, 4:16]
    assert {rows_of(heads[:n])[2:] for n in (1, 2, 3, 9)} == {(12, 160, 8)}
    tokens = torch.zeros(9, 24)[:, :8]
    assert {rows_of(tokens[:n])[2:] for n in (1, 2, 3, 9)} == {(1, 24, 0)}


@pytest.mark.parametrize("width", [1, 7, 64, 128, 1280, 3584, 4096, 8192, 32768])
def test_a_tile_holds_its_rows(width):
    num_rows, block, num_warps = tile_of(width)
    assert width <= block < 2 * width
    assert num_rows == 1 or num_rows * block <= 4096
    assert 1 <= num_warps <= 32
