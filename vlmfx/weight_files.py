"""The weights of a model folder, under the names that the specs use."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vlmfx.errors import CheckpointError
from vlmfx.folder import is_plain_file_name, read_json
from vlmfx.models.validate import refuse


def published_name(key: str, key_prefixes: Sequence[tuple[str, str]]) -> str:
    """A stored tensor's name as the published checkpoints write it, and the specs: the first matching prefix is replaced."""
    for new, published in key_prefixes:
        if key.startswith(new):
            return published + key[len(new) :]
    return key


class WeightFiles:
    """The safetensors files of a folder, memory-mapped while the object is entered; names are those the specs use."""

    def __init__(self, folder: Path, key_prefixes: Sequence[tuple[str, str]]) -> None:
        self.folder = folder
        self._files = _weight_files(folder)
        self._prefixes = key_prefixes
        self._stack = ExitStack()
        self._handles: dict[Path, Any] = {}

    @cached_property
    def _location(self) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
        """Name → file, name in that file, stored shape; read from the headers."""
        location: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
        for path in self._files:
            with _open(path) as handle:
                for key in handle.keys():  # noqa: SIM118, a safe_open handle is no dict
                    name = published_name(key, self._prefixes)
                    if name in location:
                        other, twin, _ = location[name]
                        raise CheckpointError(
                            f"{self.folder}: {key} in {path.name} and {twin} in {other.name} are the same weight; "
                            "remove one of them."
                        )
                    location[name] = (path, key, tuple(handle.get_slice(key).get_shape()))
        return location

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor in the files."""
        return {name: shape for name, (_, _, shape) in self._location.items()}

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its published name, mapped from its file."""
        path, key, _ = self._location[name]
        if path not in self._handles:
            self._handles[path] = self._stack.enter_context(_open(path))
        return self._handles[path].get_tensor(key)

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self._handles.clear()
        self._stack.close()


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(folder, index.name).get("weight_map")
        if not weight_map:
            raise CheckpointError(f"{index}: weight_map is empty or missing; copy the file again.")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            refuse("weight_map", weight_map, "an object of file names", file=str(index))
        names = sorted(set(weight_map.values()))
        escaped = [name for name in names if not is_plain_file_name(name)]
        if escaped:
            raise CheckpointError(
                f"{index}: weight_map names {str(escaped)[:200]}, which are no file names or lie outside the folder; "
                "use plain file names."
            )
        paths = [folder / name for name in names]
    else:
        paths = (
            [folder / "model.safetensors"]
            if (folder / "model.safetensors").exists()
            else sorted(folder.glob("*.safetensors"))
        )
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise CheckpointError(
            f"{folder}: {', '.join(missing)} is named in {index.name} but not there; download it again."
        )
    if not paths:
        bins = any(folder.glob("*.bin"))
        raise CheckpointError(
            f"{folder}: there are {'only .bin weights, which can run code when opened' if bins else 'no weights'}; "
            + (
                "convert them with transformers: AutoModel.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)."
                if bins
                else "put model.safetensors there."
            )
        )
    return paths


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises its own type, which older versions do not export
        raise CheckpointError(f"{path}: it is not a whole safetensors file ({error}); download it again.") from None
