"""What each cell of a picture holds, by the 28 × 28 cells that the language model sees one feature row each of.

`scenes` learns to answer questions; told as well what lies in each cell, its vision tower learns to see in a tenth of the time. The head
that tells is thrown away after training."""

from __future__ import annotations

import string

import numpy as np
from scenes.scene import Scene
from scenes.vocabulary import COLOURS, SHAPES

CELL = 28
CHARS = string.ascii_letters + string.digits + "."
SLOTS = 4  # the quarters of a cell's width; characters and bars in one cell are told apart by them
# Of each target: how many classes; class 0 is "nothing".
CLASSES = (1 + len(COLOURS), 1 + len(SHAPES), *SLOTS * (11,), *SLOTS * (1 + len(CHARS),))
MIN_SHARE = 0.25  # of the cell, or of the object, that must lie in the cell


def cell_targets(scene: Scene) -> np.ndarray:
    """(cells, len(CLASSES)) int64, cells row by row: colour, shape, then by slot the value of the bar whose column it is part of, so
    that a label's cell tells its bar's value, and the character that has its middle there."""
    cols, rows = scene.size[0] // CELL, scene.size[1] // CELL
    out = np.zeros((rows, cols, len(CLASSES)), dtype=np.int64)
    for thing in scene.things:
        covered = overlap(thing.box, rows, cols)
        out[covered, 0] = 1 + list(COLOURS).index(thing.colour)
        out[covered, 1] = 1 + SHAPES.index(thing.shape)
    values = out[:, :, 2 : 2 + SLOTS]
    for bar in scene.bars:
        values[overlap(bar.column, rows, cols * SLOTS, CELL // SLOTS).reshape(values.shape)] = bar.value
    for glyph in scene.glyphs:
        row, col = int(glyph.y // CELL), int(glyph.x // CELL)
        if 0 <= row < rows and 0 <= col < cols:
            out[row, col, 2 + SLOTS + int(glyph.x % CELL * SLOTS / CELL)] = 1 + CHARS.index(glyph.char)
    return out.reshape(-1, len(CLASSES))


def overlap(box: tuple[int, int, int, int], rows: int, cols: int, width: int = CELL) -> np.ndarray:
    """(rows, cols) bool: the cells, so wide, that a fair share of the box lies in, or that it covers a fair share of."""
    x0, y0, x1, y1 = box
    left, top = np.arange(cols) * width, np.arange(rows) * CELL
    across = np.clip(np.minimum(left + width, x1) - np.maximum(left, x0), 0, None)
    down = np.clip(np.minimum(top + CELL, y1) - np.maximum(top, y0), 0, None)
    area = down[:, None] * across
    return area >= MIN_SHARE * min(CELL * width, max(1, (x1 - x0) * (y1 - y0)))
