"""A model folder: its JSON files, which names may lie in it, and whether it is a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmfx.errors import CheckpointError

MANIFEST = "bundle.json"  # of a folder that holds a bundle


def is_bundle(folder: Path) -> bool:
    """Whether a folder says that it is one."""
    return (folder / MANIFEST).exists()


def read_json(folder: Path, name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object from a model folder; `default` when the file is absent. Raises CheckpointError."""
    path = folder / name
    if not path.exists() and default is not None:
        return default
    value = read_any(folder, name)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: it holds a {type(value).__name__}, expected an object; copy the file again.")
    return value


def read_any(folder: Path, name: str) -> Any:
    """What a JSON file of a model folder holds."""
    path = folder / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: there is no {name}; point to a folder in the Hugging Face layout.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: it is not readable JSON ({error}); copy the file again.") from None


def is_plain_file_name(name: str) -> bool:
    """Whether a name that a file gives stays in the folder: no path, nothing unprintable."""
    return (
        name not in ("", ".", "..") and name.isprintable() and not set(name) & set("/\\:") and len(name.encode()) < 256
    )
