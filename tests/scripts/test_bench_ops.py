"""The benchmark of the ops, as far as it goes without a GPU: its cases fit the ops, its rivals compute them, its table is right."""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType
from typing import NamedTuple

import bench_ops
import gpu_timer
import op_cases
import op_rivals
import op_sweep
import pytest
import torch
from bench_ops import Row
from gpu_timer import Limits
from op_cases import CASES, Make
from op_check import as_list, difference, outputs

from vlmfx.ops import rms_norm
from vlmfx.ops.registry import Cost, Op

LIMITS = Limits(copied=4e12, read=5e12, flops=8e14)
ALL = [pytest.param(op_cases.load_op(name), case, id=f"{name}: {case.name}") for name in CASES for case in CASES[name]]
ATTENTIONS = ("vision_attention", "prefill_attention", "paged_decode_attention")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, on which the benchmark would run")
def test_without_a_gpu_it_says_so(capsys):
    assert bench_ops.main([]) == 2
    assert capsys.readouterr().err == "bench_ops: this needs a CUDA GPU and Triton, and there is no GPU here.\n"


def test_an_unknown_op_is_named(capsys):
    with pytest.raises(SystemExit):
        bench_ops.main(["--only", "rms_norm,softmax"])
    assert "softmax is no op of scripts/op_cases.py; choose from rms_norm, add_rms_norm" in capsys.readouterr().err


@pytest.mark.parametrize(("op", "case"), ALL)
def test_the_op_takes_its_case_and_the_cost_is_known(op: Op, case: op_cases.Case):
    args = case.make("meta")
    op.checked(*args)
    assert len(args) == len(op.argument_names)
    assert op.cost(*args).bytes > 0


@pytest.mark.parametrize("name", CASES)
def test_case_names_differ_and_one_is_timed(name):
    names = [case.name for case in CASES[name]]
    assert len(set(names)) == len(names)
    assert any(case.is_timed for case in CASES[name])


def test_every_op_has_cases():
    modules = [importlib.import_module(f"vlmfx.ops.{name}") for name in CASES]
    assert {module.OP.name for module in modules} == set(CASES)


def test_the_limit_is_the_slower_of_memory_and_matrices():
    assert bench_ops.best_ms("rms_norm", Cost(flops=8, bytes=4_000_000_000), LIMITS) == (1.0, "memory")
    assert bench_ops.best_ms("sample", Cost(flops=8, bytes=5_000_000_000), LIMITS) == (1.0, "memory")
    assert bench_ops.best_ms("prefill_attention", Cost(flops=800_000_000_000, bytes=8), LIMITS) == (1.0, "matrix")


def test_rows_of_the_table():
    memory = Row("rms_norm", "big", Cost(0, 4_000_000_000), 1.25, {"eager": 5.0, "compiled": 1.25})
    assert (
        bench_ops.line(memory, LIMITS)
        == "| rms_norm | big | 1250.0 | 3.20 TB/s | 80% memory | compiled 1.00, eager 4.00 |"
    )
    matrix = Row("prefill_attention", "4k", Cost(800_000_000_000, 8), 2.0, problem="wrong: NaN")
    assert (
        bench_ops.line(matrix, LIMITS)
        == "| prefill_attention | 4k | 2000.0 | 400 TFLOP/s | 50% matrix | **wrong: NaN** |"
    )
    failed = Row("merge", "big", Cost(0, 0), problem="OutOfMemoryError: no")
    assert bench_ops.line(failed, LIMITS) == "| merge | big | | | | **OutOfMemoryError: no** |"
    page = bench_ops.page([memory, failed], LIMITS, "NVIDIA X, torch 2")
    assert "NVIDIA X, torch 2." in page
    assert "4.00 TB/s copied (read and written), 5.00 TB/s read, 800 TFLOP/s" in page
    assert page.count("\n| rms_norm |") == page.count("\n| merge |") == 1
    assert json.loads(json.dumps(memory.__dict__))["ms"] == 1.25


def test_the_check_sees_wrong_results():
    x, weight = torch.randn(4, 8), torch.randn(8)
    right = outputs(rms_norm.OP, rms_norm.reference, (x, weight, 1e-6))
    assert difference(rms_norm.OP, right, right) is None
    assert difference(rms_norm.OP, [right[0] * 1.01], right) is not None
    assert difference(rms_norm.OP, [right[0].where(right[0] > 9, torch.nan)], right) == "NaN"
    assert difference(rms_norm.OP, [right[0].half()], right) == "(4, 8) torch.float16 for (4, 8) torch.float32"
    numbers = torch.arange(100)
    assert difference(rms_norm.OP, [numbers.clamp(min=1)], [numbers]) is None
    assert difference(rms_norm.OP, [numbers.clamp(min=50)], [numbers]) == "50.0% of integers differ"


