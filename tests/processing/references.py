"""transformers' own processors, by the names that the installed version gives them."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any


def image_processor(family: str, folder: Path) -> Any:
    """The PIL image processor of a family (in transformers 5 the slow one has a name of its own)."""
    qwen = [
        ("qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil"),
        ("qwen2_vl", "Qwen2VLImageProcessor"),
    ]
    for module, name in {
        "llava": [("clip.image_processing_pil_clip", "CLIPImageProcessorPil"), ("clip", "CLIPImageProcessor")],
        "qwen2_vl": qwen,
        "qwen2_5_vl": qwen,
        "qwen3_vl": qwen,
    }[family]:
        try:
            return getattr(importlib.import_module(f"transformers.models.{module}"), name).from_pretrained(folder)
        except ModuleNotFoundError:
            continue
    raise AssertionError(f"no PIL image processor of {family} has one of the names known")


def smart_resize() -> Any:
    """Qwen2-VL's own."""
    try:
        module = importlib.import_module("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    except ModuleNotFoundError:
        module = importlib.import_module("transformers.models.qwen2_vl.image_processing_qwen2_vl")
    return module.smart_resize


def takes_thin_images() -> bool:
    """False for transformers 4.46, which takes a side of 1 or 3 pixels for the channels."""
    return not refuses_small_sides()


def refuses_small_sides() -> bool:
    """True for transformers 4.46, whose smart_resize raises for a side below 28."""
    return "must be larger than factor" in inspect.getsource(smart_resize())
