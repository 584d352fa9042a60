"""The kernels of MLU370, in BANG C: kernels/*.mlu, one a file, and bindings.cpp, which makes torch ops of them.

No card and no compiler for one was at hand: what runs in tests runs in emu/, and docs/mlu.md says what that proves."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

from vlmfx.errors import DeviceError


def load() -> None:
    """Make the ops run on `mlu`, by the library that `python -m vlmfx.ops.mlu.build` makes, or that VLMFX_MLU_LIBRARY names.

    Raises DeviceError where there is none for these sources and this torch, or it cannot be loaded."""
    from vlmfx.ops.mlu.build import library_path  # a module to run as well

    _load(Path(os.environ.get("VLMFX_MLU_LIBRARY") or library_path()))


@cache
def _load(path: Path) -> None:
    if not path.exists():
        raise DeviceError(f"the kernels for mlu are not built ({path} is missing); run python -m vlmfx.ops.mlu.build.")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise DeviceError(
            f"{path} cannot be loaded ({error}); run python -m vlmfx.ops.mlu.build on this machine."
        ) from None
