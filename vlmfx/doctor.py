"""What of vlmfx runs on this machine, what does not and why, and what to do about it: one line a check.

Nothing here raises and nothing is imported at the top that may be missing or broken: that is what it looks for."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vlmfx import __version__

Status = Literal["ok", "absent", "broken"]
PACKAGE = Path(__file__).resolve().parent
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


@dataclass(frozen=True, kw_only=True)
class Check:
    """status: "ok", "absent" (something optional that is not here, or not in a version that fits) or "broken".

    todo says what to do, and is empty for "ok"."""

    name: str
    status: Status
    found: str
    todo: str = ""

    def __str__(self) -> str:
        sign = {"ok": "ok    ", "absent": "–     ", "broken": "BROKEN"}[self.status]
        return f"{sign}  {self.name:<17}  {self.found}" + (f"; {self.todo}" if self.todo else "")


def examine(*, is_full: bool = False) -> list[Check]:
    """Every check in order; one that fails by itself is a broken line. is_full also answers a question with the shipped model."""
    found: list[Check] = []
    for check in (*CHECKS, *([answer] if is_full else [])):
        try:
            found.extend(check())
        except Exception as error:  # whatever a half-installed package raises
            found.append(_failed(check.__name__, error))
    return found


def main(*, is_full: bool = False, as_json: bool = False) -> int:
    """Print the checks; 1 when one is broken."""
    checks = examine(is_full=is_full)
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=1, ensure_ascii=False))
    else:
        counts = {status: sum(c.status == status for c in checks) for status in ("ok", "absent", "broken")}
        print("\n".join(map(str, checks)))
        print(f"\n{counts['ok']} ok, {counts['absent']} absent and optional, {counts['broken']} broken.")
    return int(any(check.status == "broken" for check in checks))


def machine() -> Iterator[Check]:
    """Python, the platform, its memory."""
    supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    yield Check(
        name="python",
        status="ok" if supported else "broken",
        found=f"{platform.python_version()} on {platform.platform()}",
        todo="" if supported else "use Python 3.10 to 3.13",
    )
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    yield Check(name="memory", status="ok", found=f"{pages * size / 2**30:.1f} GiB")


def own() -> Iterator[Check]:
    """vlmfx's version, and in a checkout its commit."""
    root, state = PACKAGE.parent, ""
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
        state = f", commit {said.replace('-dirty', ' with changes')}" if said else ""
    yield Check(name="vlmfx", status="ok", found=f"{__version__}{state}")


def torch_build() -> Iterator[Check]:
    """Whether torch imports, and what it was built for."""
    torch = importlib.import_module("torch")
    cuda = getattr(torch.version, "cuda", None)
    built = f"built for CUDA {cuda}" if cuda else "built for the CPU"
    yield Check(name="torch build", status="ok", found=f"{torch.__version__}, {built}")


def cpu() -> Iterator[Check]:
    """The CPU's capability, bfloat16, and a product."""
    torch = importlib.import_module("torch")
    name, flags = _cpu_info()
    capability = torch.backends.cpu.get_cpu_capability()
    fast = sorted({"amx_bf16", "avx512_bf16", "bf16"} & flags)
    bf16 = f"bfloat16 in hardware ({', '.join(fast)})" if fast else "no bfloat16 in hardware, float32 may be faster"
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    yield Check(name="cpu", status="ok", found=f"{name}, {capability}, {threads}, {bf16}")
    yield _product("cpu product", "cpu")


def cuda() -> Iterator[Check]:
    """Each GPU, and a product on it."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        built = getattr(torch.version, "cuda", None)
        reason = "torch sees no GPU or driver" if built else "this torch is built without CUDA"
        todo = "check nvidia-smi" if built else "install a CUDA build of torch where there is a GPU"
        yield Check(name="cuda", status="absent", found=reason, todo=todo)
        return
    for index in range(torch.cuda.device_count()):
        told = torch.cuda.get_device_properties(index)
        size = f"{told.total_memory / 2**30:.0f} GiB, capability {told.major}.{told.minor}"
        yield Check(name=f"cuda:{index}", status="ok", found=f"{told.name}, {size}")
        yield _product(f"cuda:{index} product", f"cuda:{index}")


def mlu() -> Iterator[Check]:
    """Each MLU, where torch_mlu is there, and a product on it."""
    if importlib.util.find_spec("torch_mlu") is None:
        yield Check(
            name="mlu", status="absent", found="torch_mlu is not here", todo="install Cambricon's build for an MLU370"
        )
        return
    importlib.import_module("torch_mlu")
    torch = importlib.import_module("torch")
    if not torch.mlu.is_available():
        yield Check(name="mlu", status="absent", found="torch_mlu sees no device", todo="check cnmon")
        return
    for index in range(torch.mlu.device_count()):
        yield Check(name=f"mlu:{index}", status="ok", found=str(torch.mlu.get_device_name(index)))
        yield _product(f"mlu:{index} product", f"mlu:{index}")


def kernels() -> Iterator[Check]:
    """What the operations run on."""
    yield Check(name="kernels", status="ok", found="torch's own on every device; vlmfx has none of its own yet")


def triton() -> Iterator[Check]:
    """Whether Triton would run, and where."""
    version = _version("triton")
    if version is None:
        return  # its line among the packages says so
    torch = importlib.import_module("torch")
    importlib.import_module("triton")
    where = (
        "on the GPU" if torch.cuda.is_available() else "in its interpreter only (TRITON_INTERPRET=1): there is no GPU"
    )
    numpy = _version("numpy") or "0"
    if not torch.cuda.is_available() and _numbers(numpy) >= (2, 4):
        found = f"{version} cannot interpret kernels beside numpy {numpy}"
        yield Check(name="triton runs", status="broken", found=found, todo="pip install 'numpy<2.4'")
    else:
        yield Check(name="triton runs", status="ok", found=f"{version} {where}")


def packages() -> Iterator[Check]:
    """Presence of each package, its version, whether that is in the range of pyproject.toml, and the extra that brings it."""
    ranges = _ranges()
    for name in {**USES, **ranges}:
        extra, specifier = ranges.get(name, (None, None))
        if extra == "dev" and name not in USES:
            continue  # the tools of a checkout; `make` sees to them
        install = f"pip install 'vlmfx[{extra}]'" if extra else f"pip install {name}"
        use, version = USES.get(name, f"the extra {extra}" if extra else "vlmfx"), _version(name)
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


def cache() -> Iterator[Check]:
    """Whether downloads from the hub can be kept."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    free = f"{shutil.disk_usage(there).free / 2**30:.0f} GiB free"
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        yield Check(name="hub cache", status="ok", found=f"{folder}, {free}")
    else:
        todo = "set HF_HOME to a folder that can, or give local folders"
        yield Check(name="hub cache", status="broken", found=f"{folder} cannot be written", todo=todo)


