"""Triton launches noted instead of run: what would be compiled, for which arguments; so it can be compiled anywhere, in parallel."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from triton import JITFunction, knobs

import vlmfx.ops.triton


@dataclass(frozen=True)
class Launch:
    """One kernel with the types, alignments and constants of one call, and its target; equal ones compile to the same."""

    function: JITFunction
    specialization: str

    @property
    def kernel(self) -> str:
        return kernel_name(self.function)

    def compile(self) -> Any:
        """Triton's CompiledKernel, which from then on the kernel's calls find; the active driver must be that of the launch."""
        return self.function.preload(self.specialization)


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """In this context no kernel runs; launches of those that are not compiled yet go into the list."""
    found: list[Launch] = []
    run: Any = JITFunction.run

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.append(Launch(fn.jit_function, compile["specialization_data"]))
        return True  # Triton's word for: the launch is done with

    def warm_up(self: JITFunction, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, warmup=True, **kwargs)

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    JITFunction.run = warm_up
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = before
        JITFunction.run = run


def compile_ahead(calls: Sequence[Callable[[], Any]]) -> None:
    """Compile, on all cores, what these calls would launch. What fails here fails again, and is told, where the call is made."""
    with noted() as found, torch.no_grad():
        for call in calls:
            with suppress(Exception):
                call()

    def compile_one(launch: Launch) -> None:
        with suppress(Exception):
            launch.compile()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, dict.fromkeys(found)))


def kernel_name(function: JITFunction) -> str:
    """File and function of a kernel below vlmfx/ops/triton, as rms_norm._kernel."""
    return f"{function.module.rpartition('.')[2]}.{function.fn.__name__}"


def kernels() -> set[str]:
    """Every kernel below vlmfx/ops/triton: the jitted functions there that no other one calls."""
    names = [f"vlmfx.ops.triton.{m.name}" for m in pkgutil.iter_modules(vlmfx.ops.triton.__path__)]
    modules = [importlib.import_module(name) for name in names]
    functions = {f for m in modules for f in vars(m).values() if isinstance(f, JITFunction) and f.module == m.__name__}
    called = {other for f in functions for other in _callees(f)}
    return {kernel_name(f) for f in functions - called}


def _callees(function: JITFunction) -> Iterator[JITFunction]:
    names = function.fn.__globals__
    for node in ast.walk(ast.parse(function.src)):
        found = names.get(node.id) if isinstance(node, ast.Name) else None
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found = getattr(names.get(node.value.id), node.attr, None)
        if isinstance(found, JITFunction):
            yield found
