"""What the kernels of mlu move and compute at the shapes of Qwen2-VL-7B, in half: bytes against what must move, and cycles of the vector
pipe against the count by hand in the line `// cycles:` of the kernel's file.

`pytest -s` prints the table of docs/mlu.md."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest

from tests.ops import emulated
from vlmfx.ops.mlu import build
from vlmfx.ops.registry import Op

MOST_BYTES, MOST_CYCLES = 1.3, 1.5  # an op's tests may say MLU_BYTES, more than the first, and why
# Of an MLU370-X8 as Cambricon/mlu-ops counts: docs/design_docs/points_in_boxes, 307.2 GB/s, and 16 cores of 32 GOps in float32.
BYTES_A_US, CYCLES_A_US = 307_200, 1_000
FILES = {"add_rms_norm": "rms_norm"}  # op → file, where they are not called alike
KERNELS = [path.stem for path in sorted(build.KERNELS.glob("*.mlu")) if path.stem != "probe"]


def cases() -> list[Any]:
    """The ops whose tests have a `mlu_case`: arguments, and the numbers that the count by hand names."""
    modules = [importlib.import_module(f"tests.ops.test_{name}") for name in (*KERNELS, *FILES)]
    return [pytest.param(m, id=m.OP.name) for m in modules if hasattr(m, "mlu_case")]


def by_hand(op: Op, numbers: dict[str, int]) -> float:
    """The count of the kernel's header: an expression of its entry's numbers, where pad(n, m) is n made a multiple of m."""
    path = build.KERNELS / f"{FILES.get(op.name, op.name)}.mlu"
    found = re.findall(r"^// cycles: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) == 1, f"{path.name} must have one line '// cycles: …'"
    names: dict[str, Any] = {**numbers, "pad": lambda n, m: -(-n // m) * m, "min": min, "max": max}
    return float(eval(found[0], {"__builtins__": {}}, names))


@pytest.mark.skipif(not emulated.HAS_EMULATOR, reason=emulated.WHY_NO_EMULATOR)
@pytest.mark.parametrize("module", cases())
def test_a_kernel_moves_and_computes_what_it_must(module: Any):
    op, (args, numbers) = module.OP, module.mlu_case()
    emulated.call(op, *args)
    counts, must_move, cycles = emulated.counters(), op.cost(*args).bytes, by_hand(op, numbers)
    moved = counts.read + counts.written
    memory, vectors = moved / BYTES_A_US, counts.longest / CYCLES_A_US
    print(
        f"\n| {op.name} | {', '.join(f'{name} {number}' for name, number in numbers.items())} | {moved / 1e6:.2f} | "
        f"{moved / must_move:.2f} | {counts.longest} | {counts.cycles / max(cycles, 1):.2f} | {memory:.0f} | {vectors:.0f} | "
        f"{'memory' if memory > vectors else 'vectors'} |",
        end="",
    )
    assert moved <= getattr(module, "MLU_BYTES", MOST_BYTES) * must_move
    assert counts.cycles <= MOST_CYCLES * cycles
    assert counts.longest * 16 <= 1.5 * counts.cycles + 16 * 64  # shared out evenly among the cores


def test_every_kernel_is_counted():
    counted = {case.id for case in cases()}
    assert {*KERNELS} <= counted
