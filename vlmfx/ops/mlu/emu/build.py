"""The emulated library: every kernel and bindings.cpp compiled by g++ against the emulator's headers, once a content.

A file is compiled again when it, a header it can see, the compiler's options or torch have changed; libraries and objects are kept in
the user's cache folder by a hash of all that."""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from vlmfx.errors import CompileError
from vlmfx.ops.mlu.build import KERNELS, cache_folder

HERE = Path(__file__).parent
FAULTY = HERE / "faulty.mlu"  # for the tests of the emulator alone
BINDINGS = HERE.parent / "bindings.cpp"
TORCH = Path(torch.__file__).parent
STANDINS = [HERE / "bang_cnrt.h", HERE / "bang_state.h", *sorted((HERE / "include").rglob("*.h"))]
# Aliasing rules are looser in BANG C: NRAM is one array of char that all types are cut from. Products are rounded where they stand.
CXX = ["g++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off", "-DBANG_EMU"]
KERNEL = [*CXX, "-O2", "-march=native", "-x", "c++", "-Wall", "-Wextra", "-Werror"]
MUTANT = [*CXX, "-O1", "-march=native", "-x", "c++", "-w"]
WITH_TORCH = [*CXX, "-O0", "-w", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
INCLUDES = [f"-I{HERE}", f"-I{KERNELS}", f"-I{HERE}/include", f"-isystem{TORCH}/include"]
LINKS = [f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10"]


def library() -> Path:
    """The library of all kernels and their bindings, for `torch.ops.load_library`. Raises CompileError."""
    folder = _cache()
    with _locked(folder):
        redirect = folder / "redirect.h"
        redirect.write_text(_redirect(), encoding="utf-8")
        headers = [*sorted(HERE.glob("*.h")), *sorted(KERNELS.glob("*.h"))]
        sources = [
            (BINDINGS, [*WITH_TORCH, "-include", str(redirect)], [redirect, KERNELS / "entries.h", *STANDINS]),
            (HERE / "bang_state.cpp", [*CXX, "-O2"], headers),
            *((path, [*KERNEL, f"-DBANG_UNIT={path.stem}"], headers) for path in sorted(KERNELS.glob("*.mlu"))),
        ]
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda source: _object(folder, *source), sources))
        return _made(folder, "vlmfx_mlu_emu.so", objects, ["g++", "-shared", *map(str, objects), *LINKS])


def device() -> Path:
    """The library of the pretend device, for `emu.device`. Raises CompileError."""
    folder = _cache()
    with _locked(folder):
        source = HERE / "device.cpp"
        command = [*WITH_TORCH, "-std=c++20", *INCLUDES, "-shared", str(source), *LINKS]
        return _made(folder, "vlmfx_mlu_device.so", [source], command)


def mutant(path: Path, against: Path) -> Path:
    """The library of a changed kernel file, whose entry can stand for that of the library `against`. Raises CompileError."""
    return alone(path, path.with_suffix(".so"), against)


def alone(path: Path, out: Path, against: Path, *macros: str) -> Path:
    """The library `out` of one kernel file, with macros as NAME=value. Raises CompileError."""
    # Device memory and counters are those of `against`.
    links = ["-shared", "-x", "none", str(against), f"-Wl,-rpath,{against.parent}"]
    defined = [f"-D{macro}" for macro in (f"BANG_UNIT={path.stem}", *macros)]
    _run([*MUTANT, *defined, *INCLUDES, str(path), *links, "-o", str(out)])
    return out


def entries() -> list[str]:
    """The names of the kernels' C entries, as vlmfx_rms_norm."""
    text = (KERNELS / "entries.h").read_text(encoding="utf-8")
    return re.findall(r"^VLMFX_API const char \*(vlmfx_\w+)\(", text, re.MULTILINE)


def _redirect() -> str:
    """A header by which bindings.cpp calls each entry through a pointer, bang_emu_<entry>, which tests can set to a mutant's."""
    lines = ['#include "entries.h"', '#define API extern "C" __attribute__((visibility("default")))']
    for name in entries():
        lines += [f"API decltype(&{name}) bang_emu_{name};", f"decltype(&{name}) bang_emu_{name} = {name};"]
        lines += [f"#define {name} bang_emu_{name}"]
    return "\n".join([*lines, "#undef API", ""])


def _object(folder: Path, source: Path, options: Sequence[str], headers: Sequence[Path]) -> Path:
    return _made(folder, f"{source.stem}.o", [source, *headers], [*options, *INCLUDES, "-c", str(source)])


def _made(folder: Path, name: str, inputs: Sequence[Path], command: Sequence[str]) -> Path:
    """The file that a command makes of the inputs, unless it is there already: where they lie does not matter."""
    options = [option for option in command if "/" not in option]
    content = hashlib.sha256("\0".join([torch.__version__, _compiler(), *options]).encode())
    for path in inputs:
        content.update(path.name.encode() + path.read_bytes())
    stem, _, suffix = name.partition(".")
    out = folder / f"{stem}-{content.hexdigest()[:16]}.{suffix}"
    if not out.exists():
        part = out.with_name(f"part-{out.name}")
        _run([*command, "-o", str(part)])
        part.rename(out)
    return out


@cache
def _compiler() -> str:
    """g++'s version, and the processor that -march=native is."""
    if shutil.which("g++") is None:
        return ""
    asked = ["g++", "-march=native", "-Q", "--help=target", "--version"]
    return subprocess.run(asked, capture_output=True, text=True).stdout


def _run(command: Sequence[str]) -> None:
    if shutil.which(command[0]) is None:
        raise CompileError(f"the emulator needs {command[0]}, which is not here; install it (Debian: apt install g++).")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{' '.join(command)} failed; mend the source.\n{done.stderr}")


def _cache() -> Path:
    folder = cache_folder() / "bang-emu"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process builds at a time; the others then find what it made."""
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
