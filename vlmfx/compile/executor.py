"""Executors: what runs a model's programs. One runs them as they are; one has each made for the buckets of a plan.

Both take inputs that are on the host, or in part on the device already, as the ids of the step before and features are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vlmfx.compile.buckets import Plan
from vlmfx.compile.layout import CacheLayout, empty_cache
from vlmfx.compile.programs import ProgramSet, Step, choose
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
    """layout: of the paged cache; None where a sequence is one block. plan: None where nothing is padded."""

    @property
    def plan(self) -> Plan | None: ...

    @property
    def layout(self) -> CacheLayout | None: ...

    def alone(self) -> AbstractContextManager[None]:
        """Held while a caller uses the cache."""

    def bucket(self, program: str, size: int, count: int = 1) -> int | None:
        """What a step of `size` in `count` sequences or segments is padded to, None for nothing. Raises PlanError."""

    def cache(self, num_rows: int, length: int) -> Cache:
        """Room for num_rows sequences of at most `length` tokens."""

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

    layout = None

    def __init__(self, programs: ProgramSet, params: Tree, plan: Plan | None = None) -> None:
        self.programs, self.params, self.plan = programs, params, plan

    def alone(self) -> AbstractContextManager[None]:
        return nullcontext()

    def bucket(self, program: str, size: int, count: int = 1) -> int | None:
        return None if self.plan is None else self.plan.bucket(program, size)

    def cache(self, num_rows: int, length: int) -> Cache:
        f = self.programs
        return empty_cache(f.config.text, num_rows, length, dtype=f.dtype, device=f.device)

    def encode(self, inputs: VisionInputs) -> Tensor:
        return self._run("encode", inputs)

    def step(self, inputs: Step, cache: Cache) -> tuple[Tensor, Tensor]:
        return self._run("prefill", inputs, cache)

    def pool(self, inputs: Step) -> Tensor:
        return self._run("pool", inputs)

    def memory(self) -> ExecutorMemory:
        return ExecutorMemory(0, 0, 0)

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
        self._lock = Lock()
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

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One caller at a time: there is one cache, whose rows a second one would take from the first. Raises PlanError."""
        if not self._lock.acquire(blocking=False):
            raise PlanError(
                "cache: the LLM is answering already, and its programs have one cache; wait for that call, or use another LLM."
            )
        try:
            yield
        finally:
            self._lock.release()

    def _count(self, program: str, size: int) -> int:
        """Segments of an encode bucket, sequences of another."""
        return {"encode": self.plan.max_segments, "decode": size}.get(program, self.plan.max_seqs)

    @cached_property
    def _cache(self) -> Cache:
        f, layout = self.programs, self.layout
        return empty_cache(f.config.text, layout.num_blocks, layout.block_size, dtype=f.dtype, device=f.device)

    def cache(self, num_rows: int, length: int) -> Cache:
        """The one cache, made when first asked for. Raises PlanError where it has not the room."""
        if num_rows > self.layout.num_rows or length > self.layout.max_len:
            raise PlanError(
                f"cache: {num_rows} sequences of {length} tokens need room, but there is room for {self.layout.num_rows} of "
                f"{self.layout.max_len}; lower max_num_seqs or max_model_len."
            )
        return self._cache

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
        cache = sum(t.nbytes for t in leaves(self._cache)) if "_cache" in self.__dict__ else 0
        return ExecutorMemory(len(self._made), cache, self._program_bytes)

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


def moved(inputs: Tree, device: torch.device) -> Any:
    """The tensors of a tree on a device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, inputs)


def _reserved(device: torch.device) -> int:
    """Bytes that torch's allocator holds on a GPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
