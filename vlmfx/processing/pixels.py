"""What a preprocessor_config.json says of pixels in every family: steps that are always done, resampling, mean and deviation."""

from __future__ import annotations

from typing import Any

from PIL import Image

from vlmfx.models.validate import PREPROCESSOR, one_of, three_numbers

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

RESAMPLES = range(6)  # what every Pillow has; newer ones know more
# What a preprocessor_config.json may say of the steps that every family does.
STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "rescale_factor": 1 / 255}


def pixel_settings(preprocessor: dict[str, Any]) -> dict[str, Any]:
    """resample, mean and std of a preprocessor_config.json, checked."""
    resample = preprocessor.get("resample", int(Image.Resampling.BICUBIC))
    return {
        "resample": one_of("resample", resample, RESAMPLES, file=PREPROCESSOR),
        "mean": three_numbers("image_mean", preprocessor.get("image_mean", CLIP_MEAN), positive=False),
        "std": three_numbers("image_std", preprocessor.get("image_std", CLIP_STD), positive=True),
    }
