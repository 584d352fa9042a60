"""Bundle: a folder with a model's programs compiled ahead of time, and what else it takes to run them.

A bundle is code: loading it runs it. It is read from a local folder only, never from a hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from vlmfx.compile import package
from vlmfx.compile.buckets import Plan
from vlmfx.compile.compiled import Compiled
from vlmfx.compile.host import Host
from vlmfx.compile.layout import CacheLayout
from vlmfx.errors import CheckpointError, InvalidRequest, reason_of, shown
from vlmfx.folder import MANIFEST

PROGRAMS = "programs"  # the folder in it of packages
FORMAT = 1
CHUNK = 1 << 20
AGAIN = "export it again"
_PROCESSOR_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*/config.json")  # the last: 1_Pooling's
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What bundle.json says. programs: "decode-8" → the name of its package in the folder. kernels: the folder in it of
    Triton's, "" for none. hashes: file → sha256, of these and of the processor's files. weights: the folder with the checkpoint's
    weights, and weight_sizes its files' bytes."""

    folder: Path
    vlmfx: str
    model: str
    task: str
    dtype: str
    host: Host
    plan: Plan
    layout: CacheLayout
    max_model_len: int
    weights: Path
    programs: Mapping[str, str] = field(default_factory=dict)
    kernels: str = ""
    hashes: Mapping[str, str] = field(default_factory=dict)
    weight_sizes: Mapping[str, int] = field(default_factory=dict)

    def program(self, name: str, size: int) -> Compiled:
        """The program of a bucket. Raises CompileError for a package that cannot be loaded."""
        return package.load(self.folder / self.programs[program_name(name, size)])

    def write(self) -> None:
        """Write bundle.json, whole or not at all: a folder without one is no bundle. Raises OSError."""
        value = {"format": FORMAT, **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "folder"}}
        inside = self.weights == self.folder
        value |= {
            "host": asdict(self.host),
            "plan": self.plan.as_dict(),
            "layout": asdict(self.layout),
            "weights": "." if inside else str(self.weights),
        }
        part = self.folder / f"{MANIFEST}.{os.getpid()}.part"
        part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.folder / MANIFEST)


def program_name(name: str, size: int) -> str:
    return f"{name}-{size}"


def processor_files(folder: Path) -> list[str]:
    """The names of the files beside the weights that are read when a model folder is loaded, or may be."""
    found = (p for pattern in _PROCESSOR_FILES for p in folder.glob(pattern) if p.is_file())
    names = {p.relative_to(folder).as_posix() for p in found}
    return sorted(name for name in names if name != MANIFEST and not name.endswith(_INDEX))


def weight_files(folder: Path) -> list[str]:
    """The names of a folder's weights and of their index."""
    return sorted(p.name for pattern in ("*.safetensors", f"*{_INDEX}") for p in folder.glob(pattern))


def kernel_files(folder: Path, kernels: str) -> list[str]:
    """The names of the files in a bundle's folder of kernels, and of links to other folders; none without one."""
    found = (folder / kernels).rglob("*") if kernels else ()
    return sorted(p.relative_to(folder).as_posix() for p in found if p.is_symlink() or not p.is_dir())


