"""export: a model folder to a bundle, each program of its plan compiled ahead of time in a process of its own."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from vlmfx import __version__, checkpoint
from vlmfx.checkpoint import Blueprint, Task
from vlmfx.compile.buckets import Plan, plan_for
from vlmfx.compile.bundle import (
    PROGRAMS,
    Bundle,
    kernel_files,
    listed_files,
    processor_files,
    program_name,
    sha256,
    weight_files,
)
from vlmfx.compile.host import Host
from vlmfx.compile.kernels import KERNELS
from vlmfx.compile.ladders import EMBED, GENERATE, MAX_PATCHES, default_plan
from vlmfx.compile.layout import CacheLayout
from vlmfx.compile.package import load
from vlmfx.device import resolve_device
from vlmfx.errors import CheckpointError, CompileError, InvalidRequest, VlmfxError, reason_of, shown
from vlmfx.export_jobs import Job, compiled, gather_kernels
from vlmfx.folder import is_bundle

MAX_NUM_SEQS = 16
MAX_LEN = 4096  # of the default plan, where the context is longer

# Of our code, what programs come from, and the inputs that they are made for.
_FOLDERS = ("models", "ops", "compile", "processing")
_MODULES = ("export_jobs.py", "tree.py", "weights.py")
_OURS = re.compile(rf"((encode|prefill|decode|pool)-\d+|{KERNELS})-[0-9a-f]{{12}}(\.pt2)?(\.\d+\.part)?")


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

    Raises CheckpointError, DeviceError, PlanError, InvalidRequest or CompileError; then `out` holds no new bundle. A folder with files
    that are no export's is an InvalidRequest, before anything is written."""
    for name, number in {"jobs": 1 if jobs is None else jobs, "max_num_seqs": max_num_seqs}.items():
        if type(number) is not int or number < 1:
            raise InvalidRequest(name, f"it is {shown(number)}; use a whole number of 1 or more.", found=number)
    kind, target, folder = checkpoint.resolve_task(task), resolve_device(device), Path(out)
    blueprint = checkpoint.blueprint(model, dtype=dtype, device=target, max_model_len=max_model_len, task=kind)
    source = blueprint.folder
    if is_bundle(source):
        raise CheckpointError(f"{source} is a bundle already; export the model that it is of.")
    length = max_model_len or min(blueprint.processor.max_model_len, MAX_LEN)
    host = Host.of(target, march)
    _check_cache_folder()
    bundle = Bundle(
        folder=folder,
        vlmfx=__version__,
        model=str(model),
        task=kind,
        dtype=str(blueprint.programs.dtype).removeprefix("torch."),
        host=host,
        plan=_plan(plan, blueprint, kind, max_num_seqs, length),
        layout=CacheLayout.of(max_num_seqs if kind == "generate" else 1, length),
        max_model_len=length,
        weights=folder if copy_weights else source.resolve(),
    )
    with _writing(folder):
        files, weights = processor_files(source), weight_files(source)
        stale = _stale_files(folder, {*files, *weights})
        (folder / PROGRAMS).mkdir(parents=True, exist_ok=True)
        for name in stale:
            (folder / name).unlink()
        for name in files:
            _copy(source / name, folder / name)
        stamp = _stamp(bundle, blueprint)
        work = _jobs(bundle, source, kind, target, stamp)
        todo = [job for job in work if not _is_whole(Path(job.file))]
        bar = tqdm(total=len(work), initial=len(work) - len(todo), desc="export", unit="program", disable=not use_tqdm)
        with bar:
            for job in compiled(todo, jobs):
                bar.set_postfix_str(program_name(job.name, job.size), refresh=False)
                bar.update()
        kernels = ""
        if target.type == "cuda":
            kernels = f"{KERNELS}-{_digest(stamp, bundle.plan.to_json())}"
            if not (folder / kernels).is_dir():
                part = folder / f"{kernels}.{os.getpid()}.part"
                gather_kernels(work, part)
                os.replace(part, folder / kernels)
            files += kernel_files(folder, kernels)
        if copy_weights:
            for name in tqdm(weights, desc="weights", unit="file", disable=not use_tqdm):
                _copy(source / name, folder / name)
        packages = {program_name(j.name, j.size): f"{PROGRAMS}/{Path(j.file).name}" for j in work}
        bundle = replace(
            bundle,
            programs=packages,
            kernels=kernels,
            hashes={name: sha256(folder / name) for name in (*files, *packages.values())},
            weight_sizes={name: (source / name).stat().st_size for name in weights},
        )
        bundle.write()
        _remove_others(bundle)
    return bundle


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """A disk that fails is one sentence."""
    try:
        yield
    except OSError as error:
        raise CompileError(
            f"{folder}: the bundle cannot be written ({reason_of(error)}); choose a place with room that is writable and run it again, "
            "which goes on from what is there."
        ) from None


