"""slices: grids and sizes as MODELS.md works them out and as transformers has them for MiniCPM-V 4.6, which cuts images the same way."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tests.pictures import picture
from tests.versions import transformers_from
from vlmfx.processing import slices

SIDES = st.one_of(st.integers(14, 6000), st.integers(14, 900))


@lru_cache
def reference() -> Any:
    """transformers' image processor of MiniCPM-V 4.6, with defaults.

    It may stand in for 2.6, which transformers does not have: the score of a grid, the candidates and their order, and the rounding
    of sizes are those that MODELS.md writes down for 2.6; the goldens of 2.6, made with the code published with it, say the same."""
    transformers_from(5, 20, "is not known to have MiniCPM-V 4.6")
    module = importlib.import_module("transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6")
    return module.MiniCPMV4_6ImageProcessorPil()


@pytest.mark.parametrize(
    ("size", "grid", "whole", "cell", "count"),
    [
        ((224, 224), (0, 0), (448, 448), None, 1),
        ((640, 480), (2, 1), (518, 392), (364, 546), 3),
        ((1000, 200), (0, 0), (994, 196), None, 1),
        ((1344, 1344), (3, 3), (448, 448), (448, 448), 10),
        ((4000, 3000), (3, 3), None, None, 10),
        ((300, 1500), (1, 4), None, None, 5),
        ((1, 1), (0, 0), (448, 448), None, 1),
    ],
)
def test_worked_sizes(size, grid, whole, cell, count):
    found = slices.slice_grid(size, 448, 9)
    assert found == grid
    assert 1 + found[0] * found[1] == count
    if whole is not None:
        assert slices.whole_size(size, 448, 14) == whole
    if cell is not None:
        assert slices.sliced_size(size, grid, 448, 14) == (cell[0] * grid[0], cell[1] * grid[1])


@settings(deadline=None, max_examples=500)
@given(width=SIDES, height=SIDES, max_slices=st.integers(1, 40), scale=st.sampled_from([448, 336, 64]))
def test_grid_and_sizes_equal_transformers(width, height, max_slices, scale):
    """Its unit is patch_size · 4."""
    theirs = reference().get_sliced_grid((height, width), max_slices, scale)
    grid = slices.slice_grid((width, height), scale, max_slices)
    assert list(grid) == ([0, 0] if theirs is None else theirs[::-1])
    whole = reference().find_best_resize((height, width), scale, 3.5, "16x", allow_upscale=theirs is None)
    assert slices.whole_size((width, height), scale, 14) == whole[::-1]
    if theirs is not None:
        refined = reference().get_refine_size((height, width), theirs, scale, 3.5, "16x", allow_upscale=True)
        assert slices.sliced_size((width, height), grid, scale, 14) == refined[::-1]


@pytest.mark.parametrize(
    ("max_slices", "size", "grid"), [(2, (448, 449), (1, 2)), (2, (2000, 2000), (1, 2)), (3, (450, 450), (1, 2))]
)
def test_ties_go_to_the_first_candidate(max_slices, size, grid):
    """1 × 2 and 2 × 1 are equally far from a square."""
    assert slices.slice_grid(size, 448, max_slices) == grid


@pytest.mark.parametrize("size", [(150, 100), (500, 700), (130, 47), (300, 290), (90, 400), (13, 13)])
def test_pixels_equal_transformers(size):
    image = picture(*size)
    scale, patch = 112, 14
    made = reference()(
        [image], scale_resolution=scale, patch_size=7, downsample_mode="4x", max_slice_nums=9, return_tensors="pt"
    )
    grid = slices.slice_grid(size, scale, 9)
    mine = slices.cut_image(image, grid, scale, patch)
    theirs = images_of(made["pixel_values"][0], made["target_sizes"].tolist(), 7)
    assert len(mine) == len(theirs) == 1 + grid[0] * grid[1]
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close((a / 255 - 0.5) / 0.5, b, atol=1e-6, rtol=0)


def images_of(strip: Tensor, sizes: list[list[int]], patch: int) -> list[Tensor]:
    """(3, p, p·patches) of several images and their (rows, columns) of patches → images (H, W, 3)."""
    parts = strip.split([rows * columns * patch for rows, columns in sizes], 2)
    return [
        part.unflatten(2, (rows, columns, patch)).permute(2, 1, 3, 4, 0).flatten(2, 3).flatten(0, 1)
        for part, (rows, columns) in zip(parts, sizes, strict=True)
    ]


def test_slices_come_row_by_row():
    """Each slice shows its own part: colours that grow with the column, and ten times as fast with the row."""
    ramp = np.add.outer(np.arange(600) // 200 * 100, np.arange(400) // 200 * 10).astype(np.uint8)
    whole, *parts = slices.cut_image(Image.fromarray(ramp).convert("RGB"), (2, 3), 224, 14)
    assert whole.shape[0] > whole.shape[1]
    assert [int(part.float().median()) for part in parts] == [0, 10, 100, 110, 200, 210]
