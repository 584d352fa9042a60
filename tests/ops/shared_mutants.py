"""Mutants of a file of steps that kernels share: the kernel is the unchanged file, which imports the changed steps."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tests.ops.kernels import IS_INTERPRETED, Kernel, Mutant
from vlmfx.ops.registry import Op


@dataclass(frozen=True)
class SharedMutant(Mutant):
    """A mutant of `module`, of which the kernel in `kernel`, below vlmfx/ops/triton, is run."""

    kernel: str = ""

    def __str__(self) -> str:
        return f"{self.kernel}: {super().__str__()}"

    def load(self, folder: Path, op: Op) -> Kernel:
        shared = importlib.import_module(f"vlmfx.ops.triton.{Path(self.module).stem}")
        original = importlib.import_module(f"vlmfx.ops.triton.{self.kernel}")
        assert shared.__file__ is not None
        assert original.__file__ is not None
        source = Path(shared.__file__).read_text(encoding="utf-8")
        assert source.count(self.old) == 1, f"{self.module} must hold once: {self.old}"
        changed, unchanged = folder / Path(self.module).name, folder / f"{self.kernel}.py"
        changed.write_text(source.replace(self.old, self.new), encoding="utf-8")
        unchanged.write_text(Path(original.__file__).read_text(encoding="utf-8"), encoding="utf-8")
        mutated = _executed(changed)
        sys.modules[shared.__name__] = mutated
        try:
            module = _executed(unchanged)
        finally:
            sys.modules[shared.__name__] = shared
        return Kernel(op, "mutant", "cpu" if IS_INTERPRETED else "cuda", getattr(module, op.name))


def _executed(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"mutant_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
