"""How MiniCPM-V cuts an image: into how many slices, to what sizes image and slices are brought. Sizes here are (width, height).

Source: openbmb/MiniCPM-V-2_6: image_processing_minicpmv.py; arXiv:2403.11703 (LLaVA-UHD)."""

from __future__ import annotations

import math

from PIL import Image
from torch import Tensor

from vlmfx.processing.resize import resize

Size = tuple[int, int]


def slice_grid(size: Size, scale: int, max_slices: int) -> Size:
    """(columns, rows) of the slices of an image, (0, 0) when it is left whole.

    As many as areas of scale × scale fit into it, or one more or less, in the grid whose shape is nearest to the image's; the first of
    equally near ones."""
    width, height = size
    wanted = min(math.ceil(width * height / (scale * scale)), max_slices)
    if wanted <= 1:
        return 0, 0
    counts = [n for n in (wanted - 1, wanted, wanted + 1) if 1 < n <= max_slices]
    grids = [(columns, n // columns) for n in counts for columns in range(1, n + 1) if n % columns == 0]
    shape = math.log(width / height)
    return min(grids, key=lambda grid: abs(shape - math.log(grid[0] / grid[1])))


def whole_size(size: tuple[float, float], scale: int, patch_size: int) -> Size:
    """The size to which a whole image is brought, or a slice: sides in patches, their ratio about kept, an area of about scale × scale.

    The reference does not enlarge images that it slices; but those are larger than that already."""
    ratio = size[0] / size[1]
    height = int(scale / math.sqrt(ratio))
    return _nearest(int(height * ratio), patch_size), _nearest(height, patch_size)


def sliced_size(size: Size, grid: Size, scale: int, patch_size: int) -> Size:
    """The size to which an image is brought before it is cut into a grid of (columns, rows)."""
    columns, rows = grid
    cell = _nearest(size[0], columns) / columns, _nearest(size[1], rows) / rows
    width, height = whole_size(cell, scale, patch_size)
    return width * columns, height * rows


def cut_image(image: Image.Image, grid: Size, scale: int, patch_size: int) -> list[Tensor]:
    """The whole RGB image, then its slices row by row, each (H, W, 3) uint8."""
    columns, rows = grid
    width, height = whole_size(image.size, scale, patch_size)
    whole = resize(image, height, width)
    if not columns:
        return [whole]
    width, height = sliced_size(image.size, grid, scale, patch_size)
    strips = resize(image, height, width).chunk(rows, 0)
    return [whole, *(part for strip in strips for part in strip.chunk(columns, 1))]


def _nearest(length: float, unit: int) -> int:
    """The multiple of unit nearest to length, at least one of it; halves go to the even multiple."""
    return max(round(length / unit) * unit, unit)
