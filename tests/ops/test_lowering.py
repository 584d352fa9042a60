"""Triton kernels compile for sm_80 and sm_90 at sizes of real models, spill nothing, and take what docs/perf/lowering.md says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "triton", minversion="3.6", reason="the lowering wants Triton 3.6, which torch 2.4 does not go with"
)

from lower_ops import MAX_SHARED, Need, Usage, differences, faults, one_each, rows  # the skip stands first

ROOT = Path(__file__).resolve().parents[2]
LAUNCHES = {80: "for sm_80", 90: "for sm_90"}
NEED = Need("rms_norm._kernel", "32×3584 bf16", LAUNCHES)  # type: ignore[arg-type]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own: this one may have Triton's interpreter in place of the compiler."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "scripts/lower_ops.py", "--check", *options]
    return subprocess.run(
        command, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )


def test_one_launch_a_kernel_is_as_the_page_says():
    done = run("--quick")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_every_case_is_as_the_page_says():
    done = run()
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("usage", "said"),
    [
        (Usage(4, 3, 64, 1024, 0, False), None),
        (Usage(4, 3, 255, 1024, 8, False), "spills 8 bytes at 255 registers"),
        (Usage(4, 3, 64, MAX_SHARED[80] + 1, 0, False), "on sm_80) asks for 101377 bytes of shared memory of 101376"),
        (Usage(4, 3, 64, 1024, 0, True), "matrix instructions that wait for each other"),
        ("CompilationError: no", "does not compile: CompilationError: no"),
    ],
)
def test_what_a_gpu_could_not_run_is_told(usage, said):
    found = faults([NEED], dict.fromkeys(LAUNCHES.values(), usage))  # type: ignore[arg-type]
    assert (said is None) == (found == [])
    assert said is None or said in found[0]


def test_a_row_shows_both_architectures_where_they_differ():
    used = {"for sm_80": Usage(4, 3, 64, 16, 0, False), "for sm_90": Usage(4, 3, 62, 16, 0, False)}
    assert rows([NEED, NEED], used) == ["| rms_norm._kernel | 32×3584 bf16 | 4 | 3 | 64 / 62 | 16 |"]  # type: ignore[arg-type]


def test_changed_and_missing_rows_are_told():
    page = "| kernel | case |\n|---|---|\n| a._kernel | 1 | 4 |\n| b._kernel | 1 | 4 |\n"
    assert differences(["| a._kernel | 1 | 4 |"], page, is_all=False) == []
    assert differences(["| a._kernel | 1 | 5 |"], page, is_all=False) == ["the page lacks | a._kernel | 1 | 5 |"]
    assert differences(["| a._kernel | 1 | 4 |"], page, is_all=True) == ["the page has | b._kernel | 1 | 4 |"]


def test_quick_takes_the_first_of_each_kernel():
    needs = [Need(kernel, case, LAUNCHES) for kernel in ("a", "b") for case in ("1", "2")]  # type: ignore[arg-type]
    assert [(need.kernel, need.case) for need in one_each(needs)] == [("b", "1"), ("a", "1")]
