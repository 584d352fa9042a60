"""Which executor a model gets: a bundle's programs, graphs captured on a GPU, programs compiled here, or the functions as they are."""

from __future__ import annotations

from pathlib import Path

from vlmfx.checkpoint import Model, Task
from vlmfx.compile.buckets import Plan, plan_for
from vlmfx.compile.executor import EagerExecutor, Executor, PlannedExecutor
from vlmfx.compile.ladders import EMBED, GENERATE, default_plan
from vlmfx.compile.layout import CacheLayout
from vlmfx.compile.make import Capturing, Compiling, Loading
from vlmfx.engine.memory import cache_layout
from vlmfx.engine.options import EngineOptions
from vlmfx.errors import DeviceError, InvalidRequest, shown

BACKENDS = ("auto", "eager", "cuda_graph", "inductor", "mlu_graph")


def executor_for(
    model: Model,
    *,
    task: Task,
    options: EngineOptions,
    backend: str = "auto",
    plan: Plan | str | Path | None = None,
    strict: bool = False,
) -> Executor:
    """What runs a model's programs, with a cache where the task is to generate. backend "auto": a bundle's own, else graphs on a GPU, else
    none.

    plan: a Plan or a file of one; by default the ladder up to max_num_seqs. Raises InvalidRequest, DeviceError, PlanError."""
    if backend not in BACKENDS:
        raise InvalidRequest(
            "backend", f"it is {shown(backend)}; use one of {', '.join(BACKENDS)}.", found=backend, expected=BACKENDS
        )
    device, bundle = model.device, model.bundle
    if bundle is not None and backend == "auto":
        if plan is not None:
            raise InvalidRequest("plan", "a bundle has its own, which it was exported for; leave it out.")
        make = Loading(bundle.program, device) if device.type == "cpu" else Capturing(device, bundle.program)
        return PlannedExecutor(
            model.program_set, model.params, plan=bundle.plan, layout=bundle.layout, make=make, strict=strict,
            chains_sampling=True,
        )  # fmt: skip
    if backend == "auto":
        backend = {"cuda": "cuda_graph"}.get(device.type, "eager")
    if backend == "eager":
        for name, given in (("plan", plan is not None), ("strict", strict)):
            if given:
                why = f'backend "eager" on {device.type} compiles nothing; choose another or leave it out.'
                raise InvalidRequest(name, f"it was given, but {why}")
        layout = cache_layout(model, options, None) if task == "generate" else CacheLayout.of(1, model.max_model_len)
        return EagerExecutor(model.program_set, model.params, layout=layout)
    if not backend.startswith(device.type) and backend.endswith("_graph"):
        raise DeviceError(f'backend {backend} needs another device than "{device}"; use backend="auto".')
    chosen = _plan(model, plan, task, options)
    layout = cache_layout(model, options, chosen) if task == "generate" else CacheLayout.of(1, model.max_model_len)
    compiling = backend == "inductor"
    return PlannedExecutor(
        model.program_set, model.params, plan=chosen, layout=layout,
        make=Compiling(backend, device) if compiling else Capturing(device), strict=strict, chains_sampling=compiling,
    )  # fmt: skip


def _plan(model: Model, plan: Plan | str | Path | None, task: Task, options: EngineOptions) -> Plan:
    multiple, programs = model.config.vision.patch_multiple, GENERATE if task == "generate" else EMBED
    if plan is not None:
        return plan_for(plan, programs, multiple)
    num_seqs = options.num_seqs(model.device.type)
    return default_plan(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=min(options.max_num_batched_tokens, max(num_seqs, 16) * model.max_model_len),
        patch_multiple=multiple,
        programs=programs,
    )