def _stale_files(folder: Path, wanted: set[str]) -> list[str]:
    """The files in the folder that an earlier export wrote and that would be read with a bundle, but are not wanted by this one.

    Raises InvalidRequest for a folder that holds what is not an export's: it would be overwritten, or read with the bundle."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return []
    listed = listed_files(folder)
    if not listed and not _is_begun(folder):
        raise InvalidRequest(
            "out", f"{folder} has files that no export wrote and one could overwrite; choose a new or an empty folder."
        )
    others = {*processor_files(folder), *weight_files(folder)} - wanted
    strange = sorted(others - listed)
    if strange:
        raise InvalidRequest(
            "out",
            f"{folder} has {strange[0]}, which the model has not and a bundle would read; delete it, or choose another folder.",
        )
    return sorted(others)


def _is_begun(folder: Path) -> bool:
    """Whether an export has written to the folder: it first makes one for packages."""
    programs = folder / PROGRAMS
    if not programs.is_dir():
        return False
    names = [path.name for path in programs.iterdir()]
    return not names or any(map(_OURS.fullmatch, names))


def _jobs(bundle: Bundle, source: Path, task: Task, device: torch.device, stamp: str) -> list[Job]:
    """A job a program, those that take longest first."""
    plan, programs = bundle.plan, bundle.folder / PROGRAMS
    return [
        Job(
            model=str(source),
            dtype=bundle.dtype,
            device=str(device),
            task=task,
            march=bundle.host.march,
            max_model_len=bundle.max_model_len,
            plan=plan,
            layout=bundle.layout,
            name=name,
            size=size,
            file=str(programs / f"{program_name(name, size)}-{_digest(stamp, name, str(size))}.pt2"),
        )
        for name in plan.programs
        for size in reversed(plan.rungs(name))
    ]


def _remove_others(bundle: Bundle) -> None:
    """What earlier exports to the folder left and this one does not use."""
    used = {*bundle.programs.values(), bundle.kernels}
    for path in [*(bundle.folder / PROGRAMS).iterdir(), *bundle.folder.glob(f"{KERNELS}-*")]:
        if _OURS.fullmatch(path.name) and path.relative_to(bundle.folder).as_posix() not in used:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _plan(given: Plan | str | Path | None, blueprint: Blueprint, task: str, max_num_seqs: int, length: int) -> Plan:
    """The plan given, which must have rungs for the task's programs; by default one up to what the cache has room for."""
    wanted = GENERATE if task == "generate" else EMBED
    if given is None:
        return default_plan(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=min(8192, max_num_seqs * length),
            max_patches=MAX_PATCHES.get(blueprint.programs.device.type, MAX_PATCHES["cuda"]),
            patch_multiple=blueprint.programs.config.vision.patch_multiple,
            programs=wanted,
        )
    return plan_for(given, wanted, blueprint.programs.config.vision.patch_multiple)


def _stamp(bundle: Bundle, blueprint: Blueprint) -> str:
    """What a package depends on besides its program and size: our own code, and of the model what says how it computes, which its
    tokenizer and chat template do not."""
    package = Path(__file__).parent
    sources = [p for part in _FOLDERS for p in sorted((package / part).rglob("*.py"))] + [package / m for m in _MODULES]
    code = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()
    config = sha256(blueprint.folder / "config.json"), checkpoint.read_preprocessor(blueprint.folder)
    maxima = bundle.plan.max_segments, bundle.plan.max_seqs
    pooling = blueprint.programs.pooling
    return repr((code, config, pooling, bundle.host, bundle.task, bundle.dtype, bundle.layout, maxima))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _is_whole(file: Path) -> bool:
    """Whether a package is there that can be loaded."""
    if not file.exists():
        return False
    try:
        load(file)
    except VlmfxError:
        return False
    return True


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

    try:
        probe = Path(cache_dir()) / f"vlmfx.{os.getpid()}.part"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise CompileError(
            f"export: the compilers' cache cannot be written ({reason_of(error)}); set TORCHINDUCTOR_CACHE_DIR to a folder that can."
        ) from None
