"""The property tests are not blind: each op's `check` fails for each of its mutants, kernels with one line made wrong."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

import vlmfx.ops
from tests.ops import emulated, kernels
from tests.ops.kernels import Mutant
from vlmfx.ops.mlu import build

HERE = Path(__file__).parent
MODULES: list[ModuleType] = [importlib.import_module(f"tests.ops.{path.stem}") for path in sorted(HERE.glob("test_*.py"))
                             if "MUTANTS" in path.read_text(encoding="utf-8") and path != Path(__file__)]  # fmt: skip
MUTANTS = [
    pytest.param(m, mutant, id=f"{m.OP.name} {Path(mutant.module).parts[0]}: {mutant}")
    for m in MODULES
    for mutant in m.MUTANTS
]
# One of each file that a mutant is of, as it is.
COPIES = {
    f"{m.OP.name}: {mutant.module}": (m, replace(mutant, new=mutant.old)) for m in MODULES for mutant in m.MUTANTS
}
MUTATED = {mutant.module for module in MODULES for mutant in module.MUTANTS}
FEW = settings(
    max_examples=100,
    database=None,
    derandomize=True,
    report_multiple_bugs=False,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    deadline=None,
)


def cases_of(module: ModuleType) -> Any:
    """A module may have cases that tell more than its properties' own: most of those of `sample` have no filter to get wrong."""
    return getattr(module, "telling_cases", module.cases)


def skip_unless_it_runs(mutant: Mutant) -> None:
    if mutant.module.startswith("mlu/"):
        if not emulated.HAS_EMULATOR:
            pytest.skip(emulated.WHY_NO_EMULATOR)
    elif not kernels.IS_INTERPRETED:
        pytest.skip("mutants run in Triton's interpreter, which is off where there is a GPU")


@pytest.mark.parametrize(("module", "mutant"), MUTANTS)
def test_a_mutant_is_noticed(module: Any, mutant: Mutant, tmp_path: Path):
    skip_unless_it_runs(mutant)
    kernel = mutant.load(tmp_path, module.OP)

    @FEW
    @given(case=cases_of(module)())
    def run(case: Any) -> None:
        module.check(kernel, case)

    # A wrong answer, or what the interpreter says of a read out of bounds.
    with pytest.raises((AssertionError, IndexError, ValueError, RuntimeError)):
        run()


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_without_a_change_passes(copy: str, tmp_path: Path):
    """Else mutants could be noticed because a copied file does not run."""
    module, unchanged = COPIES[copy]
    skip_unless_it_runs(unchanged)
    kernel = unchanged.load(tmp_path, module.OP)

    @settings(FEW, max_examples=5)
    @given(case=cases_of(module)())
    def run(case: Any) -> None:
        module.check(kernel, case)

    run()


def test_every_triton_kernel_has_mutants():
    """Of the files that launch one, which is a function of the file's name; steps that kernels share are tested through them."""
    paths = (Path(vlmfx.ops.__path__[0]) / "triton").glob("*.py")
    files = {f"triton/{path.name}" for path in paths if f"\ndef {path.stem}(" in path.read_text(encoding="utf-8")}
    assert files
    assert files <= MUTATED


def test_every_mlu_kernel_has_mutants():
    """And the headers that some share; what all kernels include, a mutant of which would be one of all, is tested through them."""
    without = {"probe.mlu", "launch.h", "entries.h"}
    paths = (*build.KERNELS.glob("*.mlu"), *build.KERNELS.glob("*.h"))
    files = {f"mlu/kernels/{path.name}" for path in paths if path.name not in without}
    assert files
    assert files <= MUTATED
