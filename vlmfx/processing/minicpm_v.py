"""MiniCPM-V 2.6's images and text: each image whole, then in slices, each of them a run of <unk> between marks.

Source: openbmb/MiniCPM-V-2_6: image_processing_minicpmv.py, processing_minicpmv.py, modeling_navit_siglip.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmfx.errors import CheckpointError, InvalidRequest, shown
from vlmfx.models.minicpm_v import MiniCPMVConfig
from vlmfx.models.siglip import table_places
from vlmfx.models.validate import PREPROCESSOR, one_of, positive_int, refuse, supported, three_numbers
from vlmfx.models.vision_inputs import VisionInputs, concat, cumulative
from vlmfx.ops.pack_patches import patch_offsets
from vlmfx.processing.embeds import integer_table, joined, rows_of
from vlmfx.processing.images import FIELD
from vlmfx.processing.inputs import Expanded, Layouts, MediaLayout, check_count, check_ratio, plain_positions
from vlmfx.processing.slices import cut_image, slice_grid
from vlmfx.processing.tokenizer import Tokenizer

PLACEHOLDERS = {"image": "(<image>./</image>)"}
MAX_SLICES = 1000  # more than any image we decode can have
REQUEST_SETTINGS = {"max_slice_nums": range(1, MAX_SLICES + 1), "use_image_id": range(2)}
positions = plain_positions

MARKS = {"im_start": "<image>", "im_end": "</image>", "slice_start": "<slice>", "slice_end": "</slice>", "unk": "<unk>"}
ID_MARKS = {"im_id_start": "<image_id>", "im_id_end": "</image_id>"}
SUPPORTED = {**MARKS, **ID_MARKS, "version": 2.6, "slice_mode": True}


@dataclass(frozen=True, kw_only=True)
class MiniCPMVProcessing:
    """num_queries: rows an image or slice fills. scale_resolution: the side of the square whose area they are brought to.
    table_side: rows of the tower's table of positions. token_ids: of the MARKS, by their keys.

    A request may set max_slice_nums, and use_image_id, whether the images are numbered."""

    patch_size: int
    table_side: int
    num_queries: int
    hidden_size: int
    scale_resolution: int
    max_slice_nums: int
    use_image_id: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    token_ids: dict[str, int]

    @property
    def max_aspect_ratio(self) -> int:
        """Beyond it the short side would be less than a patch."""
        return (self.scale_resolution // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class SlicedLayout(MediaLayout):
    """The slices that follow the whole image, (columns, rows); (0, 0) where there are none."""

    slice_grid: tuple[int, int]


def config(preprocessor: dict[str, Any], model: MiniCPMVConfig, tokenizer: Tokenizer) -> MiniCPMVProcessing:
    """The processing of a preprocessor_config.json. Raises CheckpointError where model, tokenizer and it do not fit together."""
    patch_size, num_queries = model.vision.patch_size, model.resampler.num_queries
    agreed = {"patch_size": patch_size, "image_feature_size": num_queries}
    supported(preprocessor, {**SUPPORTED, **agreed}, file=PREPROCESSOR)
    ids = {key: tokenizer.token_to_id(mark) for key, mark in MARKS.items()}
    known = {key: i for key, i in ids.items() if i is not None and i < model.text.vocab_size}
    missing = [MARKS[key] for key in ids if key not in known]
    if missing:
        raise CheckpointError(
            f"tokenizer.json: {', '.join(missing)} are not in the model's vocabulary; use the tokenizer of this checkpoint."
        )
    scale = positive_int("scale_resolution", preprocessor.get("scale_resolution", 448), file=PREPROCESSOR, most=2**15)
    if scale < patch_size:
        refuse("scale_resolution", scale, f"a patch's side, {patch_size}, or more", file=PREPROCESSOR)
    return MiniCPMVProcessing(
        patch_size=patch_size,
        table_side=model.vision.table_side,
        num_queries=num_queries,
        hidden_size=model.text.hidden_size,
        scale_resolution=scale,
        max_slice_nums=positive_int(
            "max_slice_nums", preprocessor.get("max_slice_nums", 9), file=PREPROCESSOR, most=MAX_SLICES
        ),
        use_image_id=one_of("use_image_id", preprocessor.get("use_image_id", False), (True, False), file=PREPROCESSOR),
        mean=three_numbers("norm_mean", preprocessor.get("norm_mean", (0.5, 0.5, 0.5)), positive=False),
        std=three_numbers("norm_std", preprocessor.get("norm_std", (0.5, 0.5, 0.5)), positive=True),
        token_ids=known,
    )


def layout(cfg: MiniCPMVProcessing, size: tuple[int, int]) -> SlicedLayout:
    """The layout of an image of (height, width). Raises InvalidRequest for one too thin."""
    height, width = size
    check_ratio(height, width, cfg.max_aspect_ratio, FIELD)
    grid = slice_grid((width, height), cfg.scale_resolution, cfg.max_slice_nums)
    num_rows = cfg.num_queries * (1 + grid[0] * grid[1])
    return SlicedLayout(num_rows=num_rows, grid=(1, 1, num_rows), slice_grid=grid)


def vision_inputs(cfg: MiniCPMVProcessing, images: Iterable[Image.Image]) -> VisionInputs:
    """RGB images → packed patches, one segment for each image and each of its slices, row by row."""
    return concat([*map(partial(_image_inputs, cfg), images)])


def _image_inputs(cfg: MiniCPMVProcessing, image: Image.Image) -> VisionInputs:
    grid = layout(cfg, (image.height, image.width)).slice_grid
    return concat([_segment(cfg, pixels) for pixels in cut_image(image, grid, cfg.scale_resolution, cfg.patch_size)])


def _segment(cfg: MiniCPMVProcessing, pixels: Tensor) -> VisionInputs:
    height, width, _ = pixels.shape
    offsets, row_stride = patch_offsets([(1, height, width)], cfg.patch_size)
    return VisionInputs(
        pixels=pixels.flatten(),
        patch_offsets=offsets,
        row_stride=row_stride,
        position_ids=patch_positions(height // cfg.patch_size, width // cfg.patch_size, cfg.table_side),
        cu_seqlens=cumulative([len(offsets)]),
        mean=cfg.mean,
        std=cfg.std,
    )


def patch_positions(height: int, width: int, table_side: int) -> Tensor:
    """(height·width, 3) int64: each patch's row of the table of positions, then its own row and column."""
    down, across = table_places(height, table_side), table_places(width, table_side)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((down[rows] * table_side + across[columns], rows, columns), -1).flatten(0, 1)


