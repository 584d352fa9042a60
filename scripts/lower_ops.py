"""Compiles every Triton kernel for every case of scripts/op_cases.py, with no GPU, and says what each takes of one.

    python scripts/lower_ops.py [--quick] [--only OP,...] [--write | --check]

For sm_80 and sm_90: warps, stages, registers a thread, shared memory and spilled bytes, as a table. --write makes it
docs/perf/lowering.md; --check compares with that page (by another Triton than it was written with, only that all compiles and
nothing spills). --quick takes one launch a kernel. Fails if a kernel does not compile, spills, asks for more shared memory than
there is, or has no case."""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import op_cases
import torch
import triton
from op_cases import CASES, Case
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton_launches import Launch, kernels, noted

from vlmfx.ops.registry import Op

PAGE = Path(__file__).resolve().parents[1] / "docs" / "perf" / "lowering.md"
# Bytes that a program may have: of sm_80 to sm_89 the least, which sm_86 and sm_89 have (sm_80 itself 163 KiB), and of sm_90.
MAX_SHARED = {80: 99 * 1024, 90: 227 * 1024}
ARCHITECTURES = tuple(MAX_SHARED)
HEAD = """# What the kernels take

Written by `python scripts/lower_ops.py --write` on a machine without a GPU, with Triton {version}; a test compares. One row is one
kernel in one case of `scripts/op_cases.py`, compiled for sm_80 and sm_90, both shown where they differ. Registers are those of a
thread, shared memory that of a program, in bytes: on sm_80 no more than sm_86 and sm_89 have, 101,376. No kernel spills.

| kernel | case | warps | stages | registers | shared |
|---|---|---|---|---|---|
"""


class Usage(NamedTuple):
    """What one compiled kernel takes."""

    num_warps: int
    num_stages: int
    registers: int
    shared: int
    spilled: int
    is_serialized: bool  # Hopper's matrix instructions wait for each other


@dataclass(frozen=True)
class Need:
    """A launch that a case asks for, by architecture."""

    kernel: str
    case: str
    launches: Mapping[int, Launch]


class Driver:
    """Stands for a GPU in Triton's eyes; the index of the current device is its architecture."""

    architecture = ARCHITECTURES[0]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


DRIVER = Driver()


def needs(names: Sequence[str]) -> tuple[list[Need], list[str]]:
    """The launches of all cases of these ops, and a sentence for each that could not be had."""
    found: list[Need] = []
    problems: list[str] = []
    for name in names:
        try:
            op = op_cases.load_op(name)
            op.kernel("cuda")
        except ImportError as error:
            problems.append(f"{name}: {error}.")
            continue
        for case in CASES[name]:
            try:
                launches = {architecture: _launches(op, case, architecture) for architecture in ARCHITECTURES}
            except Exception as error:
                problems.append(f"{name}, {case.name}: the launch failed with {type(error).__name__}: {error}")
                continue
            for together in zip(*launches.values(), strict=True):
                by_architecture = dict(zip(launches, together, strict=True))
                found.append(Need(together[0].kernel, case.name, by_architecture))
    return found, problems


def _launches(op: Op, case: Case, architecture: int) -> list[Launch]:
    DRIVER.architecture = architecture
    args = case.make("meta")
    op.checked(*args)
    with noted() as launches, torch.no_grad():
        op.kernel("cuda")(*args)
    return launches


def one_each(found: Sequence[Need]) -> list[Need]:
    """The first need of each kernel."""
    return list({need.kernel: need for need in reversed(found)}.values())


def usages(found: Sequence[Need], processes: int) -> dict[Launch, Usage | str]:
    """Every launch compiled, once; a text says why one failed."""
    global _WORK
    _WORK = [(a, launch) for a, launch in dict.fromkeys(pair for need in found for pair in need.launches.items())]
    # Forked, as a launch holds functions that another process would have to find again.
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return dict(zip((launch for _, launch in _WORK), pool.map(_usage, range(len(_WORK)), chunksize=1), strict=True))


_WORK: list[tuple[int, Launch]] = []


