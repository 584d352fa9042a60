"""CompileCounter: how often something was compiled. A server that is warm compiles nothing, and this shows it."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

DYNAMO = "torch._dynamo.utils"
TRITON = "triton.knobs"


class Compiles(NamedTuple):
    """Graphs that Dynamo traced, graphs that Inductor compiled or took from its cache on disk, kernels that Triton compiled."""

    dynamo: int
    inductor: int
    triton: int


class CompileCounter:
    """Counts compilations in this process from its creation on, or of a `with` block; it imports no compiler.

    A kernel that Triton finds in its cache on disk is not compiled."""

    def __init__(self) -> None:
        _watch_triton()
        self._start = _so_far()
        self._end: Compiles | None = None

    @property
    def compiles(self) -> Compiles:
        """Since the start, or between start and end of the `with` block."""
        end = self._end or _so_far()
        return Compiles(*(b - a for a, b in zip(self._start, end, strict=True)))

    @property
    def total(self) -> int:
        """All kinds together: 0 when nothing was compiled."""
        return sum(self.compiles)

    def __enter__(self) -> CompileCounter:
        self._start, self._end = _so_far(), None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end = _so_far()


def _so_far() -> Compiles:
    """The process's own counts: a compiler that is not imported has compiled nothing."""
    utils: Any = sys.modules.get(DYNAMO)
    if utils is None or not hasattr(utils, "compilation_time_metrics"):  # or is half imported
        return Compiles(0, 0, _Triton.compiles)
    # Inductor's counter of graphs knows nothing of ahead-of-time programs; the record of its times has an entry for every graph.
    graphs = len(utils.compilation_time_metrics.get("compile_fx_inner", ()))
    cached = utils.counters["aot_autograd"]["autograd_cache_hit"]  # whole programs, taken before Inductor is asked
    return Compiles(utils.counters["stats"]["unique_graphs"], graphs + cached, _Triton.compiles)


class _Triton:
    """Triton keeps no count: it tells a listener of each kernel, which must be there before."""

    compiles = 0
    is_watched = False


def _watch_triton() -> None:
    """Set the hook, now or as soon as Triton is imported."""
    if not _Triton.is_watched:
        _Triton.is_watched = True
        if TRITON in sys.modules:
            _set_hook(sys.modules[TRITON])
        else:
            sys.meta_path.insert(0, _AtImport())


class _AtImport(MetaPathFinder):
    """Finds triton.knobs as the others do, and has its import set the hook."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TRITON:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _set_hook(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _set_hook(knobs: Any) -> None:
    before = knobs.compilation.listener

    def count(*, cache_hit: bool, **kernel: Any) -> None:
        _Triton.compiles += not cache_hit
        if before is not None:
            before(cache_hit=cache_hit, **kernel)

    knobs.compilation.listener = count
