"""Prepared: a request's inputs with all that the engine wants to know of them, made off the step loop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vlmfx.checkpoint import Model
from vlmfx.engine.prefix import block_keys, media_key, root_key, rows_key
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.processing.inputs import ModelInputs


@dataclass(frozen=True, kw_only=True, eq=False)
class Item:
    """An image or video of a prompt, or its ready embeddings: rows first_row to first_row + num_rows of the prompt's features, read by
    some of the tokens `first` to `end`. key says its content. Either vision is to be encoded, or the rows are there."""

    key: bytes
    first_row: int
    num_rows: int
    first: int
    end: int
    vision: VisionInputs | None = None
    rows: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """root: the key that the keys of the prompt's whole blocks are chained to."""

    inputs: ModelInputs
    items: tuple[Item, ...]
    root: bytes
    keys: tuple[bytes, ...]


def prepared(model: Model, inputs: ModelInputs, *, max_len: int, block_size: int, salt: str = "") -> Prepared:
    """max_len: the most tokens that prompt and answer may have, by which Phi-3.5 chooses its rope."""
    items = tuple(_items(inputs, salt))
    long_rope = model.config.text.long_rope
    is_long = long_rope is not None and max_len > long_rope.original_max_position_embeddings
    root = root_key(salt, "long" if is_long else "")
    positions = inputs.positions.reshape(-1, len(inputs.token_ids)).numpy()
    media = [(item.first, item.key) for item in items]
    keys = block_keys(root, np.asarray(inputs.token_ids, np.int32), positions, media, block_size)
    return Prepared(inputs=inputs, items=items, root=root, keys=tuple(keys))


def _items(inputs: ModelInputs, salt: str) -> list[Item]:
    index = inputs.feature_index.numpy()
    (places,) = np.nonzero(index >= 0)
    rows_read, first_row, items = index[places], 0, []
    parts: list[tuple[int, bytes, VisionInputs | None, Tensor | None]]
    if inputs.embeds is not None:
        parts = [(len(inputs.embeds), rows_key(inputs.embeds, salt), None, inputs.embeds)]
    else:
        parts = [(item.num_rows, media_key(item.vision, salt), item.vision, None) for item in inputs.media]
    for num_rows, key, vision, rows in parts:
        mine = places[(rows_read >= first_row) & (rows_read < first_row + num_rows)]
        if len(mine):  # always so, but for rows that no placeholder asks for
            item = Item(
                key=key,
                first_row=first_row,
                num_rows=num_rows,
                first=int(mine[0]),
                end=int(mine[-1]) + 1,
                vision=vision,
                rows=rows,
            )
            items.append(item)
        first_row += num_rows
    return sorted(items, key=lambda item: item.first)
