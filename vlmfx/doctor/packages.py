"""vlmfx itself, and the packages that it uses."""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmfx import __version__
from vlmfx.doctor.check import Check, Status

ROOT = Path(__file__).resolve().parents[2]
# What a package is for; a package that pyproject.toml does not name is told to be installed by its name.
USES = {
    "torch": "all compute",
    "numpy": "pixels",
    "safetensors": "weights",
    "tokenizers": "token ids",
    "transformers": "old tokenizer files, and `vlmfx verify --against transformers`",
    "huggingface_hub": "downloads by hub id",
    "jinja2": "chat templates",
    "tqdm": "progress bars",
    "pillow": "images",
    "av": "video files",
    "fastapi": "the server",
    "uvicorn": "the server",
    "httpx": "the server",
    "orjson": "the server",
    "prometheus-client": "the server's metrics",
    "triton": "kernels for CUDA",
    "llguidance": "structured output",
    "hypothesis": "the tests",
}


def own() -> Iterator[Check]:
    """vlmfx's version, and in a checkout its commit."""
    state = ""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
        state = f", commit {said.replace('-dirty', ' with changes')}" if said else ""
    yield Check(name="vlmfx", status="ok", found=f"{__version__}{state}")


def packages() -> Iterator[Check]:
    """Presence of each package, its version, whether that is in the range of pyproject.toml, and the extra that brings it."""
    ranges = _ranges()
    for name in {**USES, **ranges}:
        extra, specifier = ranges.get(name, (None, None))
        if extra == "dev" and name not in USES:
            continue  # the tools of a checkout; `make` sees to them
        install = f"pip install 'vlmfx[{extra}]'" if extra else f"pip install {name}"
        use, version = USES.get(name, f"the extra {extra}" if extra else "vlmfx"), version_of(name)
        if version is None:
            is_needed = extra == ""
            todo = f"{'pip install vlmfx again' if is_needed else install} for {use}"
            yield Check(name=name, status="broken" if is_needed else "absent", found="not installed", todo=todo)
        elif specifier is not None and not specifier.contains(version, prereleases=True):
            todo = "`make test` wants that one" if extra == "dev" else f"pip install '{name}{specifier}'"
            status: Status = "absent" if extra else "broken"
            yield Check(name=name, status=status, found=f"{version}, expected {specifier}", todo=todo)
        else:
            told = f" ({specifier})" if specifier is not None and str(specifier) else ""
            yield Check(name=name, status="ok", found=f"{version}{told}, for {use}")


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ranges() -> dict[str, tuple[str, Any]]:
    """Package → (the extra that brings it, "" for a plain dependency; its range), from the installed metadata, else nothing."""
    try:
        requirement = importlib.import_module("packaging.requirements").Requirement
        lines: Sequence[str] = importlib.metadata.requires("vlmfx") or ()
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return {}
    ranges: dict[str, tuple[str, Any]] = {}
    for parsed in map(requirement, lines):
        extra = _extra_of(str(parsed.marker or ""))
        if parsed.name not in ranges or not extra:
            ranges[parsed.name] = (extra, parsed.specifier)
    return ranges


def _extra_of(marker: str) -> str:
    """The extra in a marker such as 'extra == "video"'."""
    _, found, rest = marker.partition("extra == ")
    return rest.strip("\"'").split('"')[0].split("'")[0] if found else ""
