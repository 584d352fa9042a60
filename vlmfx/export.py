"""export: a model folder to a bundle, each program of its plan compiled ahead of time in a process of its own."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from vlmfx import __version__, checkpoint
from vlmfx.checkpoint import Blueprint, Task
from vlmfx.compile.buckets import Plan, read_plan
from vlmfx.compile.bundle import MANIFEST, Bundle, program_name, sha256
from vlmfx.compile.host import Host
from vlmfx.compile.inputs import bucket_inputs
from vlmfx.compile.ladders import EMBED, GENERATE, default_plan
from vlmfx.compile.layout import CacheLayout, empty_cache
from vlmfx.compile.package import load
from vlmfx.compile.stages import jit
from vlmfx.device import resolve_device
from vlmfx.errors import CompileError, InvalidRequest, VlmfxError, reason_of, shown
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.processing.prompt import prepare
from vlmfx.tree import tree_map

MAX_NUM_SEQS = 16
MAX_PATCHES = {"cpu": 4096}  # of the default plan's largest encode
JOB_BYTES = 2 << 30  # memory that a compiling process takes
PROGRAMS = "programs"


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


def export(
    model: str | Path,
    out: str | Path,
    *,
    plan: Plan | str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = "auto",
    march: str = "native",
    task: str = "generate",
    max_model_len: int | None = None,
    max_num_seqs: int = MAX_NUM_SEQS,
    copy_weights: bool = False,
    jobs: int | None = None,
    use_tqdm: bool = True,
) -> Bundle:
    """Write the bundle of a model to the folder `out`: a package a program and bucket, the processor's files, bundle.json last.

    plan: a Plan, a file of one, or None for the default one. march: "native", this machine's processor, or "x86-64-v2", "-v3", "-v4".
    The bundle has a cache for max_num_seqs sequences of max_model_len tokens (the model's context, or where that is longer 4,096).
    copy_weights: puts the weights into the bundle, which otherwise names the folder they are in. jobs: processes at once. Packages of
    an earlier or interrupted export to the same folder are used where nothing changed.

    Raises CheckpointError, DeviceError, PlanError, InvalidRequest or CompileError; then `out` holds no new bundle."""
    kind, target, folder = checkpoint.resolve_task(task), resolve_device(device), Path(out)
    blueprint = checkpoint.blueprint(model, dtype=dtype, device=target, max_model_len=max_model_len, task=kind)
    length = max_model_len or min(blueprint.processor.max_model_len, 4096)
    chosen = _plan(plan, blueprint, kind, max_num_seqs, length)
    layout = CacheLayout.of(max_num_seqs if kind == "generate" else 1, length)
    host, dtype_name = Host.of(target, march), str(blueprint.programs.dtype).removeprefix("torch.")
    _check_cache_folder()
    source = blueprint.folder
    stamp = _stamp(blueprint, host, kind, chosen, layout, dtype_name)
    try:
        (folder / PROGRAMS).mkdir(parents=True, exist_ok=True)
        copied = _copy_files(source, folder)
        work = [
            Job(
                model=str(source), dtype=dtype_name, device=str(target), task=kind, march=march, max_model_len=length,
                plan=chosen, layout=layout, name=name, size=size,
                file=str(folder / PROGRAMS / f"{program_name(name, size)}-{_digest(stamp, name, size)}.pt2"),
            )
            for name in chosen.programs
            for size in reversed(chosen.rungs(name))  # those that take longest first
        ]  # fmt: skip
        todo = [job for job in work if not _is_whole(Path(job.file))]
        done = tqdm(
            _compiled(todo, jobs), initial=len(work) - len(todo), total=len(work), desc="export", unit="program", disable=not use_tqdm
        )  # fmt: skip
        for job in done:
            done.set_postfix_str(program_name(job.name, job.size))
        weight_files = sorted(path.name for path in source.glob("*.safetensors*"))
        if copy_weights:
            for name in tqdm(weight_files, desc="weights", unit="file", disable=not use_tqdm):
                _copy(source / name, folder / name)
        programs = {program_name(j.name, j.size): f"{PROGRAMS}/{Path(j.file).name}" for j in work}
        made = Bundle(
            folder=folder,
            vlmfx=__version__,
            model=str(model),
            task=kind,
            dtype=dtype_name,
            host=host,
            plan=chosen,
            layout=layout,
            programs=programs,
            hashes={name: sha256(folder / name) for name in (*copied, *programs.values())},
            weights=folder if copy_weights else source.resolve(),
            weight_sizes={name: (source / name).stat().st_size for name in weight_files},
        )
        made.write()
        for stale in {*(folder / PROGRAMS).glob("*.pt2*")} - {Path(job.file) for job in work}:
            stale.unlink()
    except OSError as error:
        raise CompileError(
            f"{folder}: the bundle cannot be written ({reason_of(error)}); choose a place with room that is writable and run it again, "
            "which goes on from what is there."
        ) from None
    return made


def _plan(given: Plan | str | Path | None, blueprint: Blueprint, task: str, max_num_seqs: int, length: int) -> Plan:
    """The plan given, which must have rungs for the task's programs; by default one up to what the cache has room for."""
    wanted = GENERATE if task == "generate" else EMBED
    if given is None:
        device = blueprint.programs.device.type
        return default_plan(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=min(8192, max_num_seqs * length),
            max_patches=MAX_PATCHES.get(device, 16384),
            patch_multiple=blueprint.programs.config.vision.patch_multiple,
            programs=wanted,
        )
    plan = given if isinstance(given, Plan) else read_plan(given)
    for name in wanted:
        if not plan.rungs(name):
            raise InvalidRequest(
                "plan", f'it has no rungs for {name}, which task "{task}" needs; use a plan with some.', found=0
            )
    multiple = blueprint.programs.config.vision.patch_multiple
    odd = [size for size in plan.encode if size % multiple]
    if odd:
        raise InvalidRequest(
            "plan",
            f"encode has a rung of {odd[0]} patches, expected multiples of {multiple}, as this model takes them; round it up.",
            found=odd[0],
            expected=multiple,
        )
    return plan


def _compiled(todo: Sequence[Job], jobs: int | None) -> Iterator[Job]:
    """The jobs as they are done. Raises CompileError; an interrupt ends the processes."""
    if not todo:
        return
    if jobs is not None and (type(jobs) is not int or jobs < 1):
        raise InvalidRequest("jobs", f"it is {shown(jobs)}; use a whole number of 1 or more.", found=jobs)
    num = min(jobs or _default_jobs(), len(todo))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num, mp_context=context) as pool:
        futures = {pool.submit(compile_job, job): job for job in todo}
        try:
            for future in as_completed(futures):
                try:
                    future.result()
                except BrokenProcessPool:
                    raise CompileError(
                        "export: a compiling process was ended from outside, for want of memory most likely; run it again with fewer jobs."
                    ) from None
                yield futures[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _default_jobs() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // JOB_BYTES))


def compile_job(job: Job) -> None:
    """Compile one program and write its package."""
    torch.set_num_threads(1)
    what = program_name(job.name, job.size)
    blueprint, example = _opened(job.model, job.dtype, job.device, job.task, job.max_model_len)
    programs, device = blueprint.programs, blueprint.programs.device
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else None
    inputs = bucket_inputs(
        programs, job.name, job.size, plan=job.plan, layout=job.layout, example=example, num_sms=num_sms
    )
    bound = [blueprint.params]
    if job.name in ("prefill", "decode"):
        cache = empty_cache(
            programs.config.text, job.layout.num_blocks, job.layout.block_size, dtype=programs.dtype, device="meta"
        )
        bound.append(cache)
    try:
        meta = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, inputs)
        lowered = jit(programs.program(job.name), donate=(1,) if len(bound) > 1 else ()).lower(
            *bound, meta, device=device
        )
        lowered.compile("aot", **Host.of(device, job.march).inductor_options).save(job.file)
    except VlmfxError:
        raise
    except Exception as error:
        full = "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
        remedy = "make room on the disk and run it again" if full else "please report it with this message"
        raise CompileError(f"{what}: it could not be compiled ({reason_of(error)}); {remedy}.") from None


