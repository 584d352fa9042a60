"""The kernels of an op that this machine can run, each to be called on CPU tensors and compared with the reference; and mutants of them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmfx.ops
from vlmfx.ops.registry import Op

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Kernel:
    """One kernel; a call takes CPU tensors, runs on the kernel's device and leaves what it mutated, and its outputs, on the CPU."""

    name: str
    device: str
    run: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        if self.device == "cpu":
            return self.run(*args)
        moved = [a.to(self.device) if isinstance(a, Tensor) else a for a in args]
        out = self.run(*moved)
        for mine, theirs in zip(args, moved, strict=True):
            if isinstance(mine, Tensor) and 0 not in mine.stride():  # an expanded one is not written to
                mine.copy_(theirs)
        if isinstance(out, (tuple, list)):
            return tuple(o.cpu() for o in out)
        return out if out is None else out.cpu()


def kernels_of(op: Op) -> list[Any]:
    """The kernels that run here, as pytest parameters: never the reference itself. An op without any fails its test."""
    found = [Kernel("cpu", "cpu", op.cpu)] if op.cpu is not op.reference else []
    if "cuda" in op.kernels and IS_INTERPRETED:
        found.append(Kernel("triton-interpreted", "cpu", op.kernel("cuda")))
    if "cuda" in op.kernels and torch.cuda.is_available():
        found.append(Kernel("triton-cuda", "cuda", op.kernel("cuda")))
    return [pytest.param(k, id=k.name) for k in found] or [pytest.param(None, id="no-kernel")]


@dataclass(frozen=True)
class Mutant:
    """A kernel file with one line made wrong: `old`, which stands there exactly once, is `new`."""

    module: str  # below vlmfx/ops, as "triton/rms_norm.py"
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.old.strip()} -> {self.new.strip()}"

    def load(self, folder: Path, name: str) -> Kernel:
        """The mutated kernel; folder takes the changed file, which Triton reads the source of."""
        original = Path(vlmfx.ops.__path__[0]) / self.module
        source = original.read_text(encoding="utf-8")
        assert source.count(self.old) == 1, f"{self.module} must hold once: {self.old}"
        path = folder / f"mutant_{original.name}"
        path.write_text(source.replace(self.old, self.new), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"mutant_{original.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        device = "cpu" if IS_INTERPRETED else "cuda"
        return Kernel("mutant", device, getattr(module, name))


def assert_equal(op: Op, got: Any, expected: Any) -> None:
    """Each output within the op's tolerance of the reference's, of its shape and dtype; NaN where the reference has it."""
    pairs: Sequence[tuple[Tensor, Tensor]] = (
        list(zip(got, expected, strict=True)) if isinstance(expected, (tuple, list)) else [(got, expected)]
    )
    for mine, right in pairs:
        tolerance = op.tolerance.get(right.dtype, 0.0)
        torch.testing.assert_close(mine, right, atol=tolerance, rtol=tolerance, equal_nan=True)
