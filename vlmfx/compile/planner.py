"""From a trace to the plan that wastes least on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlmfx.compile.buckets import MAX_GRAPHS, UNITS, Plan
from vlmfx.compile.choose import choices, divide, fewest, least_share, padding_share, rows_run
from vlmfx.compile.comparison import Comparison, Row
from vlmfx.compile.ladders import TOKEN_MULTIPLE, default_plan
from vlmfx.compile.trace import TraceRequest, num_requests, steps
from vlmfx.errors import InvalidRequest

# What a padded unit costs: GFLOP, twice the parameters that it passes in Qwen2-VL-7B (vision tower 0.67e9, decoder 7.6e9).
WEIGHTS = {"encode": 1.3, "prefill": 15.2, "pool": 15.2}
# Seconds on one core for a per-block program. A decode block of 7B took 4 to 9 (torch 2.11, H200, Inductor); the upper end stands for
# each program until its own is measured.
COMPILE_S = {"encode": 9.0, "prefill": 9.0, "decode": 9.0, "pool": 9.0}

Options = Mapping[str, Sequence[tuple[int, ...]]]  # program → its best rungs for 1, 2, ... graphs
Sizes = Mapping[str, Sequence[int]]


def plan_trace(
    requests: Sequence[TraceRequest],
    *,
    max_graphs: int = MAX_GRAPHS,
    max_padding: float | None = None,
    max_num_seqs: int = 128,
    max_num_batched_tokens: int = 8192,
    max_patches: int = 16384,
    patch_multiple: int = 4,
    weights: Mapping[str, float] = WEIGHTS,
    compile_s: Mapping[str, float] = COMPILE_S,
) -> Comparison:
    """The plan of at most max_graphs that wastes least on these requests, compared with the default plan.

    max_padding, a share: instead, the plan of the fewest graphs that keeps each program's padding at or below it. weights: what a padded
    unit costs, compile_s: the seconds a graph takes, both by program. The plan reaches as far as the default one, and that as far as the
    requests: it covers max_num_batched_tokens and max_patches, or the largest embedding and the images of a request where these are
    more. Raises InvalidRequest, PlanError."""
    sizes = steps(requests, max_num_batched_tokens)
    default = default_plan(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max([max_num_batched_tokens, *sizes.get("pool", [])]),
        max_patches=max([max_patches, *sizes.get("encode", [])]),
        patch_multiple=patch_multiple,
        max_graphs=max_graphs,
        programs=list(sizes),
    )
    measured = {program: of_program for program, of_program in sizes.items() if of_program}
    num_graphs = max_graphs - len(default.decode)
    options = {
        program: choices(
            _rounded_up(of_program, patch_multiple if program == "encode" else TOKEN_MULTIPLE),
            num_graphs,
            most=default.rungs(program)[-1],
        )
        for program, of_program in measured.items()
    }
    if max_padding is None:
        division = _least_waste(options, measured, weights, num_graphs)
    else:
        division = _fewest_graphs(options, measured, max_padding, num_graphs)
    chosen: dict[str, Any] = {p: options[p][num - 1] for p, num in zip(options, division, strict=True)}
    plan = replace(default, **chosen)
    rows = [_row(program, requests, sizes[program], plan, default, compile_s) for program in UNITS if program in sizes]
    return Comparison(plan=plan, rows=rows)


def _least_waste(options: Options, sizes: Sizes, weights: Mapping[str, float], num_graphs: int) -> tuple[int, ...]:
    """The graphs of each program such that all padding, weighted, is least."""
    costs = [[weights[p] * (rows_run(rungs, sizes[p]) - sum(sizes[p])) for rungs in options[p]] for p in options]
    return divide(costs, num_graphs)


def _fewest_graphs(options: Options, sizes: Sizes, max_padding: float, num_graphs: int) -> tuple[int, ...]:
    """The graphs of each program such that none pads more than max_padding."""
    if not 0 <= max_padding < 1:
        raise InvalidRequest("max_padding", f"it is {max_padding:g}, expected a share from 0 to 1; use 0.1 for 10 %.")
    shares = [[padding_share(rungs, sizes[p]) for rungs in options[p]] for p in options]
    division = fewest(shares, max_padding)
    if division is None or sum(division) > num_graphs:
        least = math.ceil(1000 * least_share(shares, num_graphs)) / 1000
        raise InvalidRequest(
            "max_padding",
            f"{max_padding:g} is not reached with {num_graphs} graphs for {' and '.join(options)}, {least:g} is; "
            "use that or raise max_graphs.",
            found=max_padding,
            expected=least,
        )
    return division


def _rounded_up(sizes: Sequence[int], multiple: int) -> list[int]:
    return [-(-size // multiple) * multiple for size in sizes]


def _row(
    program: str,
    requests: Sequence[TraceRequest],
    sizes: Sequence[int],
    plan: Plan,
    default: Plan,
    compile_s: Mapping[str, float],
) -> Row:
    rungs, default_rungs = plan.rungs(program), default.rungs(program)
    return Row(
        program=program,
        num_requests=num_requests(requests, program),
        num_graphs=len(rungs),
        default_graphs=len(default_rungs),
        share=padding_share(rungs, sizes) if sizes else None,
        default_share=padding_share(default_rungs, sizes) if sizes else None,
        compile_s=len(rungs) * compile_s[program],
    )
