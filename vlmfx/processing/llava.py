"""LLaVA's images and positions: resize the shortest edge, crop the centre, one run of placeholders an image.

Source: huggingface/transformers: models/llava/processing_llava.py, models/clip/image_processing_clip.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmfx.errors import CheckpointError, InvalidRequest
from vlmfx.models.llava import LlavaConfig
from vlmfx.models.validate import PREPROCESSOR, supported
from vlmfx.models.vision_inputs import VisionInputs, cumulative
from vlmfx.ops.pack_patches import patch_offsets
from vlmfx.processing.embeds import rows_of
from vlmfx.processing.images import FIELD
from vlmfx.processing.inputs import Expanded, Layouts, MediaLayout, check_ratio, expand_tokens, plain_positions
from vlmfx.processing.pixels import STEPS, pixel_settings
from vlmfx.processing.resize import resize
from vlmfx.processing.tokenizer import Tokenizer

PLACEHOLDERS = {"image": "<image>"}
REQUEST_SETTINGS: dict[str, range] = {}
positions = plain_positions

MAX_ASPECT_RATIO = 64
SUPPORTED = {**STEPS, "do_center_crop": True, "do_pad": False}


@dataclass(frozen=True, kw_only=True)
class LlavaProcessing:
    """image_size: the side of the square the tower sees; num_rows: features an image fills; hidden_size: their width."""

    image_size: int
    patch_size: int
    num_rows: int
    hidden_size: int
    image_token_id: int
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def config(preprocessor: dict[str, Any], model: LlavaConfig, tokenizer: Tokenizer) -> LlavaProcessing:
    """The processing of a preprocessor_config.json. Raises CheckpointError for one that makes other pixels than `crop_image`."""
    supported(preprocessor, SUPPORTED, file=PREPROCESSOR)
    side = model.vision.image_size
    for key, names in (("size", ("shortest_edge",)), ("crop_size", ("height", "width"))):
        value = preprocessor.get(key, side)
        if value not in (side, dict.fromkeys(names, side)):
            sides = [value.get(name) for name in names] if isinstance(value, dict) else []
            found = next((s for s in sides if s not in (None, side)), value)
            raise CheckpointError(
                f"{PREPROCESSOR}: {key} is {str(found)[:80]} but config.json has image_size {side}; make them equal, "
                f"as in {dict.fromkeys(names, side)}."
            )
    return LlavaProcessing(
        image_size=side,
        patch_size=model.vision.patch_size,
        num_rows=model.features_per_image,
        hidden_size=model.text.hidden_size,
        image_token_id=model.image_token_id,
        **pixel_settings(preprocessor),
    )


def layout(cfg: LlavaProcessing, size: tuple[int, int]) -> MediaLayout:
    """The layout of an image of (height, width), the same for every size. Raises InvalidRequest for one too thin."""
    check_ratio(*size, MAX_ASPECT_RATIO, FIELD)
    return MediaLayout(num_rows=cfg.num_rows, grid=(1, 1, cfg.num_rows))


def crop_image(cfg: LlavaProcessing, image: Image.Image) -> Tensor:
    """RGB image → (S, S, 3) uint8: the shortest edge resized to S, the centre cut out."""
    s, (width, height) = cfg.image_size, image.size
    short, long = min(width, height), max(width, height)
    longer = int(s * long / short)
    pixels = resize(image, *((s, longer) if width > height else (longer, s)), cfg.resample)
    top, left = (pixels.shape[0] - s) // 2, (pixels.shape[1] - s) // 2
    return pixels[top : top + s, left : left + s]


def vision_inputs(cfg: LlavaProcessing, images: Iterable[Image.Image]) -> VisionInputs:
    """RGB images → their pixels and patches, one segment an image."""
    frames = torch.stack([*map(partial(crop_image, cfg), images)])
    num, height, width, _ = frames.shape
    offsets, row_stride = patch_offsets([(num, height, width)], cfg.patch_size)
    return VisionInputs(
        pixels=frames.flatten(),
        patch_offsets=offsets,
        row_stride=row_stride,
        position_ids=torch.empty(len(offsets), 0, dtype=torch.int64),
        cu_seqlens=cumulative([len(offsets) // num] * num),
        mean=cfg.mean,
        std=cfg.std,
    )


def embed_inputs(cfg: LlavaProcessing, value: Any) -> tuple[Tensor, list[MediaLayout]]:
    """Ready embeddings (n·num_rows, hidden) or (n, num_rows, hidden) → rows and layouts."""
    rows = rows_of(value, cfg.hidden_size)
    if len(rows) % cfg.num_rows or not len(rows):
        raise InvalidRequest(
            "multi_modal_data.image",
            f"embeddings have {len(rows)} rows but an image fills {cfg.num_rows}; pass all rows of each image.",
            found=len(rows),
            expected=cfg.num_rows,
        )
    return rows, [layout(cfg, (1, 1))] * (len(rows) // cfg.num_rows)


def expand(cfg: LlavaProcessing, tokenizer: Tokenizer, prompt: str | list[int], layouts: Layouts) -> Expanded:
    """The prompt with each image's token repeated. Raises InvalidRequest when they differ in number from the images."""
    ids = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt
    return expand_tokens(ids, {"image": cfg.image_token_id}, layouts)
