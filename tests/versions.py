"""transformers as the oracle: a comparison is skipped by its version alone; whatever else cannot be imported fails."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


def transformers_from(major: int, minor: int, lack: str) -> Any:
    """transformers of that version or newer; an older one skips, for what it lacks."""
    transformers = importlib.import_module("transformers")
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (major, minor):
        pytest.skip(f"transformers {transformers.__version__}, below {major}.{minor}, {lack}", allow_module_level=True)
    return transformers
