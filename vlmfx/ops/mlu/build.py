"""Build the kernels for an MLU370: `python -m vlmfx.ops.mlu.build`, on a machine with torch_mlu and cncc. Never done at install time.

The library goes to the user's cache folder, named by the sources and torch's version, where `vlmfx.ops.mlu.load` looks for it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from vlmfx.errors import CompileError

HERE = Path(__file__).parent
KERNELS = HERE / "kernels"
CNCC = ["-O3", "--bang-mlu-arch=mtp_372"]
NAME = "vlmfx_mlu"


def sources() -> list[Path]:
    """What is compiled: the bindings by the host's compiler, the kernels by cncc."""
    return [HERE / "bindings.cpp", *sorted(KERNELS.glob("*.mlu"))]


def library_path() -> Path:
    """Where the library for these sources, this torch and this torch_mlu lies, once it is built."""
    versions = [torch.__version__, _version("torch_mlu"), os.environ.get("NEUWARE_HOME", ""), *CNCC]
    content = hashlib.sha256("\0".join(versions).encode())
    for path in [*sources(), *sorted(KERNELS.glob("*.h"))]:
        content.update(path.name.encode() + path.read_bytes())
    return cache_folder() / f"{NAME}-{content.hexdigest()[:16]}.so"


def cache_folder() -> Path:
    """Where this user's builds are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmfx"


def build() -> Path:
    """Compile and link, and return the library's path. Raises CompileError, which names what is missing."""
    if importlib.util.find_spec("torch_mlu") is None:
        raise CompileError(
            "the kernels for mlu need torch_mlu, which is not here; install Cambricon's build for this torch (docs/mlu.md)."
        )
    neuware = os.environ.get("NEUWARE_HOME")
    if shutil.which("cncc") is None and not (neuware and (Path(neuware) / "bin" / "cncc").exists()):
        raise CompileError(
            "the kernels for mlu need cncc, which is neither on PATH nor in NEUWARE_HOME/bin; install CNToolkit or set NEUWARE_HOME."
        )
    try:
        from setuptools import Distribution
        from torch_mlu.utils.cpp_extension import BuildExtension, MLUExtension
    except (ImportError, OSError) as error:
        raise CompileError(
            f"the kernels for mlu need setuptools and a torch_mlu that can be imported ({error}); install those for this torch."
        ) from error

    extension = MLUExtension(
        name=NAME,
        sources=[str(path) for path in sources()],
        include_dirs=[str(KERNELS)],
        extra_compile_args={"cxx": ["-O3", "-std=c++17"], "cncc": [*CNCC, f"-I{KERNELS}"]},
    )
    out = library_path()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vlmfx-mlu-") as folder:
        work = Path(folder)
        distribution = Distribution({"name": NAME, "ext_modules": [extension]})
        distribution.cmdclass["build_ext"] = BuildExtension.with_options(no_python_abi_suffix=True)
        command = distribution.get_command_obj("build_ext")
        command.build_lib, command.build_temp = str(work / "lib"), str(work / "temp")
        try:
            distribution.run_command("build_ext")
        except Exception as error:  # setuptools' and ninja's have no common kind
            raise CompileError(
                f"the kernels for mlu do not compile: {error}; see what cncc said above, and docs/mlu.md."
            ) from error
        part = out.with_name(f"part-{os.getpid()}-{out.name}")
        shutil.copyfile(next((work / "lib").rglob(f"{NAME}*.so")), part)
        part.replace(out)
    return out


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def main() -> int:
    """Build, and say where the library is or what is missing."""
    try:
        print(build())
    except CompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
