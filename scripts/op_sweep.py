"""A kernel timed under other settings than those it chooses.

Its file below vlmfx/ops/triton has a function `config` that the launch calls and whose result, a NamedTuple, holds the settings; for
the sweep each candidate stands in for that result. Candidates are CANDIDATES, a sequence of such tuples in the file that defines
config, or else the neighbours of what config gives: one or two numbers halved or doubled, stages one up or down."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import gpu_timer
from op_cases import Case
from op_check import difference, outputs
from op_rivals import cost_of

from vlmfx.ops.registry import Op


def sweep(op: Op, case: Case) -> str:
    """The time of the case under each candidate, the fastest first; * marks what config chooses."""
    from triton_launches import compile_ahead  # imports Triton

    kernel, module = op.kernel("cuda"), import_module(f"vlmfx.ops.{op.kernels['cuda']}")
    sets = gpu_timer.operand_sets(partial(case.make, "cuda"), cost_of(op, case.make("cuda")).bytes)
    expected = outputs(op, op.reference, case.make("cuda"))
    calls = [partial(kernel, *args) for args in sets]
    chosen = chosen_settings(module, calls[0])
    tried = candidates(module, chosen)

    def under(settings: Any, call: Callable[[], Any]) -> Any:
        with standing_in(module, lambda *_, **__: settings):
            return call()

    def measured(settings: Any) -> tuple[float, str]:
        try:
            wrong = under(settings, lambda: difference(op, outputs(op, kernel, case.make("cuda")), expected))
            return under(settings, lambda: gpu_timer.median_ms(calls)), wrong or ""
        except Exception as error:  # too much shared memory, a layout that the compiler has not: part of the answer
            return float("inf"), f"{type(error).__name__}: {str(error)[:80]}"

    compile_ahead([partial(under, settings, calls[0]) for settings in tried])
    results = sorted((*measured(settings), index) for index, settings in enumerate(tried))
    lines = [f"{op.name}, {case.name}: {len(tried)} settings"]
    lines += [f"{'*' if index == 0 else ' '} {ms * 1e3:9.1f} µs  {tried[index]} {note}" for ms, note, index in results]
    return "\n".join(lines)


def candidates(module: ModuleType, chosen: Any) -> list[Any]:
    """The chosen settings and those to try beside them."""
    home = sys.modules.get(module.config.__module__, module)
    listed = list(getattr(home, "CANDIDATES", ())) or list(_neighbours(chosen))
    return list(dict.fromkeys([chosen, *listed]))


def _neighbours(chosen: Any) -> Iterator[Any]:
    changes = [
        (name, value)
        for name, number in chosen._asdict().items()
        if isinstance(number, int) and not isinstance(number, bool)
        for value in ((number - 1, number + 1) if "stages" in name else (number // 2, number * 2))
        if value > 0
    ]
    for i, (name, value) in enumerate(changes):
        yield chosen._replace(**{name: value})
        for other, second in changes[i + 1 :]:
            if other != name:
                yield chosen._replace(**{name: value, other: second})


def chosen_settings(module: ModuleType, launch: Callable[[], Any]) -> Any:
    """What config gives for this launch, which is made."""
    if not hasattr(module, "config"):
        raise SystemExit(f"op_sweep: {module.__name__} has no function config; give it one that its launch calls.")
    given: list[Any] = []
    original = module.config

    def remembered(*args: Any, **kwargs: Any) -> Any:
        given.append(original(*args, **kwargs))
        return given[-1]

    with standing_in(module, remembered):
        launch()
    return given[0]


@contextmanager
def standing_in(module: ModuleType, config: Callable[..., Any]) -> Iterator[None]:
    """The module's config replaced."""
    before = module.config
    vars(module)["config"] = config
    try:
        yield
    finally:
        vars(module)["config"] = before