@lru_cache(maxsize=1)
def _opened(model: str, dtype: str, device: str, task: Task, max_model_len: int) -> tuple[Blueprint, VisionInputs]:
    """The model without weights, and the pixels of an image; a process compiles several programs of one model."""
    blueprint = checkpoint.blueprint(
        model, dtype=dtype, device=torch.device(device), max_model_len=max_model_len, task=task
    )
    mark = blueprint.processor.functions.PLACEHOLDERS["image"].format(number=1)
    prompt = {"prompt": mark, "multi_modal_data": {"image": Image.new("RGB", (56, 56))}}
    example = prepare(blueprint.processor, prompt).vision
    assert example is not None
    return blueprint, example


def _stamp(blueprint: Blueprint, host: Host, task: str, plan: Plan, layout: CacheLayout, dtype: str) -> str:
    """What a package depends on besides its program and size: our own code among it."""
    package = Path(__file__).parent
    sources = sorted(p for part in ("models", "ops", "compile") for p in (package / part).rglob("*.py"))
    code = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()
    files = {name: sha256(blueprint.folder / name) for name in _processor_files(blueprint.folder)}
    maxima = plan.max_segments, plan.max_seqs
    return repr((code, files, host, task, maxima, layout, dtype, blueprint.programs.pooling))


def _digest(stamp: str, name: str, size: int) -> str:
    return hashlib.sha256(f"{stamp} {name} {size}".encode()).hexdigest()[:12]


def _is_whole(file: Path) -> bool:
    """Whether a package is there that can be loaded."""
    if not file.exists():
        return False
    try:
        load(file)
    except VlmfxError:
        return False
    return True


def _processor_files(folder: Path) -> list[str]:
    """The names of the files beside the weights that a model folder may need, one level down too."""
    names = ("*.json", "*.txt", "*.jinja", "*.model", "1_Pooling/*.json")
    found = (p.relative_to(folder).as_posix() for pattern in names for p in folder.glob(pattern))
    return sorted(n for n in found if n != MANIFEST and not n.endswith(".safetensors.index.json"))


def _copy_files(source: Path, folder: Path) -> list[str]:
    names = _processor_files(source)
    for name in names:
        _copy(source / name, folder / name)
    return names


def _copy(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all, unless it is there."""
    if target.exists() and target.stat().st_size == source.stat().st_size and sha256(target) == sha256(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        shutil.copyfile(source, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _check_cache_folder() -> None:
    """Raise CompileError where the compilers' folder for what they make cannot be written."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"vlmfx.{os.getpid()}.part"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise CompileError(
            f"export: the compilers' folder {folder} cannot be written ({reason_of(error)}); set TORCHINDUCTOR_CACHE_DIR to one that can."
        ) from None
