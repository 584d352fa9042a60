"""Which pooling a model folder asks for, where sentence-transformers saved it."""

from __future__ import annotations

from pathlib import Path

from vlmfx.folder import is_plain_file_name, read_any, read_json
from vlmfx.models.pooling import Pooling, stored_pooling
from vlmfx.models.validate import CONFIG, one_of, refuse

MODULES = ("Transformer", "Pooling", "Normalize")  # what is implemented


def load_pooling(folder: Path) -> Pooling:
    """How the hidden states of a prompt become its embedding: as a sentence-transformers folder says, else the last token's.

    Raises CheckpointError where modules.json names a step that is not implemented."""
    at, is_there = "1_Pooling", (folder / "1_Pooling" / CONFIG).exists()
    if (folder / "modules.json").exists():
        steps = read_any(folder, "modules.json")
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            refuse("the file", steps, "a list of objects", file="modules.json")
        for step in steps:
            kind = one_of("type", str(step.get("type")).rpartition(".")[2], MODULES, file="modules.json")
            if kind == "Pooling":
                at, is_there = step.get("path"), True
    if not is_there:
        return "last"
    if not isinstance(at, str) or not is_plain_file_name(at):
        refuse("path", at, "the name of a folder", file="modules.json")
    return stored_pooling(read_json(folder, f"{at}/{CONFIG}"), f"{at}/{CONFIG}")
