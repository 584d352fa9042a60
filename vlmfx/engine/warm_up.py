"""warm_up: the programs of a plan made before there is a request that needs them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from vlmfx.checkpoint import Model
from vlmfx.compile.buckets import Plan
from vlmfx.compile.executor import Executor
from vlmfx.compile.inputs import bucket_inputs
from vlmfx.compile.layout import CacheLayout
from vlmfx.device import num_cores
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.processing.prompt import example_vision


@torch.no_grad()
def warm_up(model: Model, executor: Executor, *, use_tqdm: bool = True) -> None:
    """Run each program of the executor's plan once, the largest buckets first, so that the smaller ones find memory.

    Greedy programs only; those that draw tokens are made when they are first used. Nothing is done where there is no plan."""
    plan, layout = executor.plan, executor.layout
    if plan is None or layout is None:
        return
    example = example_vision(model.processor)
    work = [(name, size) for name in plan.programs for size in reversed(plan.rungs(name))]
    for name, size in tqdm(work, desc="warm up", unit="program", disable=not use_tqdm):
        run_padding(model, executor, name, size, plan, layout, example)


def run_padding(
    model: Model, executor: Executor, name: str, size: int, plan: Plan, layout: CacheLayout, example: VisionInputs
) -> None:
    """Run a program on inputs of a bucket that are all padding, and lie where those of requests do: no key or value is written.

    layout: as long as sequences may get, where the executor's own cache is shorter. example: pixels of any image."""
    device = model.device
    inputs: Any = bucket_inputs(
        model.program_set, name, size, plan=plan, layout=layout, example=example, num_cores=num_cores(device)
    )
    if name == "encode":
        executor.encode(inputs)
        return
    if inputs.features is not None:
        f, features = model.functions, inputs.features.to(device)
        extras = f.extras(model.config, [1], [1], len(inputs.ids), features, inputs.feature_index)
        inputs = replace(inputs, features=features, extras=extras)
    if name == "pool":
        executor.pool(inputs)
    else:
        executor.step(replace(inputs, ids=inputs.ids.to(device)) if name == "decode" else inputs, executor.cache)
