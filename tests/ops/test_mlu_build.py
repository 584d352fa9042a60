"""Building the kernels for a card: what is missing is said, and what torch_mlu's build is asked for; here against a stand-in for it."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools
from setuptools.command.build_ext import build_ext

from vlmfx.cli import _parser
from vlmfx.errors import CompileError, DeviceError
from vlmfx.ops import mlu
from vlmfx.ops.mlu import build


@pytest.fixture(autouse=True)
def _no_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("NEUWARE_HOME", "VLMFX_MLU_LIBRARY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def torch_mlu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A torch_mlu whose extension keeps what it was made of, and whose build writes a file or fails."""
    asked: dict[str, Any] = {}

    def extension(**arguments: Any) -> setuptools.Extension:
        asked.update(arguments)
        return setuptools.Extension(arguments["name"], [])

    class Build(build_ext):
        @classmethod
        def with_options(cls, **options: Any) -> type[Build]:
            asked.update(options)
            return cls

        def run(self) -> None:
            if asked.get("fails"):
                raise RuntimeError("cncc: error: unknown intrinsic")
            folder = Path(self.build_lib)
            folder.mkdir(parents=True)
            (folder / f"{build.NAME}.so").write_bytes(b"library")

    names = ("torch_mlu", "torch_mlu.utils", "torch_mlu.utils.cpp_extension")
    for name in names:
        module: Any = ModuleType(name)
        module.__spec__ = object()
        monkeypatch.setitem(sys.modules, name, module)
    module.MLUExtension, module.BuildExtension = extension, Build
    return asked


def with_cncc(folder: Path) -> None:
    folder.mkdir()
    (folder / "cncc").write_text("#!/bin/sh\n")
    (folder / "cncc").chmod(0o755)


def test_without_torch_mlu_a_sentence(capsys: pytest.CaptureFixture[str]):
    assert build.main() == 1
    assert "the kernels for mlu need torch_mlu, which is not here; install Cambricon's build" in capsys.readouterr().err


def test_without_cncc_a_sentence(torch_mlu, capsys: pytest.CaptureFixture[str]):
    assert build.main() == 1
    assert "need cncc, which is neither on PATH nor in NEUWARE_HOME/bin" in capsys.readouterr().err


def test_the_build_is_asked_for_this_chip_and_all_kernels(
    torch_mlu, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with_cncc(tmp_path / "bin")
    assert build.main() == 0
    assert capsys.readouterr().out.strip() == str(build.library_path())
    assert build.library_path().read_bytes() == b"library"
    files = {Path(source).name for source in torch_mlu["sources"]}
    assert files == {"bindings.cpp"} | {path.name for path in build.KERNELS.glob("*.mlu")}
    assert "--bang-mlu-arch=mtp_372" in torch_mlu["extra_compile_args"]["cncc"]
    assert torch_mlu["no_python_abi_suffix"]
    assert torch_mlu["include_dirs"] == [str(build.KERNELS)]


def test_cncc_in_neuware_home_is_found(torch_mlu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "neuware").mkdir()
    with_cncc(tmp_path / "neuware" / "bin")
    monkeypatch.setenv("NEUWARE_HOME", str(tmp_path / "neuware"))
    assert build.build().exists()


def test_what_does_not_compile_leaves_nothing(torch_mlu, tmp_path: Path):
    with_cncc(tmp_path / "bin")
    torch_mlu["fails"] = True
    with pytest.raises(CompileError, match="do not compile: cncc: error: unknown intrinsic"):
        build.build()
    assert not build.library_path().exists()


def test_without_a_library_the_build_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DeviceError, match=r"are not built .* run python -m vlmfx\.ops\.mlu\.build"):
        mlu.load()
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setenv("VLMFX_MLU_LIBRARY", str(broken))
    with pytest.raises(DeviceError, match=r"broken\.so cannot be loaded .* on this machine"):
        mlu.load()


def test_another_torch_or_another_source_is_another_library(monkeypatch: pytest.MonkeyPatch):
    before = build.library_path()
    monkeypatch.setattr("torch.__version__", "9.9")
    assert build.library_path() != before
    assert os.fspath(before).endswith(".so")


def test_the_commands_of_the_page_are_there():
    page = (Path(__file__).parents[2] / "docs" / "mlu.md").read_text(encoding="utf-8")
    commands = re.findall(
        r"^(?:vlmfx|python -m|pytest) [^#\n]+|(?<=`)(?:vlmfx|python -m|pytest) [^`]+", page, re.MULTILINE
    )
    assert len(commands) > 8
    for command in commands:
        verb, *rest = shlex.split(command)
        if verb == "vlmfx":
            _parser().parse_args(rest)  # which exits where an option is not known
        elif verb == "python":
            assert importlib.util.find_spec(rest[1]) is not None, command
        else:
            paths = [word for word in rest if "/" in word]
            assert paths, command
            assert all((Path(__file__).parents[2] / path).exists() for path in paths), command
