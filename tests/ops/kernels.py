"""The kernels of an op that this machine can run, each to be called on CPU tensors and compared with the reference; and mutants of them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

import vlmfx.ops
from tests.ops import emulated
from vlmfx.ops.registry import Op

HAS_TRITON = importlib.util.find_spec("triton") is not None and Version(version("triton")) >= Version("3.6")
IS_INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
OLD_TRITON = pytest.mark.skip(reason="the kernels are written for Triton 3.6, which torch 2.4 does not go with")


@dataclass(frozen=True)
class Kernel:
    """One kernel of an op; a call takes CPU tensors, runs on the kernel's device and leaves on the CPU its outputs, and in the
    arguments what it wrote to those that the op's schema says are written."""

    op: Op
    name: str
    device: str
    run: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        if self.device == "cpu":
            return self.run(*args)
        if self.device == "mlu":
            emulated.ready_card(args)
        moved = [laid_out_on(self.device, a) if isinstance(a, Tensor) else a for a in args]
        out = self.run(*moved)
        for argument, mine, theirs in zip(self.op.overload._schema.arguments, args, moved, strict=True):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(mine, Tensor):
                mine.copy_(theirs)
        if isinstance(out, (tuple, list)):
            return tuple(o.cpu() for o in out)
        return out if out is None else out.cpu()


def laid_out_on(device: str, x: Tensor) -> Tensor:
    """A copy of x there that lies as x lies here, strides, offset and neighbours: `to` would put its elements side by side."""
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return memory.to(device, copy=True).as_strided(x.shape, x.stride(), x.storage_offset())


def kernels_of(op: Op) -> list[Any]:
    """The kernels that run here, as pytest parameters: never the reference itself. An op without any fails its test."""
    found = [Kernel(op, "cpu", "cpu", op.cpu)] if op.cpu is not op.reference else []
    if op.traced is not None:
        found.append(Kernel(op, "traced", "cpu", op.traced))
    if "cuda" in op.kernels and IS_INTERPRETED:
        found.append(Kernel(op, "triton-interpreted", "cpu", op.kernel("cuda")))
    if "cuda" in op.kernels and HAS_TRITON and torch.cuda.is_available():
        found.append(Kernel(op, "triton-cuda", "cuda", op.kernel("cuda")))
    if emulated.HAS_CARD:
        found.append(Kernel(op, "mlu-card", "mlu", op))
    elif not torch.cuda.is_available():
        found.append(Kernel(op, "mlu-emulated", "cpu", emulated.kernel(op)))
    if not found and not HAS_TRITON:
        return [pytest.param(None, id="old-triton", marks=OLD_TRITON)]
    return [pytest.param(k, id=k.name, marks=_marks(k)) for k in found] or [pytest.param(None, id="no-kernel")]


def _marks(kernel: Kernel) -> list[Any]:
    return [emulated.NO_EMULATOR] if kernel.name == "mlu-emulated" and not emulated.HAS_EMULATOR else []


@dataclass(frozen=True)
class Mutant:
    """A kernel file with one line made wrong: `old`, which stands there exactly once, is `new`; or a header of mlu's, included by the
    kernel of the op's name."""

    module: str  # below vlmfx/ops, as "triton/rms_norm.py", "mlu/kernels/rms_norm.mlu" or "mlu/kernels/rotary.h"
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.old.strip()} -> {self.new.strip()}"

    def load(self, folder: Path, op: Op) -> Kernel:
        """The mutated kernel of the op; folder takes the changed file, which Triton reads the source of."""
        original = Path(vlmfx.ops.__path__[0]) / self.module
        source = original.read_text(encoding="utf-8")
        assert source.count(self.old) == 1, f"{self.module} must hold once: {self.old}"
        changed = source.replace(self.old, self.new)
        if self.module.startswith("mlu/"):
            return Kernel(op, "mutant", "cpu", emulated.mutant(op, self._beside(folder, original, changed, op)))
        path = folder / f"mutant_{original.name}"
        path.write_text(changed, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"mutant_{original.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        device = "cpu" if IS_INTERPRETED else "cuda"
        return Kernel(op, "mutant", device, getattr(module, op.name))

    @staticmethod
    def _beside(folder: Path, original: Path, changed: str, op: Op) -> Path:
        """The kernel file there whose name is that of its C entry: the changed one, or the op's with the changed header."""
        kernel = original if original.suffix == ".mlu" else original.with_name(f"{op.name}.mlu")
        # What is included by a name in quotes is first looked for beside the file that includes it.
        for path in (kernel, *original.parent.glob("*.h")):
            text = changed if path == original else path.read_text(encoding="utf-8")
            (folder / path.name).write_text(text, encoding="utf-8")
        return folder / kernel.name


def assert_equal(op: Op, got: Any, expected: Any) -> None:
    """Each output within the op's tolerance of the reference's, of its shape and dtype; NaN where the reference has it."""
    pairs: Sequence[tuple[Tensor, Tensor]] = (
        list(zip(got, expected, strict=True)) if isinstance(expected, (tuple, list)) else [(got, expected)]
    )
    for mine, right in pairs:
        tolerance = op.tolerance.get(right.dtype, 0.0)
        torch.testing.assert_close(mine, right, atol=tolerance, rtol=tolerance, equal_nan=True)
