"""Phi-3.5-vision's images and prompts: crops of a resized image and a view of the whole, placeholders with numbers.

Source: TIGER-AI-Lab/VLM2Vec: src/model/baseline_backbone/phi3_v/{image_processing,processing}_phi3_v.py."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmfx.errors import CheckpointError, InvalidRequest
from vlmfx.models.phi3_v import Phi3VConfig
from vlmfx.models.validate import PREPROCESSOR, positive_int, supported, token_id
from vlmfx.models.vision_inputs import VisionInputs, concat, cumulative
from vlmfx.processing.embeds import rows_of
from vlmfx.processing.inputs import (
    Expanded,
    Layouts,
    MediaLayout,
    check_count,
    check_ratio,
    expand_tokens,
    plain_positions,
)
from vlmfx.processing.pixels import STEPS, pixel_settings
from vlmfx.processing.resize import resize
from vlmfx.processing.tokenizer import Tokenizer

PLACEHOLDERS = {"image": "<|image_{number}|>"}
TAG, IMAGE_TOKEN = re.compile(r"<\|image_(\d+)\|>"), "<|image|>"
MAX_CROPS = 1024  # 147,000 rows, more than the published context
REQUEST_SETTINGS = {"num_crops": range(1, MAX_CROPS + 1)}
MAX_ASPECT_RATIO = 200
positions = plain_positions
LINE_END, CROPS_END = -2, -1  # where `project` puts the separators
FIELD = "multi_modal_data.image"


@dataclass(frozen=True, kw_only=True)
class Phi3VProcessing:
    """num_crops: the most crops an image is cut into, of crop_size pixels and crop_side rows of features a side; a request may set
    it in mm_processor_kwargs."""

    num_crops: int
    crop_size: int
    crop_side: int
    patch_size: int
    hidden_size: int
    image_token_id: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def config(preprocessor: dict[str, Any], model: Phi3VConfig, tokenizer: Tokenizer) -> Phi3VProcessing:
    """The processing of a preprocessor_config.json."""
    fixed = {"num_img_tokens": model.crop_side**2, "resample": int(Image.Resampling.BILINEAR)}
    supported(preprocessor, {**STEPS, **fixed}, file=PREPROCESSOR)
    image_token_id = tokenizer.token_to_id(IMAGE_TOKEN)
    if image_token_id is None:
        raise CheckpointError(f"tokenizer.json: it has no {IMAGE_TOKEN} token; restore the published tokenizer.")
    pixels = pixel_settings(preprocessor)
    return Phi3VProcessing(
        num_crops=positive_int("num_crops", preprocessor.get("num_crops", 1), most=MAX_CROPS, file=PREPROCESSOR),
        crop_size=model.vision.image_size,
        crop_side=model.crop_side,
        patch_size=model.vision.patch_size,
        hidden_size=model.text.hidden_size,
        image_token_id=token_id(IMAGE_TOKEN, image_token_id, model.text.vocab_size),
        mean=pixels["mean"],
        std=pixels["std"],
    )


def hd_size(cfg: Phi3VProcessing, height: int, width: int) -> tuple[int, int]:
    """(height, width) to resize to, before padding: the longer side is as many crops as fit, the ratio kept.

    Raises InvalidRequest for an aspect ratio over 200, or over crop_size: beyond, one crop would have no pixel in height."""
    long, short, limit = max(height, width), min(height, width), min(MAX_ASPECT_RATIO, cfg.crop_size)
    check_ratio(height, width, limit, FIELD)
    ratio = long / short
    scale = max(n for n in range(1, cfg.num_crops + 1) if n * math.ceil(n / ratio) <= cfg.num_crops)
    new_long = cfg.crop_size * scale
    new_short = int(new_long / ratio)
    return (new_short, new_long) if width >= height else (new_long, new_short)


def crop_grid(cfg: Phi3VProcessing, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of crops that an image of (height, width) is cut into."""
    height, width = hd_size(cfg, *size)
    return math.ceil(height / cfg.crop_size), math.ceil(width / cfg.crop_size)


def layout(cfg: Phi3VProcessing, size: tuple[int, int]) -> MediaLayout:
    """The layout of an image of (height, width), from its size alone: features, one separator a line, one after the crops."""
    rows, columns = crop_grid(cfg, size)
    num_rows = (rows * columns + 1) * cfg.crop_side**2 + (rows + 1) * cfg.crop_side + 1
    return MediaLayout(num_rows=num_rows, grid=(1, 1, num_rows))


def hd_image(cfg: Phi3VProcessing, image: Image.Image) -> Tensor:
    """RGB image → (height, width, 3) uint8, resized to `hd_size` and padded with white to whole crops, half of it before."""
    height, width = hd_size(cfg, image.height, image.width)
    if image.width < image.height:  # the reference resizes a transposed image, which rounds otherwise
        turned = image.transpose(Image.Transpose.TRANSPOSE)
        pixels = resize(turned, width, height, Image.Resampling.BILINEAR).transpose(0, 1)
    else:
        pixels = resize(image, height, width, Image.Resampling.BILINEAR)
    missing_h, missing_w = -height % cfg.crop_size, -width % cfg.crop_size
    left, top = missing_w // 2, missing_h // 2
    return F.pad(pixels, (0, 0, left, missing_w - left, top, missing_h - top), value=255)


