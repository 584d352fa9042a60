"""Speed of every op on a GPU: time, share of what the GPU was measured to do, and how much longer its rivals take.

    python scripts/bench_ops.py [--only OP,...] [--case TEXT] [--rivals none|quick|all] [--out FILE.md] [--json FILE.json]
    python scripts/bench_ops.py --sweep OP [--case TEXT]

The cases are the timed ones of scripts/op_cases.py. Before anything is timed the result is compared with the reference's; a case
that differs is told, and the exit status is 1. quick has the compiled rivals and the weak ones for an op's first case only. --sweep
times one op's kernel under other settings, as scripts/op_sweep.py says."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import gpu_timer
import op_rivals
import op_sweep
import torch
from gpu_timer import Limits
from op_cases import CASES, Args, Case, load_op
from op_check import as_list, difference, outputs
from op_rivals import Rival
from torch import Tensor

from vlmfx.ops.registry import Cost, Op

# Their output is next to nothing beside what they read; the others write as much as they read, which is slower.
READERS = {"paged_decode_attention", "sample", "token_logprobs"}


@dataclass(frozen=True)
class Row:
    """One case as measured; problem says why there is no time, or why it is not to be trusted."""

    op: str
    case: str
    cost: Cost
    ms: float | None = None
    rivals_ms: dict[str, float] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)
    problem: str | None = None


def best_ms(op: str, cost: Cost, limits: Limits) -> tuple[float, str]:
    """The time that the measured limits allow, and which of them sets it."""
    memory = cost.bytes / (limits.read if op in READERS else limits.copied) * 1e3
    matrix = cost.flops / limits.flops * 1e3
    return (memory, "memory") if memory >= matrix else (matrix, "matrix")


def line(row: Row, limits: Limits) -> str:
    """The row of the markdown table: rivals as how many times our time they take, the fastest first."""
    if row.ms is None:
        return f"| {row.op} | {row.case} | | | | **{row.problem}** |"
    best, limit = best_ms(row.op, row.cost, limits)
    if limit == "memory":
        rate = f"{row.cost.bytes / row.ms / 1e9:.2f} TB/s"
    else:
        rate = f"{row.cost.flops / row.ms / 1e9:.0f} TFLOP/s"
    rivals = [f"{name} {ms / row.ms:.2f}" for name, ms in sorted(row.rivals_ms.items(), key=lambda item: item[1])]
    if row.problem:
        rivals.insert(0, f"**{row.problem}**")
    share = f"{best / row.ms:.0%} {limit}"
    return f"| {row.op} | {row.case} | {row.ms * 1e3:.1f} | {rate} | {share} | {', '.join(rivals)} |"


def page(rows: Sequence[Row], limits: Limits, machine: str) -> str:
    """The table, and what was measured of the device."""
    lines = "\n".join(line(row, limits) for row in rows)
    return f"""# Speed of the ops

Written by `python scripts/bench_ops.py --out docs/perf/ops.md`. {machine}.

Measured limits: {described(limits)}. "Share" is that of the limit named.
Times are medians over calls of a captured graph whose operands are not in the cache. A rival's number is its time over ours: above
1 ours is faster. Rivals get paged caches gathered, and heads repeated, outside their time.

