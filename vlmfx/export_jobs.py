"""The processes of an export: each compiles programs, one after another, and on a GPU one gathers the kernels of all."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

import torch

from vlmfx import checkpoint
from vlmfx.checkpoint import Blueprint, Task
from vlmfx.compile.abstract import as_meta
from vlmfx.compile.buckets import Plan
from vlmfx.compile.bundle import program_name
from vlmfx.compile.host import Host
from vlmfx.compile.inputs import bucket_inputs
from vlmfx.compile.kernels import gathered
from vlmfx.compile.layout import CacheLayout, empty_cache
from vlmfx.compile.memory import available_bytes
from vlmfx.compile.package import load
from vlmfx.compile.programs import Sampling, choose
from vlmfx.compile.stages import jit
from vlmfx.device import num_cores
from vlmfx.errors import CompileError, VlmfxError, reason_of
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.ops.token_logprobs import token_logprobs
from vlmfx.processing.prompt import example_vision
from vlmfx.tree import Tree, tree_map

JOB_BYTES = 2 << 30  # memory that a compiling process takes


@dataclass(frozen=True, kw_only=True)
class Job:
    """One program to compile, as another process gets it; file: the package's path."""

    model: str
    dtype: str
    device: str
    task: Task
    march: str
    max_model_len: int
    plan: Plan
    layout: CacheLayout
    name: str
    size: int
    file: str

    @property
    def has_cache(self) -> bool:
        return self.name in ("prefill", "decode")


def compiled(todo: Sequence[Job], num_jobs: int | None = None) -> Iterator[Job]:
    """The jobs as they are done, in so many processes at once. Raises CompileError; an interrupt ends the processes."""
    with _processes(min(num_jobs or _default_jobs(), max(len(todo), 1))) as pool:
        futures = {pool.submit(compile_job, job): job for job in todo}
        for future in as_completed(futures):
            future.result()
            yield futures[future]


def gather_kernels(jobs: Sequence[Job], folder: Path) -> None:
    """Run each program once on the GPU, in another process, with Triton compiling into the folder."""
    with _processes(1) as pool:
        pool.submit(run_all, jobs, folder).result()


class _Spawn(SpawnContext):
    """Processes that start anew, and a list of those that it made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        self.made.append(SpawnProcess(*args, **kwargs))
        return self.made[-1]


@contextmanager
def _processes(num: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes for jobs; an error within the block ends them. Raises CompileError where one of them ends by itself."""
    context = _Spawn()
    try:
        with ProcessPoolExecutor(num, mp_context=context, initializer=_quiet) as pool:
            try:
                yield pool
            except BaseException:
                for process in context.made:
                    if process.is_alive():
                        process.terminate()
                pool.shutdown(cancel_futures=True)  # which waits, so that they are gone and have exit codes
                raise
    except BrokenProcessPool:
        raise CompileError(_why_ended(context.made)) from None


def _why_ended(processes: Sequence[SpawnProcess]) -> str:
    """A job's own errors come back as such, so Python ends a process only where it cannot begin; all else is a signal."""
    if any(process.exitcode is not None and process.exitcode >= 0 for process in processes):
        return (
            "export: the compiling processes could not start, most likely because each first runs the calling script, which has its "
            'export outside of `if __name__ == "__main__":`; put it there.'
        )
    return "export: a compiling process was ended from outside, for want of memory most likely; run it again with fewer jobs."


def _quiet() -> None:
    """What torch warns itself of is no matter of the user's."""
    warnings.filterwarnings("ignore", module=r"torch\.|copyreg")
    torch.set_num_threads(1)


def _default_jobs() -> int:
    return max(1, min(len(os.sched_getaffinity(0)), available_bytes() // JOB_BYTES))


def compile_job(job: Job) -> None:
    """Compile one program and write its package."""
    programs, device, (bound, inputs) = opened(job)[0].programs, torch.device(job.device), arguments(job)
    try:
        lowered = jit(programs.program(job.name), donate=(1,) if job.has_cache else ()).lower(
            *bound, as_meta(inputs), device=device
        )
        lowered.compile("aot", **Host.of(device, job.march).inductor_options).save(job.file)
    except VlmfxError:
        raise
    except Exception as error:
        full = "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
        remedy = "make room on the disk and run it again" if full else "please report it with this message"
        what = program_name(job.name, job.size)
        raise CompileError(f"{what}: it could not be compiled ({reason_of(error)}); {remedy}.") from None


@torch.no_grad()
def run_all(jobs: Sequence[Job], folder: Path) -> None:
    """Run each program once on zeros, and what draws tokens behind it, with Triton compiling into the folder."""
    device = torch.device(jobs[0].device)

    def zeros(leaf: object) -> object:
        return torch.zeros(leaf.shape, dtype=leaf.dtype, device=device) if isinstance(leaf, torch.Tensor) else leaf

    def copied(leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device).copy_(leaf)

    with gathered(folder):
        params = tree_map(zeros, opened(jobs[0])[0].params)
        for job in jobs:
            (_, *cache), inputs = arguments(job)
            result = load(job.file)(params, *tree_map(zeros, cache), tree_map(copied, inputs))
            if job.has_cache:
                ids, logits = result
                for sampling in _samplings(len(ids), device):
                    choose(logits, sampling)
                token_logprobs(logits[:1], ids[:1], 5)
        torch.cuda.synchronize(device)


def _samplings(rows: int, device: torch.device) -> Iterator[Sampling]:
    """Plain and filtered drawing of so many rows."""

    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    for top_k, top_p, min_p in ((0, 1.0, 0.0), (20, 0.9, 0.05)):
        yield Sampling(
            temperature=full(1.0, torch.float32),
            top_k=full(top_k, torch.int32),
            top_p=full(top_p, torch.float32),
            min_p=full(min_p, torch.float32),
            seed=full(0, torch.int64),
            position=torch.zeros(rows, 2, dtype=torch.int64, device=device),
        )


def arguments(job: Job) -> tuple[list[Tree], Tree]:
    """Abstract parameters, and cache where the program has one; and its inputs on the host."""
    blueprint, example = opened(job)
    programs, device, layout = blueprint.programs, torch.device(job.device), job.layout
    inputs = bucket_inputs(
        programs, job.name, job.size, plan=job.plan, layout=layout, example=example, num_cores=num_cores(device)
    )
    bound = [blueprint.params]
    if job.has_cache:
        text, blocks = programs.config.text, (layout.num_blocks, layout.block_size)
        bound.append(empty_cache(text, *blocks, dtype=programs.dtype, device="meta"))
    return bound, inputs


def opened(job: Job) -> tuple[Blueprint, VisionInputs]:
    """The model without weights, and the pixels of an image."""
    return _opened(job.model, job.dtype, job.device, job.task, job.max_model_len)


@lru_cache(maxsize=1)  # a process compiles several programs of one model
def _opened(model: str, dtype: str, device: str, task: Task, max_model_len: int) -> tuple[Blueprint, VisionInputs]:
    """The model without weights, and the pixels of an image; a process compiles several programs of one model."""
    blueprint = checkpoint.blueprint(
        model, dtype=dtype, device=torch.device(device), max_model_len=max_model_len, task=task
    )
    return blueprint, example_vision(blueprint.processor)
