"""The kernels that Triton compiled for a bundle: gathered when it is exported, and put into Triton's cache where it is used, so that
a server compiles none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmfx.errors import CheckpointError, reason_of

KERNELS = "kernels"  # how the folder in a bundle begins


@contextmanager
def gathered(folder: Path) -> Iterator[None]:
    """Triton compiles into this folder, for as long as the block runs."""
    from triton import knobs

    cache: Any = knobs.cache
    before = cache.dir
    cache.dir = str(folder)
    try:
        yield
    finally:
        cache.dir = before
    for kernel in folder.iterdir():
        _name_files_in(kernel, Path())


def install(folder: Path) -> None:
    """Copy kernels that were gathered in a folder to Triton's cache, each whole or not at all, unless they are there.

    Raises CheckpointError."""
    from triton import knobs

    cache: Any = knobs.cache
    target = Path(cache.dir)
    try:
        for kernel in folder.iterdir():
            if not (target / kernel.name).exists():
                part = target / f"{kernel.name}.{os.getpid()}.part"
                try:
                    shutil.copytree(kernel, part)
                    _name_files_in(part, target / kernel.name)
                    _move(part, target / kernel.name)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: the kernels cannot be put into Triton's cache {target} ({reason_of(error)}); set TRITON_CACHE_DIR to a folder "
            "that can be written."
        ) from None


def _move(part: Path, target: Path) -> None:
    """Rename a folder, unless another process was faster."""
    try:
        os.replace(part, target)
    except OSError:
        if not target.is_dir():
            raise


def _name_files_in(kernel: Path, where: Path) -> None:
    """Triton's index of a kernel's files names them by whole paths: those that they have in the folder `where`."""
    for index in kernel.glob("__grp__*.json"):
        files = json.loads(index.read_text(encoding="utf-8"))["child_paths"]
        index.write_text(json.dumps({"child_paths": {name: str(where / name) for name in files}}), encoding="utf-8")