| op | case | µs | rate | share | rivals |
|---|---|---|---|---|---|
{lines}
"""


def described(limits: Limits) -> str:
    return (
        f"{limits.copied / 1e12:.2f} TB/s copied (read and written), {limits.read / 1e12:.2f} TB/s read, "
        f"{limits.flops / 1e12:.0f} TFLOP/s in a bfloat16 product of 8192 × 8192"
    )


def timed(op: Op, case: Case, rivals: Sequence[Rival]) -> Row:
    """Check the kernel and the rivals, and time them."""
    kernel, args = op.kernel("cuda"), case.make("cuda")
    op.checked(*args)
    cost = op_rivals.cost_of(op, args)
    expected = outputs(op, op.reference, case.make("cuda"))
    wrong = difference(op, outputs(op, kernel, args), expected)
    sets = gpu_timer.operand_sets(partial(case.make, "cuda"), cost.bytes)
    ms = gpu_timer.median_ms([partial(kernel, *each) for each in sets])
    rivals_ms, declined = {}, {}
    for rival in rivals:
        try:
            rivals_ms[rival.name] = _rival_ms(op, rival, sets, expected)
        except Exception as error:  # a rival may lack what we ask for in ways of its own; it is told, and ours goes on
            declined[rival.name] = f"{type(error).__name__}: {error}".split("\n")[0][:160]
    return Row(op.name, case.name, cost, ms, rivals_ms, declined, wrong and f"wrong: {wrong}")


def _rival_ms(op: Op, rival: Rival, sets: Sequence[Args], expected: list[Tensor]) -> float:
    runs = [rival.prepare(args) for args in sets]
    if not op.is_mutating:
        wrong = difference(op, as_list(runs[0].read(runs[0].call())), expected, slack=4.0)
        if wrong:
            raise ValueError(f"its result is not the reference's: {wrong}")
    return gpu_timer.median_ms([run.call for run in runs])


def rivals_for(op: Op, level: str, *, is_first: bool) -> list[Rival]:
    """The rivals that are worth their time."""
    if level == "none":
        return []
    rivals = op_rivals.rivals_of(op)
    return rivals if level == "all" or is_first else [r for r in rivals if not (r.is_compiled or r.is_weak)]


def bench(ops: Sequence[Op], text: str, level: str, limit_s: float) -> Iterator[Row]:
    """A row a case; once limit_s seconds have gone, the rivals that compile are left out."""
    from triton_launches import compile_ahead  # imports Triton

    start = time.monotonic()
    chosen = [(op, [case for case in CASES[op.name] if case.is_timed and text in case.name]) for op in ops]

    def launch(op: Op, case: Case) -> None:
        op.kernel("cuda")(*case.make("meta"))

    compile_ahead([partial(launch, op, case) for op, cases in chosen for case in cases])
    for op, cases in chosen:
        for case in cases:
            rivals = rivals_for(op, level, is_first=case is cases[0])
            if time.monotonic() - start > limit_s:
                rivals = [rival for rival in rivals if not rival.is_compiled]
            torch._dynamo.reset()
            try:
                yield timed(op, case, rivals)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                yield Row(op.name, case.name, Cost(0, 0), problem=problem)
            torch.cuda.empty_cache()


def loaded(names: Sequence[str]) -> list[Op]:
    """The ops of these names that have a CUDA kernel; the others are told."""
    found = []
    for name in names:
        try:
            op = load_op(name)
            op.kernel("cuda")
            found.append(op)
        except ImportError as error:
            print(f"bench_ops: {name} is left out: {error}", file=sys.stderr)
    return found


def machine() -> str:
    """Device and versions."""
    import triton

    name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}, Python {sys.version.split()[0]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default=",".join(CASES), help="ops, with commas between them")
    parser.add_argument("--case", default="", help="only cases with this text in their name")
    parser.add_argument("--rivals", choices=["none", "quick", "all"], default="quick")
    parser.add_argument("--limit-s", type=float, default=330, help="from then on no rival is compiled")
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--sweep", metavar="OP", help="time other settings of one kernel")
    args = parser.parse_args(argv)
    names = args.only.split(",") if args.sweep is None else [args.sweep]
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"{unknown[0]} is no op of scripts/op_cases.py; choose from {', '.join(CASES)}.")
    if not torch.cuda.is_available():
        print("bench_ops: this needs a CUDA GPU and Triton, and there is no GPU here.", file=sys.stderr)
        return 2
    with torch.no_grad():
        ops = loaded(names)
        if args.sweep:
            for op in ops:
                for case in CASES[op.name]:
                    if case.is_timed and args.case in case.name:
                        print(op_sweep.sweep(op, case), flush=True)
            return 0
        return _bench(ops, args)


def _bench(ops: Sequence[Op], args: argparse.Namespace) -> int:
    limits, rows = gpu_timer.limits(), []
    print(f"{machine()}: {described(limits)}", flush=True)
    for row in bench(ops, args.case, args.rivals, args.limit_s):
        rows.append(row)
        print(line(row, limits), flush=True)
        for name, reason in row.declined.items():
            print(f"    {name}: {reason}", file=sys.stderr)
    if args.out:
        args.out.write_text(page(rows, limits, machine()), encoding="utf-8")
    if args.json:
        found = {"machine": machine(), "limits": asdict(limits), "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
