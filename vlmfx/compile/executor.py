"""Executors: what runs a model's programs. One runs them as they are; one has each made for the buckets of a plan.

Both take inputs that are on the host, or in part on the device already, as the ids of the step before and features are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vlmfx.compile.buckets import Plan
from vlmfx.compile.layout import CacheLayout, empty_cache
from vlmfx.compile.programs import ProgramSet, Step, choose
from vlmfx.device import accelerator
from vlmfx.errors import PlanError
from vlmfx.models.layers import Cache
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.tree import Tree, leaves, tree_map

log = logging.getLogger("vlmfx")


class ExecutorMemory(NamedTuple):
    """Programs that are made, and bytes: of the cache, and what making programs has reserved on the device beyond it."""

    num_programs: int
    cache: int
    programs: int


class Executor(Protocol):
    """layout: of the paged cache, None where there is none. plan: None where nothing is padded."""

    @property
    def plan(self) -> Plan | None: ...

    @property
    def layout(self) -> CacheLayout | None: ...

    def bucket(self, program: str, size: int, count: int = 1) -> int | None:
        """What a step of `size` in `count` sequences or segments is padded to, None for nothing. Raises PlanError."""

    def largest(self, program: str) -> int | None:
        """The size of the largest step that may be asked for, None where there is no limit."""

    @property
    def cache(self) -> Cache:
        """The one cache, made when first asked for."""

    def encode(self, inputs: VisionInputs) -> Tensor:
        """As `programs.encode`."""

    def step(self, inputs: Step, cache: Cache) -> tuple[Tensor, Tensor]:
        """As `programs.step`."""

    def pool(self, inputs: Step) -> Tensor:
        """As `programs.pool`."""

    def memory(self) -> ExecutorMemory:
        """What it holds."""


class EagerExecutor:
    """The functions themselves. With a plan inputs are padded all the same, which changes no output."""

    def __init__(
        self, programs: ProgramSet, params: Tree, plan: Plan | None = None, layout: CacheLayout | None = None
    ) -> None:
        self.programs, self.params, self.plan, self.layout = programs, params, plan, layout

    def bucket(self, program: str, size: int, count: int = 1) -> int | None:
        return None if self.plan is None else self.plan.bucket(program, size)

    def largest(self, program: str) -> int | None:
        return None

    @cached_property
    def cache(self) -> Cache:
        return _empty_cache(self.programs, self.layout)

    def encode(self, inputs: VisionInputs) -> Tensor:
        return self._run("encode", inputs)

    def step(self, inputs: Step, cache: Cache) -> tuple[Tensor, Tensor]:
        return self._run("prefill", inputs, cache)

    def pool(self, inputs: Step) -> Tensor:
        return self._run("pool", inputs)

    def memory(self) -> ExecutorMemory:
        return ExecutorMemory(0, _cache_bytes(self), 0)

    def _run(self, name: str, inputs: Tree, *cache: Cache) -> Any:
        return self.programs.program(name)(self.params, *cache, moved(inputs, self.programs.device))


class Make(Protocol):
    """How a planned executor gets a program."""

    def __call__(self, name: str, size: int, fn: Callable[..., Tree], bound: tuple[Tree, ...], inputs: Tree) -> Run:
        """fn(*bound, inputs) made for the shapes of inputs, those of bucket `size`: compiled, captured or loaded."""


Run = Callable[[Any], Any]


class PlannedExecutor:
    """Programs of fixed shapes, each made when its bucket is first used, with the parameters and one cache bound to it.

    strict: a size beyond the plan is a PlanError; otherwise it runs as it is, uncompiled. chains_sampling: make takes greedy steps, and
    tokens are drawn by an op behind them. The outputs of a call may be overwritten by the next one of the same bucket."""

    def __init__(
        self,
        programs: ProgramSet,
        params: Tree,
        *,
        plan: Plan,
        layout: CacheLayout,
        make: Make,
        strict: bool = False,
        chains_sampling: bool = False,
    ) -> None:
        self.programs, self.params, self.plan, self.layout, self.make = programs, params, plan, layout, make
        self.strict, self.chains_sampling = strict, chains_sampling
        self._made: dict[tuple[str, int, bool], Run] = {}
        self._program_bytes = 0

    def bucket(self, program: str, size: int, count: int = 1) -> int | None:
        rungs = self.plan.rungs(program)
        most = self._count(program, size)
        is_beyond = not rungs or size > rungs[-1] or count > most
        if is_beyond and not self.strict:
            return None
        if count > most:
            what = "segments" if program == "encode" else "sequences"
            raise PlanError(f"{program}: a step has {count} {what}, expected at most {most} by the plan; send fewer.")
        return self.plan.bucket(program, size)

    def largest(self, program: str) -> int | None:
        rungs = self.plan.rungs(program) if self.strict else ()
        return rungs[-1] if rungs else None

    def _count(self, program: str, size: int) -> int:
        """Segments of an encode bucket, sequences of another."""
        return {"encode": self.plan.max_segments, "decode": size}.get(program, self.plan.max_seqs)

    @cached_property
    def cache(self) -> Cache:
        return _empty_cache(self.programs, self.layout)

    def encode(self, inputs: VisionInputs) -> Tensor:
        rows: Tensor = self._run("encode", len(inputs.position_ids), inputs.num_segments, inputs)
        return rows

    def step(self, inputs: Step, cache: Cache) -> tuple[Tensor, Tensor]:
        sampling = inputs.sampling
        if self.chains_sampling:
            inputs = replace(inputs, sampling=None)
        name = "prefill" if inputs.batch.context_lens is None else "decode"
        ids, logits = self._run(name, len(inputs.ids), inputs.num_seqs, inputs, cache)
        if self.chains_sampling and sampling is not None:
            return choose(logits, moved(sampling, logits.device))
        return ids, logits

    def pool(self, inputs: Step) -> Tensor:
        vectors: Tensor = self._run("pool", len(inputs.ids), inputs.num_seqs, inputs)
        return vectors

    def memory(self) -> ExecutorMemory:
        return ExecutorMemory(len(self._made), _cache_bytes(self), self._program_bytes)

    def _run(self, name: str, size: int, count: int, inputs: Tree, *cache: Cache) -> Any:
        if size not in self.plan.rungs(name) or count != self._count(name, size):  # beyond the plan, so not padded
            return self.programs.program(name)(self.params, *cache, moved(inputs, self.programs.device))
        key = (name, size, getattr(inputs, "sampling", None) is None)
        if key not in self._made:
            before = _reserved(self.programs.device)
            run = self.make(name, size, self.programs.program(name), (self.params, *cache), inputs)
            result = run(inputs)  # a graph is captured by its first call
            self._made[key] = run
            self._program_bytes += _reserved(self.programs.device) - before
            log.info("%s of %d is ready; programs have reserved %d MiB so far", name, size, self._program_bytes >> 20)
            return result
        return self._made[key](inputs)


def _empty_cache(programs: ProgramSet, layout: CacheLayout | None) -> Cache:
    assert layout is not None, "an executor without a layout has no cache"
    text, shape = programs.config.text, (layout.num_blocks, layout.block_size)
    return empty_cache(text, *shape, dtype=programs.dtype, device=programs.device)


def _cache_bytes(executor: Executor) -> int:
    """Of a cache that was made."""
    return sum(t.nbytes for t in leaves(executor.cache)) if "cache" in vars(executor) else 0


def moved(inputs: Tree, device: torch.device) -> Any:
    """The tensors of a tree on a device. To a GPU or MLU they go by way of pinned memory, for which nothing that runs there is waited."""
    is_apart = accelerator(device) is not None

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not is_apart or leaf.device.type != "cpu":
            return leaf.to(device)
        # Not by `pin_memory`, which until torch 2.7 is for CUDA unless it is told a device, and from then on warns of one.
        pinned = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=True).copy_(leaf)
        return pinned.to(device, non_blocking=True)

    return tree_map(move, inputs)


def _reserved(device: torch.device) -> int:
    """Bytes that torch's allocator holds on a GPU or MLU."""
    api = accelerator(device)
    return 0 if api is None else int(api.memory_reserved(device))