def embed_inputs(cfg: MiniCPMVProcessing, value: Any) -> tuple[Tensor, list[SlicedLayout]]:
    """{"image_embeds": (slices, num_queries, hidden) or rows, "image_size_list": [(width, height), ...]}, or a list of such → rows and
    layouts. The sizes, also called "image_sizes", are those of the original images: the number of slices follows from them."""
    return joined(value, partial(_embed_inputs, cfg))


def _embed_inputs(cfg: MiniCPMVProcessing, value: Any) -> tuple[Tensor, list[SlicedLayout]]:
    key = "image_sizes" if isinstance(value, dict) and "image_sizes" in value else "image_size_list"
    if not isinstance(value, dict) or key not in value or "image_embeds" not in value:
        raise InvalidRequest(
            "multi_modal_data.image",
            "embeddings came without the sizes of their images; "
            'pass {"image_embeds": rows, "image_size_list": [(width, height), ...]}.',
        )
    rows = rows_of(value["image_embeds"], cfg.hidden_size)
    sizes = integer_table(value[key], columns=2)
    if not sizes or min(map(min, sizes)) < 1:
        raise InvalidRequest(
            f"multi_modal_data.image.{key}",
            f"it is {shown(value[key])}, expected positive integers of shape (images, 2); "
            "give width and height of each original image.",
            found=value[key],
        )
    layouts = [layout(cfg, (height, width)) for width, height in sizes]
    expected = sum(item.num_rows for item in layouts)
    if expected != len(rows):
        raise InvalidRequest(
            "multi_modal_data.image.image_embeds",
            f"it has {len(rows)} rows but {key} {str(sizes)[:80]} asks for {expected}; "
            "pass the sizes (width, height) of the original images, and all rows of image and slices.",
            found=len(rows),
            expected=expected,
        )
    return rows, layouts


def expand(cfg: MiniCPMVProcessing, tokenizer: Tokenizer, prompt: str | list[int], layouts: Layouts) -> Expanded:
    """The prompt with the marks of each image and its slices; ids that hold those already pass as they are.

    Raises InvalidRequest when a prompt's placeholders, or the runs of <unk> in its ids, do not fit the images."""
    images = layouts.get("image", ())
    if not isinstance(prompt, str):  # a placeholder is no token: its ends may be part of its neighbours
        text = tokenizer.decode(prompt, skip_special_tokens=False)
        if PLACEHOLDERS["image"] in text and tokenizer.encode_prompt(text) == list(prompt):
            prompt = text
    if isinstance(prompt, str):
        before, *chunks = prompt.split(PLACEHOLDERS["image"])
        check_count(len(chunks), len(images), "image")
        filled = [image_text(cfg, i, image) for i, image in enumerate(images)]
        ids = tokenizer.encode_prompt(before + "".join(a + b for a, b in zip(filled, chunks, strict=True)))
    else:
        ids = list(prompt)
    return Expanded(token_ids=ids, feature_index=_index_features(cfg, ids, images))


def image_text(cfg: MiniCPMVProcessing, number: int, layout: MediaLayout) -> str:
    """The text of the prompt's image of that number, counted from 0: its number, the whole image, lines of slices."""
    assert isinstance(layout, SlicedLayout)
    columns, rows = layout.slice_grid
    body = "<unk>" * cfg.num_queries
    image_id = f"<image_id>{number}</image_id>" if cfg.use_image_id else ""
    return f"{image_id}<image>{body}</image>" + "\n".join([f"<slice>{body}</slice>" * columns] * rows)


def _index_features(cfg: MiniCPMVProcessing, ids: list[int], images: Sequence[MediaLayout]) -> Tensor:
    """(L,) int64: 0, 1, 2, ... on the runs of <unk> that lie between an image's or a slice's marks, −1 elsewhere."""
    n, mark = cfg.num_queries, cfg.token_ids
    ends = {mark["im_start"]: mark["im_end"], mark["slice_start"]: mark["slice_end"]}
    run = [mark["unk"]] * n
    index = torch.full((len(ids),), -1)
    found: list[int] = []
    for i, token in enumerate(ids):
        if token in ends and ids[i + 1 : i + n + 2] == [*run, ends[token]]:
            index[i + 1 : i + n + 1] = torch.arange(n) + n * len(found)
            found.append(token)
    slices = [item.num_rows // n - 1 for item in images]
    if found != [token for k in slices for token in (mark["im_start"], *[mark["slice_start"]] * k)]:
        raise InvalidRequest(
            "prompt",
            f"it holds {found.count(mark['im_start'])} images and {found.count(mark['slice_start'])} slices filled with {n} "
            f"<unk>, but those given make {len(slices)} and {sum(slices)}, in this order; write {PLACEHOLDERS['image']} for each "
            "image in a text, or give the ids of its expansion.",
            found=len(found),
            expected=len(slices) + sum(slices),
        )
    return index
