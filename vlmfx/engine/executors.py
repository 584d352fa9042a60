"""Which executor a model gets: a bundle's programs, graphs captured on a GPU, programs compiled here, or the functions as they are."""

from __future__ import annotations

from pathlib import Path

import torch

from vlmfx.checkpoint import Model, Task
from vlmfx.compile.buckets import Plan, plan_for
from vlmfx.compile.executor import Executor, PlannedExecutor
from vlmfx.compile.ladders import EMBED, GENERATE, default_plan
from vlmfx.compile.layout import CacheLayout, bytes_per_token
from vlmfx.compile.make import Capturing, Compiling, Loading
from vlmfx.errors import DeviceError, InvalidRequest, shown

BACKENDS = ("auto", "eager", "cuda_graph", "inductor", "mlu_graph")
CACHE_SHARE = 0.8  # of the memory that is free once the weights are there


def executor_for(
    model: Model,
    *,
    task: Task,
    backend: str = "auto",
    plan: Plan | str | Path | None = None,
    strict: bool = False,
    max_num_seqs: int,
) -> Executor:
    """What runs a model's programs. backend "auto": a bundle's own, else graphs on a GPU, else none.

    plan: a Plan or a file of one; by default the ladder up to max_num_seqs. Raises InvalidRequest, DeviceError, PlanError."""
    if backend not in BACKENDS:
        raise InvalidRequest(
            "backend", f"it is {shown(backend)}; use one of {', '.join(BACKENDS)}.", found=backend, expected=BACKENDS
        )
    device, common = model.device, {"strict": strict, "programs": model.program_set, "params": model.params}
    bundle = model.bundle
    if bundle is not None and backend == "auto":
        if plan is not None:
            raise InvalidRequest("plan", "a bundle has its own, which it was exported for; leave it out.")
        make = Loading(bundle.program, device) if device.type == "cpu" else Capturing(device, bundle.program)
        return PlannedExecutor(plan=bundle.plan, layout=bundle.layout, make=make, chains_sampling=True, **common)
    if backend == "auto":
        backend = {"cuda": "cuda_graph"}.get(device.type, "eager")
    if backend == "eager":
        return _uncompiled(model, plan, strict, f'backend "eager" on {device.type} compiles nothing; choose another')
    if not backend.startswith(device.type) and backend.endswith("_graph"):
        raise DeviceError(f'backend {backend} needs another device than "{device}"; use backend="auto".')
    rows = min(max_num_seqs, _rows_in_memory(model)) if task == "generate" else 1
    if rows == 0:  # the cache of each call is as long as it must be
        found = f"the device has no room for one sequence of {model.max_model_len} tokens; lower max_model_len"
        return _uncompiled(model, plan, strict, found)
    layout = CacheLayout.of(rows, model.max_model_len)
    chosen = _plan(model, plan, task, rows if task == "generate" else max_num_seqs, layout)
    compiling = backend == "inductor"
    make_here = Compiling(backend, device) if compiling else Capturing(device)
    return PlannedExecutor(plan=chosen, layout=layout, make=make_here, chains_sampling=compiling, **common)


def _uncompiled(model: Model, plan: Plan | str | Path | None, strict: bool, why: str) -> Executor:
    """The functions as they are. Raises InvalidRequest where the user counts on programs."""
    for name, given in (("plan", plan is not None), ("strict", strict)):
        if given:
            raise InvalidRequest(name, f"it was given, but {why} or leave it out.")
    return model.executor


def _plan(model: Model, plan: Plan | str | Path | None, task: Task, num_rows: int, layout: CacheLayout) -> Plan:
    multiple, programs = model.config.vision.patch_multiple, GENERATE if task == "generate" else EMBED
    if plan is not None:
        return plan_for(plan, programs, multiple)
    return default_plan(
        max_num_seqs=num_rows,
        max_num_batched_tokens=min(8192, max(num_rows, 16) * layout.max_len),
        patch_multiple=multiple,
        programs=programs,
    )


def _rows_in_memory(model: Model) -> int:
    """Sequences of full length that the cache has room for; a CPU's memory is used as it is touched."""
    if model.device.type != "cuda":
        return 2**31
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(CACHE_SHARE * free) // (model.max_model_len * bytes_per_token(model.config.text, model.dtype))
