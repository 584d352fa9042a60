"""Resizing by PIL as the references' slow processors do it: uint8 in and out, antialiased."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def resize(image: Image.Image, height: int, width: int, resample: int = Image.Resampling.BICUBIC) -> Tensor:
    """RGB image → (height, width, 3) uint8; an image of that size already is copied unchanged."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling(resample))
    return torch.from_numpy(np.array(image))
