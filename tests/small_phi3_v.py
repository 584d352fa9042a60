"""Phi-3.5-vision with crops of 56 pixels, random weights and the committed tokenizer: what depends on sizes runs in milliseconds."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from tests.golden_cases import COMMITTED, load_model
from vlmfx import weights
from vlmfx.checkpoint import Model
from vlmfx.models import phi3_v

FOLDER = COMMITTED / "models" / "phi3v-tiny"
CROP, SIDE = 56, 2  # pixels, and rows of features, a side


@lru_cache
def small_model() -> Model:
    """Shared by tests, which change it by dataclasses.replace only."""
    model = load_model(FOLDER)
    config = replace(model.config, vision=replace(model.config.vision, image_size=CROP))
    params = weights.init(phi3_v.param_specs(config), seed=3, std=0.2, dtype=torch.float32)
    processing = replace(model.processor.config, crop_size=CROP, crop_side=SIDE)
    return replace(model, config=config, params=params, processor=replace(model.processor, config=processing))