def scenes() -> Iterator[Check]:
    """Whether the shipped model is there and loads."""
    from vlmfx import checkpoint, tree

    started = time.perf_counter()
    model = checkpoint.load("scenes", device="cpu")
    seconds = time.perf_counter() - started
    count = sum(t.numel() for t in tree.leaves(model.params)) / 1e6
    yield Check(name="scenes", status="ok", found=f"{count:.1f}M parameters, loads in {seconds:.2f} s")


def answer() -> Iterator[Check]:
    """The first question of the demo, answered by the shipped model on the default device."""
    from vlmfx import checkpoint
    from vlmfx.engine import engine
    from vlmfx.engine.request import SamplingParams
    from vlmfx.engine.sequence import Request
    from vlmfx.processing.prompt import prepare

    model = checkpoint.load("scenes")
    picture = PACKAGE / "assets" / "demo.png"
    question = picture.with_suffix(".txt").read_text(encoding="utf-8").splitlines()[-1]
    parts = [{"type": "image", "image": str(picture)}, {"type": "text", "text": question}]
    inputs = prepare(model.processor, {"messages": [{"role": "user", "content": parts}]})
    params = SamplingParams.greedy(max_tokens=64)
    request = Request(number=0, inputs=inputs, params=params, arrival=time.perf_counter())
    (output,) = engine.run(model, [request], max_num_seqs=1)
    metrics = output.metrics
    assert metrics is not None
    assert metrics.time_to_first_token_s is not None
    assert metrics.decode_s is not None
    rate = (metrics.output_tokens - 1) / metrics.decode_s if metrics.output_tokens > 1 else 0.0
    dtype = str(model.dtype).removeprefix("torch.")
    speed = f"first token after {metrics.time_to_first_token_s * 1e3:.0f} ms, then {rate:.0f} tokens/s"
    yield Check(
        name="answer",
        status="ok",
        found=f"{question!r} → {output.outputs[0].text!r} ({model.device}, {dtype}, {speed})",
    )


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    machine, own, torch_build, cpu, cuda, mlu, kernels, triton, packages, cache, scenes,
)  # fmt: skip


def _failed(name: str, error: Exception) -> Check:
    reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")[:300]
    missing = getattr(error, "name", None) if isinstance(error, ImportError) else None
    todo = f"install {missing} again" if missing else "repair what it names, then run vlmfx doctor again"
    return Check(name=name, status="broken", found=f"{type(error).__name__}: {reason}", todo=todo)


def _product(name: str, device: str) -> Check:
    """A product of whole numbers, which is exact, and its time once warm."""
    torch = importlib.import_module("torch")
    try:
        a = torch.arange(256 * 256, device=device).reshape(256, 256).remainder(7).float()
        (a @ a).sum().item()
        started = time.perf_counter()
        total = (a @ a).sum().item()
        micros = (time.perf_counter() - started) * 1e6
    except RuntimeError as error:  # a device that is there and fails must not hide the others
        return _failed(name, error)
    expected = float((a.cpu().long() @ a.cpu().long()).sum())
    if abs(total - expected) > 1e-3 * expected:  # TF32 and the like keep three digits
        todo = "do not use this device"
        return Check(
            name=name, status="broken", found=f"256 × 256 gave {total:.0f}, expected {expected:.0f}", todo=todo
        )
    return Check(name=name, status="ok", found=f"256 × 256 in {micros:.0f} µs")


def _cpu_info() -> tuple[str, frozenset[str]]:
    """The processor's name and feature flags, where Linux tells them."""
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                name = value
            elif key in ("flags", "Features"):
                return name, frozenset(value.split())
    return name, flags


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


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
