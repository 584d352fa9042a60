"""What the kernels of mlu move and compute at the shapes of Qwen2-VL-7B, in half: bytes against what must move, and cycles of the vector
pipe against the count by hand in the line `// cycles:` of the kernel's file."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest

from tests.ops import emulated
from vlmfx.ops.mlu.emu import build
from vlmfx.ops.registry import Op

MOST_BYTES, MOST_CYCLES = 1.3, 1.5
FILES = {"add_rms_norm": "rms_norm"}  # op → file, where they are not called alike


def cases() -> list[Any]:
    """The ops whose tests have a `mlu_case`: arguments, and the numbers that the count by hand names."""
    modules = [importlib.import_module(f"tests.ops.test_{path.stem}") for path in sorted(build.KERNELS.glob("*.mlu"))]
    modules += [importlib.import_module(f"tests.ops.test_{name}") for name in FILES]
    return [pytest.param(m, id=m.OP.name) for m in modules if hasattr(m, "mlu_case")]


def by_hand(op: Op, numbers: dict[str, int]) -> float:
    """The count of the kernel's header: an expression of its entry's numbers, where pad(n, m) is n made a multiple of m."""
    path = build.KERNELS / f"{FILES.get(op.name, op.name)}.mlu"
    found = re.findall(r"^// cycles: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) == 1, f"{path.name} must have one line '// cycles: …'"
    names: dict[str, Any] = {**numbers, "pad": lambda n, m: -(-n // m) * m, "min": min, "max": max}
    return float(eval(found[0], {"__builtins__": {}}, names))


@pytest.mark.skipif(not emulated.HAS_COMPILER, reason="the emulator needs g++")
@pytest.mark.parametrize("module", cases())
def test_a_kernel_moves_and_computes_what_it_must(module: Any):
    op, (args, numbers) = module.OP, module.mlu_case()
    emulated.call(op, *args)
    counts, must_move, cycles = emulated.counters(), op.cost(*args).bytes, by_hand(op, numbers)
    moved = counts.read + counts.written
    print(
        f"{op.name}: {moved / must_move:.2f} of the bytes, {counts.cycles / max(cycles, 1):.2f} of the cycles by hand"
    )
    assert moved <= MOST_BYTES * must_move
    assert counts.cycles <= MOST_CYCLES * cycles
    assert counts.longest * 16 <= 1.5 * counts.cycles + 16 * 64  # shared out evenly among the cores


def test_every_kernel_is_counted():
    counted = {case.id for case in cases()}
    assert {path.stem for path in build.KERNELS.glob("*.mlu")} <= counted
