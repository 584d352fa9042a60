"""The machine, its processors, and what computes on them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from vlmfx.doctor.check import Check, failed
from vlmfx.doctor.packages import version_of


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
    version = version_of("triton")
    if version is None:
        return  # its line among the packages says so
    torch = importlib.import_module("torch")
    importlib.import_module("triton")
    where = (
        "on the GPU" if torch.cuda.is_available() else "in its interpreter only (TRITON_INTERPRET=1): there is no GPU"
    )
    numpy = version_of("numpy") or "0"
    if not torch.cuda.is_available() and _numbers(numpy) >= (2, 4):
        found = f"{version} cannot interpret kernels beside numpy {numpy}"
        yield Check(name="triton runs", status="broken", found=found, todo="pip install 'numpy<2.4'")
    else:
        yield Check(name="triton runs", status="ok", found=f"{version} {where}")


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
        return failed(name, error)
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


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