def listed_files(folder: Path) -> set[str]:
    """The files of a folder that its bundle.json lists, packages and weights among them; none where there is no such file."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {*found["hashes"], *(found["weight_sizes"] if found["weights"] == "." else ())}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def read(folder: Path) -> Bundle:
    """The bundle in a folder, every file of it checked, for this machine. Raises CheckpointError."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise CheckpointError(
                f"{folder}: {MANIFEST} has format {shown(found['format'])}, expected {FORMAT}; {AGAIN} with this vlmfx."
            )
        host = found["host"] | {key: tuple(found["host"][key]) for key in ("capability", "flags")}
        bundle = Bundle(
            folder=folder,
            host=Host(**host),
            plan=Plan.from_dict(found["plan"]),
            layout=CacheLayout(**found["layout"]),
            weights=folder if found["weights"] == "." else Path(found["weights"]),
            **{
                key: found[key]
                for key in (
                    "vlmfx",
                    "model",
                    "task",
                    "dtype",
                    "max_model_len",
                    "programs",
                    "kernels",
                    "hashes",
                    "weight_sizes",
                )
            },
        )
        if not all(isinstance(d, dict) for d in (bundle.programs, bundle.hashes, bundle.weight_sizes)):
            raise ValueError("its lists of files are no objects")
        if not re.fullmatch(r"(kernels-[0-9a-f]{12})?", bundle.kernels):
            raise ValueError("its kernels lie elsewhere")
        for name in (*bundle.hashes, *bundle.weight_sizes):
            if Path(name).is_absolute() or ".." in Path(name).parts or not name.isprintable():
                raise ValueError("it names a file that lies elsewhere")
        if "config.json" not in bundle.hashes:
            raise ValueError("it does not know its config.json")
        names = {program_name(program, size) for program in bundle.plan.programs for size in bundle.plan.rungs(program)}
        if names != {*bundle.programs} or not {*bundle.programs.values()} <= {*bundle.hashes}:
            raise ValueError("its programs are not those of its plan")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} cannot be read ({reason_of(error)}); {AGAIN}.") from None
    reason = bundle.host.refusal()
    if reason is not None:
        raise CheckpointError(f"{folder}: {reason}; {AGAIN} here.")
    _check_listed(bundle)
    for name, expected in bundle.hashes.items():
        _check_file(folder, name, expected)
    _check_weights(bundle)
    return bundle


def check_options(
    bundle: Bundle,
    *,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    task: str,
    max_model_len: int | None,
) -> None:
    """Raise CheckpointError, or InvalidRequest, for options that ask for another program than the bundle has."""
    most = bundle.max_model_len
    if isinstance(max_model_len, int) and max_model_len > most:
        raise InvalidRequest(
            "max_model_len",
            f"it is {max_model_len}, expected at most {most}, as long as sequences of the bundle get; leave it out, or export for that.",
            found=max_model_len,
            expected=most,
        )
    asked = {
        "dtype": (str(dtype).removeprefix("torch."), bundle.dtype),
        "device": (str(device).split(":")[0], bundle.host.device),
        "task": (task, bundle.task),
    }
    for option, (found, expected) in asked.items():
        if found not in ("None", "auto", expected):
            raise CheckpointError(
                f'{bundle.folder}: the bundle was exported for {option} "{expected}" but {option} is "{found}"; leave it out, or '
                "export the model for that."
            )


def _check_listed(bundle: Bundle) -> None:
    """Whether bundle.json lists all that would be read of the folder."""
    folder = bundle.folder
    found = {*processor_files(folder), *kernel_files(folder, bundle.kernels)}
    if bundle.weights == folder:
        found |= {*weight_files(folder)}
    strange = sorted(found - {*bundle.hashes, *bundle.weight_sizes})
    if strange:
        raise CheckpointError(
            f"{folder}: {strange[0]} is not listed in {MANIFEST}; delete it, or put it into the model's folder and {AGAIN}."
        )


def _check_file(folder: Path, name: str, expected: str) -> None:
    try:
        found = sha256(folder / name)
    except OSError as error:
        raise CheckpointError(f"{folder}: {name} cannot be read ({reason_of(error)}); {AGAIN}.") from None
    if found != expected:
        raise CheckpointError(f"{folder}: {name} was altered or cut since the export; {AGAIN}.")


def _check_weights(bundle: Bundle) -> None:
    """Whether the weights are those of the export, by their sizes and, where they lie elsewhere, the config.json beside them."""
    for name, size in bundle.weight_sizes.items():
        path = bundle.weights / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "is gone" if found is None else f"has {found} bytes, expected {size}"
            raise CheckpointError(
                f"{bundle.folder}: its weights are in {bundle.weights}, where {name} {what}; put it back, or {AGAIN} with copied weights."
            )
    if bundle.weights != bundle.folder:
        _check_file(bundle.weights, "config.json", bundle.hashes["config.json"])


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
