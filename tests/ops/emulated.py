"""The kernels of mlu in the emulator, called on CPU tensors through their bindings, as torch would call them on a card.

The order of tasks, the number of cores and how strict the alignment is differ from call to call, by the arguments, so that an example
that failed fails again."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
from torch import Tensor

from vlmfx.device import resolve_device
from vlmfx.ops import mlu
from vlmfx.ops.mlu.emu import build
from vlmfx.ops.registry import Op

HAS_CARD = importlib.util.find_spec("torch_mlu") is not None  # whose library has ops of the same names
HAS_EMULATOR = shutil.which("g++") is not None and not HAS_CARD
WHY_NO_EMULATOR = "the emulator of MLU370 needs g++ (Debian: apt install g++), and a machine without torch_mlu"
NO_EMULATOR = pytest.mark.skip(reason=WHY_NO_EMULATOR)
CORES = (1, 2, 3, 4, 7, 16)
TAKEN = (torch.float32, torch.float16)  # what the chip has


class Counters(NamedTuple):
    """Of the launches of one call: bytes from and to device memory; cycles of the vector pipe, of all tasks and of the longest; pieces
    copied; launches."""

    read: int
    written: int
    cycles: int
    longest: int
    copies: int
    launches: int


@cache
def path() -> Path:
    """The library, built where it is not yet, its ops registered."""
    found = build.library()
    torch.ops.load_library(str(found))
    return found


@cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(path()))


def call(op: Op, *args: Any, seed: int = 0, cores: int = 16, is_strict: bool = True) -> Any:
    """The op as its kernel for mlu does it; a fault that the emulator finds is a ValueError."""
    library().bang_emu_options(ctypes.c_uint64(seed), cores, int(is_strict))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # what a kernel leaves unwritten is NaN, or the greatest integer
    try:
        return op.overload.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1), *args)
    finally:
        torch.use_deterministic_algorithms(before)


def counters() -> Counters:
    """Of the last call."""
    numbers = (ctypes.c_int64 * len(Counters._fields))()
    library().bang_emu_counters(numbers)
    return Counters(*numbers)


def kernel(op: Op) -> Callable[..., Any]:
    """What runs the op's kernel in the emulator; an example of a dtype that the chip does not have is passed over."""

    def run(*args: Any) -> Any:
        pass_over_other_dtypes(args)
        shown = [(a.dtype, a.shape) if isinstance(a, Tensor) else a for a in args]
        seed = zlib.crc32(repr(shown).encode())
        return call(op, *args, seed=seed, cores=CORES[seed % len(CORES)], is_strict=seed % 8 != 0)

    return run


def ready_card(args: Sequence[Any]) -> None:
    """Before arguments are moved to a card: pass over what it does not have, and load its kernels."""
    pass_over_other_dtypes(args)
    resolve_device("mlu")
    mlu.load()


def pass_over_other_dtypes(args: Sequence[Any]) -> None:
    """Reject an example, or skip a test, of a dtype that the chip does not have."""
    dtypes = {a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()}
    if dtypes <= {*TAKEN} and "bfloat16" not in args:
        return
    if hypothesis.currently_in_test_context():
        hypothesis.reject()
    pytest.skip("MLU370 has neither bfloat16 nor float64")


def mutant(op: Op, source: Path) -> Callable[..., Any]:
    """As `kernel`, with the entry of the changed file `source`, named as the original, in place of the original's."""
    changed, entry = ctypes.CDLL(str(build.mutant(source, path()))), f"vlmfx_{source.stem}"
    address = ctypes.cast(getattr(changed, entry), ctypes.c_void_p).value
    pointer = ctypes.c_void_p.in_dll(library(), f"bang_emu_{entry}")
    original = kernel(op)

    def run(*args: Any) -> Any:
        before, pointer.value = pointer.value, address
        try:
            return original(*args)
        finally:
            pointer.value = before

    return run