def vision_inputs(cfg: Phi3VProcessing, images: Iterable[Image.Image]) -> VisionInputs:
    """RGB images → packed float32 patches, normalised; of each image a segment for the whole and one for each crop, row by row."""
    return concat([*map(partial(_image_inputs, cfg), images)])


def _image_inputs(cfg: Phi3VProcessing, image: Image.Image) -> VisionInputs:
    scaled = hd_image(cfg, image).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (cfg.mean, cfg.std))
    pixels = ((scaled - mean) / std).contiguous()
    # Interpolated after normalising, in float, without antialiasing: no uint8 image gives these values.
    whole = F.interpolate(pixels[None], (cfg.crop_size, cfg.crop_size), mode="bicubic", align_corners=False)
    rows, columns = (side // cfg.crop_size for side in pixels.shape[1:])
    crops = pixels.view(3, rows, cfg.crop_size, columns, cfg.crop_size).permute(1, 3, 0, 2, 4).flatten(0, 1)
    views, side = torch.cat((whole, crops)), cfg.crop_size // cfg.patch_size
    blocks = views.view(-1, 3, side, cfg.patch_size, side, cfg.patch_size).permute(0, 2, 4, 1, 3, 5)
    patches = blocks.reshape(len(views) * side**2, -1)
    return VisionInputs(
        pixels=patches,
        position_ids=torch.empty(len(patches), 0, dtype=torch.int64),
        cu_seqlens=cumulative([side**2] * len(views)),
        mean=cfg.mean,
        std=cfg.std,
        row_index=row_index(cfg.crop_side, rows, columns),
    )


def row_index(side: int, rows: int, columns: int) -> Tensor:
    """Which projected row each feature row of an image is ("sub_glb"): the crops as one picture, then the whole image.

    Projected rows are those of the whole image, then those of each crop, side² a view; separators are negative."""
    views = torch.arange((rows * columns + 1) * side**2)
    whole, crops = views[: side**2].view(side, side), views[side**2 :].view(rows, columns, side, side)
    picture = crops.transpose(1, 2).reshape(rows * side, columns * side)
    lines = [F.pad(grid, (0, 1), value=LINE_END).flatten() for grid in (picture, whole)]
    return torch.cat((lines[0], torch.tensor([CROPS_END]), lines[1]))


def embed_inputs(cfg: Phi3VProcessing, value: Any) -> tuple[Tensor, list[MediaLayout]]:
    """Ready embeddings (images, rows, hidden), (rows, hidden) of one image, or a list of either → rows and layouts.

    An image has as many rows as are given."""
    rows = rows_of(value, cfg.hidden_size)
    parts = [torch.as_tensor(part) for part in (value if isinstance(value, (list, tuple)) else [value])]
    counts = [part.shape[-2] for part in parts for _ in range(1 if part.ndim == 2 else len(part))]
    if not counts or not min(counts):
        raise InvalidRequest(FIELD, "embeddings of an image have 0 rows; pass all rows of each image.", found=counts)
    return rows, [MediaLayout(num_rows=count, grid=(1, 1, count)) for count in counts]


def expand(cfg: Phi3VProcessing, tokenizer: Tokenizer, prompt: str | list[int], layouts: Layouts) -> Expanded:
    """The prompt with <|image|> repeated for each image: of a text where it writes <|image_1|>, <|image_2|>, ..., in any order and
    also more than once; of ids where they hold one <|image|> an image, in order, or have the repeated ones already.

    A text's chunks between images are tokenized each on its own, and begin with bos. Raises InvalidRequest."""
    if not isinstance(prompt, str):
        return expand_tokens(prompt, {"image": cfg.image_token_id}, layouts)
    first, *rest = TAG.split(prompt)
    numbers, chunks = [_number(digits) for digits in rest[::2]], rest[1::2]
    counts = [item.num_rows for item in layouts.get("image", ())]
    _check_numbers(numbers, len(counts))
    ids = tokenizer.encode_prompt(first)
    index = [torch.full((len(ids),), -1)]
    for number, chunk in zip(numbers, chunks, strict=True):
        start, count = sum(counts[: number - 1]), counts[number - 1]
        text = tokenizer.encode(chunk)
        ids += [cfg.image_token_id] * count + text
        index += [torch.arange(start, start + count), torch.full((len(text),), -1)]
    return Expanded(token_ids=ids, feature_index=torch.cat(index))


def _number(digits: str) -> int:
    """The number of a placeholder; one that is too long to be any image's is 0."""
    return int(digits) if len(digits) < 10 else 0


def _check_numbers(numbers: Sequence[int], given: int) -> None:
    """Raise InvalidRequest where the placeholders do not number the images from 1 on without gaps."""
    found = sorted(set(numbers))
    check_count(len(found), given, "image")
    if found != list(range(1, given + 1)):
        shown = ", ".join(map(str, found[:8])) + (", …" if len(found) > 8 else "")
        raise InvalidRequest(
            "prompt",
            f"its image placeholders have the numbers {shown}, expected 1 to {given} without gaps; write <|image_1|> for the "
            "first image and count on.",
            found=found,
            expected=given,
        )