@pytest.fixture
def without_gpu(monkeypatch):
    """Cases on the CPU, where a call takes a millisecond and the kernel is the CPU's."""
    monkeypatch.setattr(Op, "kernel", lambda self, device: self.cpu)
    monkeypatch.setattr(gpu_timer, "operand_sets", lambda make, bytes_touched: [make()])
    monkeypatch.setattr(gpu_timer, "median_ms", lambda calls: 1.0 if [call() for call in calls] else 0.0)


@pytest.mark.usefixtures("without_gpu")
def test_a_case_is_checked_and_timed_and_so_are_its_rivals():
    def build(on: Make) -> op_cases.Args:
        return Make("cpu").normal(4, 8, dtype=torch.float32), torch.ones(8), 1e-6

    def refuse(args: op_cases.Args) -> op_rivals.Run:
        raise ValueError("too wide\nand more")

    rivals = [
        op_rivals.Rival("itself", lambda args: op_rivals.Run(lambda: rms_norm.reference(*args))),
        op_rivals.Rival("wrong", lambda args: op_rivals.Run(lambda: args[0])),
        op_rivals.Rival("unable", refuse),
    ]
    row = bench_ops.timed(rms_norm.OP, op_cases.Case("small", build), rivals)
    assert (row.ms, row.rivals_ms, row.problem) == (1.0, {"itself": 1.0}, None)
    assert row.declined["unable"] == "ValueError: too wide"
    assert row.declined["wrong"].startswith("ValueError: its result is not the reference's: differs by")


@pytest.mark.usefixtures("without_gpu")
def test_a_wrong_kernel_is_told(monkeypatch):
    monkeypatch.setattr(Op, "kernel", lambda self, device: lambda x, weight, eps: x * torch.nan)
    case = op_cases.Case("small", lambda on: (torch.ones(4, 8), torch.ones(8), 1e-6))
    assert bench_ops.timed(rms_norm.OP, case, []).problem == "wrong: NaN"


def test_what_an_op_writes_is_checked_too():
    op = op_cases.load_op("cache_write")
    on = Make("cpu")
    caches = on.cache(2, 3, 8, torch.float32)
    args = (
        on.normal(4, 3, 8, dtype=torch.float32),
        on.normal(4, 3, 8, dtype=torch.float32),
        *caches,
        on.list(range(4)),
    )
    written = outputs(op, op.reference, args)
    assert [w.data_ptr() for w in written] == [c.data_ptr() for c in caches]


def small(name: str) -> list[tuple[op_cases.Args, str]]:
    """Cases of an attention that a CPU has done at once, in float32."""
    on = Make("cpu")

    def qkv(tokens: int) -> tuple[torch.Tensor, ...]:
        return on.qkv(tokens, 4, 2, 16, torch.float32)

    caches = on.cache(12, 2, 16, torch.float32)
    table, decoded = on.block_table(3, 64), on.normal(3, 4, 16, dtype=torch.float32)
    if name == "vision_attention":
        q, k, v = on.qkv(24, 2, 2, 16, torch.float32)
        return [
            ((q, k, v, on.cumulative(lens), on.cumulative(lens), 0.3), kind)
            for lens, kind in (([8, 8, 8], "equal"), ([3, 16, 5], "ragged"))
        ]
    if name == "prefill_attention":
        return [
            ((*qkv(24), on.cumulative([8, 8, 8]), None, None, None, None, 0.3, 0), "equal"),
            ((*qkv(24), on.cumulative([3, 16, 5]), None, None, None, None, 0.3, 0), "ragged"),
            ((*qkv(24), on.cumulative([3, 16, 5]), None, None, None, None, 0.3, 4), "window"),
            ((*qkv(24), on.cumulative([3, 16, 5]), *caches, table, on.list([40, 0, 7]), 0.3, 0), "prefix"),
        ]
    return [
        ((decoded, *caches, table, on.list([50, 50, 50]), None, None, 0.3, 0), "equal"),
        ((decoded, *caches, table, on.list([50, 3, 17]), None, None, 0.3, 0), "ragged"),
        ((decoded, *caches, table, on.list([50, 3, 17]), None, None, 0.3, 9), "window"),
    ]


