"""What the text configs of all families say in the same way: rope settings, and whether the head is tied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmfx.models.validate import one_of, section


def rope_settings(hf: Mapping[str, Any], types: tuple[str, ...] = ("default",)) -> tuple[str, dict[str, Any]]:
    """The rope's type and settings, under either of their names. Raises CheckpointError for a type that is not among `types`."""
    rope = section(hf, "rope_parameters", optional=True) or section(hf, "rope_scaling", optional=True)
    return one_of("rope_scaling type", rope.get("rope_type", rope.get("type", "default")), types), rope


def is_tied(*configs: Mapping[str, Any]) -> bool:
    """Whether the head is the input embeddings: where any of configs, the whole model's and the text half's, says so.

    Source: huggingface/transformers: src/transformers/models/{llava,qwen2_vl,qwen2_5_vl}/configuration_*.py."""
    found = [one_of("tie_word_embeddings", hf.get("tie_word_embeddings"), (True, False, None)) for hf in configs]
    return any(found)
