"""The emulator of MLU370: of a kernel that is right but for one fault it says exactly what is wrong; one that is right passes, and its
bytes and cycles are counted exactly. What is claimed: the header of bang_emu.h; the faults: vlmfx/ops/mlu/emu/faulty.mlu."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import emulated
from tests.ops.kernels import Mutant
from vlmfx.ops.mlu.emu import build
from vlmfx.ops.rms_norm import OP as RMS_NORM

pytestmark = [] if emulated.HAS_EMULATOR else [emulated.NO_EMULATOR]
N, NRAM = 1024, 655360  # floats; bytes of a core

_, ENUM = build.FAULTY.read_text(encoding="utf-8").split("enum Fault {")
NUMBERS = {name: i for i, name in enumerate(re.findall(r"\b[A-Z_]{3,}\b", re.sub("//.*", "", ENUM.split("};")[0])))}

NOT_SYNCED = "operand overlaps the destination of an async copy not yet synced"
REUSED = "overwrites the source of an async copy not yet synced"
NO_SYNC_COMPUTE = "__memcpy_async: async copy overlaps a vector operation without __sync_compute() between"
IN_PART = "destination partly overlaps a source"
SAID = {  # fault → what is said of it
    "NRAM_END": f"__bang_add: out of bounds: NRAM bytes [{4 * N - 128}, {4 * N + 128}) of c, which has {4 * N} bytes",
    "NRAM_BEGIN": f"__bang_add: out of bounds: NRAM bytes [-128, 128) of a, which has {4 * N} bytes",
    "NRAM_BEYOND": f"__bang_add: out of bounds: NRAM bytes [{4 * N}, {4 * N + 128}) of c, which has {4 * N} bytes",
    "NRAM_INTO_NEXT": f"__bang_write_value: out of bounds: NRAM bytes [0, {8 * N}) of a, which has {4 * N} bytes",
    "NRAM_PAST_PAD": "__bang_write_value: out of bounds: NRAM bytes [0, 256) of odd, which has 128 bytes",
    "NRAM_END_OF_COPY": f"__memcpy: out of bounds: NRAM bytes [{4 * N - 4}, {4 * N + 4}) of c, which has {4 * N} bytes",
    "NRAM_END_OF_STORE": f"__memcpy: out of bounds: NRAM bytes [{4 * N - 4}, {4 * N + 4}) of b, which has {4 * N} bytes",
    "NRAM_SEGMENTS": f"__memcpy: out of bounds: NRAM bytes [{4 * N}, {4 * N + 128}) of c, which has {4 * N} bytes",
    "NRAM_WILD": "__bang_add: out of bounds: an NRAM address that belongs to no buffer of the kernel",
    "NRAM_SCALAR": "scalar code wrote beyond odd",
    "NRAM_SCALAR_BEFORE": "scalar code wrote before a",
    "POISON_VECTOR": "__bang_add: reads uninitialised NRAM",
    "POISON_HALF": "__bang_half2float: reads uninitialised NRAM",
    "POISON_COPY": "__memcpy: reads uninitialised NRAM",
    "GDRAM_END": f"__memcpy: out of bounds: GDRAM bytes [{4 * N - 124}, {4 * N + 4}) of a tensor of {4 * N} bytes",
    "GDRAM_BEGIN": f"__memcpy: out of bounds: GDRAM bytes [-4, 124) of a tensor of {4 * N} bytes",
    "GDRAM_STRIDE": f"__memcpy: out of bounds: GDRAM bytes [{4 * N - 64}, {4 * N + 64}) of a tensor of {4 * N} bytes",
    "GDRAM_WILD": "__memcpy: out of bounds: a GDRAM address that belongs to no tensor of this launch",
    "READ_ONLY": "__memcpy: writes a read-only tensor",
    "LOAD_UNSYNCED": f"__bang_add: {NOT_SYNCED}",
    "LOAD_UNSYNCED_COPY": f"__memcpy: {NOT_SYNCED}",
    "LOAD_SYNCED_AS_MOVE": f"__bang_add: {NOT_SYNCED}",
    "MOVE_SYNCED_AS_IO": f"__bang_add: {NOT_SYNCED}",
    "COMPUTE_UNSYNCED": NO_SYNC_COMPUTE,
    "COMPUTE_UNSYNCED_LOAD": NO_SYNC_COMPUTE,
    "COMPUTE_SYNCED_AS_IO": NO_SYNC_COMPUTE,
    "SOURCE_REUSED": f"__bang_write_value: {REUSED}",
    "SOURCE_REUSED_COPY": f"__memcpy: {REUSED}",
    "ASYNC_OVERLAP": f"__memcpy_async: {NOT_SYNCED}",
    "STORE_UNSYNCED": f"__memcpy: {NOT_SYNCED}",
    "STORE_UNSYNCED_ASYNC": f"__memcpy_async: {NOT_SYNCED}",
    "STORE_SYNCED_AS_MOVE": f"__memcpy: {NOT_SYNCED}",
    "STORE_TWICE": f"__memcpy_async: {NOT_SYNCED}",
    "STORE_OVER_A_LOAD": f"__memcpy: {REUSED}",
    "IN_FLIGHT": "kernel ends with 1 async copies in flight",
    "ADDRESS_UNALIGNED": "__bang_add: operand address not 128-byte aligned",
    "ADDRESS_OF_NO_FLOAT": "__bang_add: operand address not 128-byte aligned",
    "COUNT_UNALIGNED": "__bang_add: 33 elements = 132 bytes is not a multiple of 128 bytes",
    "COUNT_UNALIGNED_REDUCE": "__bang_reduce_sum: 33 elements = 132 bytes is not a multiple of 128 bytes",
    "TRANSPOSE_UNALIGNED": "__bang_transpose: 8x16: each dimension must be a multiple of 64 bytes",
    "PARTIAL_OVERLAP": f"__bang_add: {IN_PART}",
    "TRANSPOSE_IN_PLACE": f"__bang_transpose: {IN_PART}",
    "WIDENED_IN_PLACE": f"__bang_half2float: {IN_PART}",
    "CYCLE_UNEVEN": "__bang_cycle_mul: 96 elements are not a multiple of the cycle 64",
    "FUSION_CYCLE": "__bang_fusion: 96 elements are not a multiple of the cycle 64",
    "SIZE_ZERO": "__memcpy: size 0, segnum 0",
    "SEGNUM_NEGATIVE": "__memcpy: size 4, segnum -1",
    "SEGMENTS_OVERLAP": "__memcpy: destination segments overlap (stride 4 < size 8)",
}
RACES = {  # of two tasks
    "RACE_OF_WRITES": "task 1: __memcpy: races with task 0, which writes the same GDRAM bytes in this launch",
    "RACE_OF_READ_AND_WRITE": "task 1: __memcpy: races with task 0, which reads the same GDRAM bytes in this launch",
    "NEIGHBOUR": "task 1: __memcpy: races with task 0, which writes the same GDRAM bytes in this launch",
}
SEEN_IN_THE_RESULT = {  # what no header can see, as it goes through scalars → the first number of the result
    "POISON_SCALAR": torch.nan,
    "POISON_SCALAR_HALF": torch.nan,
    "ARGMAX_OF_NAN": torch.nan,
    "LOAD_UNSYNCED_SCALAR": torch.nan,
    "SOURCE_REUSED_SCALAR": -1.0,
}
# Where 372 binds less than every architecture: what is said there, if anything.
SAID_ON_372 = {
    "ADDRESS_UNALIGNED": None,
    "ADDRESS_OF_NO_FLOAT": "__bang_add: operand address not 4-byte aligned",
    "COUNT_UNALIGNED": None,
    "TRANSPOSE_UNALIGNED": None,
}
GOOD = ["GOOD", "GOOD_ASYNC", "GOOD_PIECES", "GOOD_READ_BACK"]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load(tmp_path_factory.mktemp("faulty"))


def load(folder: Any, *macros: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.alone(build.FAULTY, folder / "faulty.so", emulated.path(), *macros)))
    library.vlmfx_faulty.restype = ctypes.c_char_p
    return library


def run(
    faulty: ctypes.CDLL, fault: str, tasks: int = 1, seed: int = 0, is_strict: bool = True, x: Tensor | None = None
) -> tuple[str | None, Tensor]:
    """What the emulator says, and y: NaN where it was not written."""
    x = numbers() if x is None else x
    y, emulator = torch.full_like(x, torch.nan), emulated.library()
    emulator.bang_emu_options(ctypes.c_uint64(seed), 16, int(is_strict))
    emulator.bang_emu_forget()
    for tensor, is_writable in ((x, 0), (y, 1)):
        emulator.bang_emu_register(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), is_writable)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (y, x))
    said = faulty.vlmfx_faulty(None, tasks, *pointers, len(x), NUMBERS[fault])
    return said and said.decode(), y


def numbers() -> Tensor:
    return torch.arange(1.0, N + 1)


def test_every_fault_is_expected_somewhere():
    assert sorted([*GOOD, "ORDER", "LEFT_BY_ANOTHER", *SAID, *RACES, *SEEN_IN_THE_RESULT]) == sorted(NUMBERS)


@pytest.mark.parametrize("is_strict", [True, False])
@pytest.mark.parametrize("tasks", [1, 2, 16])
@pytest.mark.parametrize("fault", GOOD)
def test_what_is_right_passes(faulty, fault, tasks, is_strict):
    said, y = run(faulty, fault, tasks, is_strict=is_strict)
    assert said is None
    assert torch.equal(y, 2 * numbers())


@pytest.mark.parametrize("fault", SAID)
def test_a_fault_is_named(faulty, fault):
    assert run(faulty, fault)[0] == f"task 0: {SAID[fault]}"
    assert run(faulty, "GOOD")[0] is None  # it leaves nothing behind


@pytest.mark.parametrize("fault", SAID)
def test_372_takes_any_alignment_but_that_of_an_element_and_of_a_reduction(faulty, fault):
    said, y = run(faulty, fault, is_strict=False)
    expected = SAID_ON_372.get(fault, SAID[fault])
    assert said == (expected and f"task 0: {expected}")
    if expected is None:
        assert torch.equal(y, 2 * numbers())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fault", RACES)
def test_a_race_is_named_in_any_order_of_tasks(faulty, fault, seed):
    assert run(faulty, fault, tasks=2, seed=seed)[0] == RACES[fault]


@pytest.mark.parametrize("fault", SEEN_IN_THE_RESULT)
def test_what_scalars_do_is_seen_in_the_result(faulty, fault):
    said, y = run(faulty, fault)
    assert said is None
    torch.testing.assert_close(y[0], torch.tensor(SEEN_IN_THE_RESULT[fault]), equal_nan=True)
    assert torch.equal(y[1:], 2 * numbers()[1:])


def test_a_task_finds_nothing_of_another_in_nram(faulty):
    said = [run(faulty, "LEFT_BY_ANOTHER", tasks=2, seed=seed)[0] for seed in range(8)]
    assert set(said) == {f"task {task}: __bang_add: reads uninitialised NRAM" for task in range(2)}


def test_tasks_run_in_an_order_that_the_seed_says(faulty):
    orders = [tuple(run(faulty, "ORDER", tasks=4, seed=seed)[1][:: N // 4].tolist()) for seed in (0, 1, 2, 3, 0)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(set(orders)) > 1
    assert orders[0] == orders[-1]


def test_a_file_may_have_no_more_nram_than_a_core(tmp_path):
    said, _ = run(load(tmp_path, "FAULTY_NRAM=(NRAM_BYTES+128)"), "GOOD")
    assert said == f"task -1: the file's __nram__ variables take {NRAM + 128} bytes, a core has {NRAM}"


def test_buffers_fill_no_more_than_the_file_has(tmp_path):
    count = NRAM // 12 // 32 * 32
    said, _ = run(load(tmp_path, f"FAULTY_COUNT={count}"), "GOOD")
    assert said is None
    (tmp_path / "more").mkdir()
    said, _ = run(load(tmp_path / "more", f"FAULTY_COUNT={count + 32}"), "GOOD")
    assert said == f"task 0: with c, 3 buffers take {12 * (count + 32)} bytes, the file's NRAM has {NRAM}"


def test_a_launch_has_a_task(faulty):
    assert run(faulty, "GOOD", tasks=0)[0] == "task -1: launched with no task"


def test_an_input_of_an_op_is_read_only(tmp_path):
    """Through the bindings, which say what is written."""
    right = "__memcpy_async(out + (int64_t)first * hidden, output"
    wrong = right.replace("out + ", "(T *)x + ", 1)
    kernel = Mutant("mlu/kernels/rms_norm.mlu", right, wrong).load(tmp_path, RMS_NORM)
    with pytest.raises(ValueError, match="__memcpy_async: writes a read-only tensor"):
        kernel(torch.ones(2, 64), torch.ones(64), 1e-6)


@pytest.mark.parametrize("tasks", [1, 2, 16])
def test_bytes_pieces_and_cycles_are_exact(faulty, tasks):
    """Each of N floats read once, added once, 32 a cycle, and written once."""
    cycles = N // 32
    run(faulty, "GOOD", tasks)
    assert emulated.counters() == (4 * N, 4 * N, cycles, cycles // tasks, 2 * tasks, 1)
    run(faulty, "GOOD_PIECES", tasks)
    assert emulated.counters() == (4 * N, 4 * N, cycles, cycles // tasks, 5 * tasks, 1)
    run(faulty, "GOOD_ASYNC", tasks)  # a copy on the chip costs no bytes of device memory
    assert emulated.counters() == (4 * N, 4 * N, cycles, cycles // tasks, 2 * tasks, 1)


def test_an_operation_costs_whole_cycles(faulty):
    run(faulty, "COUNT_UNALIGNED", is_strict=False)
    assert emulated.counters().cycles == N // 32 + 2  # 33 floats
    run(faulty, "ADDRESS_UNALIGNED", is_strict=False)
    assert emulated.counters().cycles == N // 32 + 1  # 32 of them