def test_the_cost_of_attention_is_that_of_its_lengths():
    qkv = Make("cpu").qkv(5, 4, 2, 16, torch.float32)
    bytes_of_rows = 4 * 16 * 4
    causal = op_rivals.Packed(*qkv, [2, 3], [2, 7], 0.3, True, 0)  # 1 + 2 and 5 + 6 + 7 pairs
    assert causal.cost == Cost(4 * 21 * 4 * 16, 2 * 5 * bytes_of_rows + 2 * 9 * bytes_of_rows // 2)
    window = op_rivals.Packed(*qkv, [2, 3], [2, 7], 0.3, True, 4)  # 1 + 2 and 4 + 4 + 4 pairs of 2 and 6 keys
    assert window.cost == Cost(4 * 15 * 4 * 16, 2 * 5 * bytes_of_rows + 2 * 8 * bytes_of_rows // 2)
    both = op_rivals.Packed(*qkv, [2, 3], [2, 7], 0.3, False, 0)
    assert both.cost.flops == 4 * (4 + 21) * 4 * 16


SERVED = {  # rivals that run on a CPU, and the kinds of cases that they take
    "SDPA math": {"equal"},
    "SDPA by segment": {"equal", "ragged"},
    "FlexAttention": {"equal", "ragged", "window", "prefix"},
}


@pytest.mark.skipif(torch.__version__ < "2.11", reason="the rivals are those of torch 2.11 and later")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ATTENTIONS)
def test_rivals_compute_the_op(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    op = op_cases.load_op(name)
    rivals = {rival.name: rival for rival in op_rivals.rivals_of(op)}
    for args, kind in small(name):
        expected = as_list(op.reference(*args))
        for rival, kinds in SERVED.items():
            if kind in kinds:
                run = rivals[rival].prepare(args)
                assert difference(op, as_list(run.read(run.call())), expected, slack=4.0) is None, (rival, kind)
            else:
                with pytest.raises(ValueError, match=r"differ|alone"):
                    rivals[rival].prepare(args)


def test_quick_leaves_the_slow_rivals_to_the_first_case():
    op = op_cases.load_op("vision_attention")
    every = bench_ops.rivals_for(op, "quick", is_first=True)
    assert {"eager", "compiled", "SDPA flash", "SDPA cuDNN", "SDPA efficient", "SDPA math"} <= {r.name for r in every}
    assert not any(r.is_compiled or r.is_weak for r in bench_ops.rivals_for(op, "quick", is_first=False))
    assert [r.name for r in bench_ops.rivals_for(op, "all", is_first=False)] == [r.name for r in every]
    assert bench_ops.rivals_for(op, "none", is_first=True) == []


class Settings(NamedTuple):
    tile: int
    num_warps: int
    num_stages: int


def test_a_sweep_tries_the_neighbours_or_the_listed(monkeypatch):
    module, home = ModuleType("kernel"), ModuleType("home")
    vars(module)["config"] = vars(home)["config"] = config = lambda: None  # one function, imported by the kernel's file
    config.__module__ = "home"
    monkeypatch.setitem(sys.modules, "home", home)
    tried = op_sweep.candidates(module, Settings(64, 4, 1))
    assert tried[0] == Settings(64, 4, 1)
    assert {Settings(128, 4, 1), Settings(64, 2, 1), Settings(64, 4, 2), Settings(32, 8, 1)} <= set(tried)
    assert all(s.num_stages > 0 for s in tried)
    assert len(set(tried)) == len(tried)
    vars(home)["CANDIDATES"] = [Settings(1, 1, 1), Settings(64, 4, 1)]
    assert op_sweep.candidates(module, Settings(64, 4, 1)) == [Settings(64, 4, 1), Settings(1, 1, 1)]


def test_a_sweep_replaces_config_and_puts_it_back():
    module = ModuleType("kernel")
    vars(module)["config"] = original = lambda width: Settings(width, 4, 1)
    assert op_sweep.chosen_settings(module, lambda: module.config(7)) == Settings(7, 4, 1)
    with op_sweep.standing_in(module, lambda *_: Settings(1, 1, 1)):
        assert module.config(7) == Settings(1, 1, 1)
    assert module.config is original
    with pytest.raises(SystemExit, match="kernel has no function config"):
        op_sweep.chosen_settings(ModuleType("kernel"), lambda: None)
