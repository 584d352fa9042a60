"""The kernels that Triton compiled for a bundle: gathered when it is exported, and put into Triton's cache where it is used, so that
a server compiles none."""

from __future__ import annotations

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
                shutil.copytree(kernel, part)
                os.replace(part, target / kernel.name)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: the kernels cannot be put into Triton's cache {target} ({reason_of(error)}); set TRITON_CACHE_DIR to a folder "
            "that can be written."
        ) from None