def _usage(index: int) -> Usage | str:
    DRIVER.architecture, launch = _WORK[index]
    log = io.StringIO()
    try:
        with redirect_stdout(log):
            metadata = launch.compile().metadata
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip() or log.getvalue()[-2000:]}"
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log.getvalue())]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", log.getvalue())]
    is_serialized = "wgmma.mma_async instructions are serialized" in log.getvalue()
    return Usage(metadata.num_warps, metadata.num_stages, max(registers), metadata.shared, sum(spilled), is_serialized)


def faults(found: Sequence[Need], used: Mapping[Launch, Usage | str]) -> list[str]:
    """A sentence for each fault of a kernel that a GPU could not run, or only with spills, and the cases that have it."""
    cases: dict[tuple[str, str], list[str]] = {}
    for need in found:
        for architecture, launch in need.launches.items():
            usage, fault = used[launch], None
            if isinstance(usage, str):
                fault = f"does not compile: {usage}"
            elif usage.spilled:
                fault = f"spills {usage.spilled} bytes at {usage.registers} registers."
            elif usage.is_serialized:
                fault = f"has matrix instructions that wait for each other, at {usage.registers} registers."
            elif usage.shared > MAX_SHARED[architecture]:
                fault = f"asks for {usage.shared} bytes of shared memory of {MAX_SHARED[architecture]}."
            if fault:
                cases.setdefault((need.kernel, fault), []).append(f"{need.case} on sm_{architecture}")
    return [f"{kernel} ({'; '.join(places)}) {fault}" for (kernel, fault), places in cases.items()]


def rows(found: Sequence[Need], used: Mapping[Launch, Usage | str]) -> list[str]:
    """The table's rows, without those that did not compile; what differs between architectures is shown for each."""
    lines: dict[str, None] = {}
    for need in found:
        by_architecture = [used[launch] for launch in need.launches.values()]
        compiled = [usage for usage in by_architecture if isinstance(usage, Usage)]
        if len(compiled) == len(by_architecture):
            values = [" / ".join(dict.fromkeys(map(str, column))) for column in zip(*compiled, strict=True)]
            lines[f"| {need.kernel} | {need.case} | {' | '.join(values[:4])} |"] = None
    return list(lines)


def differences(lines: Sequence[str], committed: str, *, is_all: bool) -> list[str]:
    """Rows that the committed page lacks, and, if lines are all rows, those that it has beyond them."""
    there = [line for line in committed.splitlines() if line.startswith("| ") and line not in HEAD]
    extra = [f"the page has {line}" for line in there if line not in lines] if is_all else []
    return [f"the page lacks {line}" for line in lines if line not in there] + extra


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one launch a kernel")
    parser.add_argument("--only", help="ops, with commas between them", default=",".join(CASES))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help=f"write docs/perf/{PAGE.name}")
    what.add_argument("--check", action="store_true", help=f"compare with docs/perf/{PAGE.name}")
    args = parser.parse_args(argv)
    if knobs.runtime.interpret:
        sys.exit("lower_ops: TRITON_INTERPRET is set, which replaces the compiler; unset it.")
    triton.runtime.driver.set_active(DRIVER)
    knobs.nvidia.dump_ptxas_log = True
    names = args.only.split(",")
    found, problems = needs(names)
    is_all = names == list(CASES)
    if is_all:
        lacking = kernels() - {need.kernel for need in found}
        problems += [f"{kernel}: no case of scripts/op_cases.py launches it." for kernel in sorted(lacking)]
    found = one_each(found) if args.quick else found
    with tempfile.TemporaryDirectory() as folder:
        knobs.cache.dir = folder
        used = usages(found, args.processes)
    lines = rows(found, used)
    problems += faults(found, used)
    if args.check and f"Triton {triton.__version__};" in PAGE.read_text(encoding="utf-8"):
        problems += differences(lines, PAGE.read_text(encoding="utf-8"), is_all=is_all and not args.quick)
    if args.write:
        PAGE.write_text(HEAD.format(version=triton.__version__) + "".join(f"{line}\n" for line in lines), "utf-8")
    elif not args.check:
        print("\n".join(lines))
    for problem in problems:
        print(f"lower_ops: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
