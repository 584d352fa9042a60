"""vlmfx doctor: it tells what is missing, out of range or broken, and what to do; it never raises."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from typing import Any

import pytest
import torch

from vlmfx import LLM, SamplingParams, doctor
from vlmfx.cli import chat, main
from vlmfx.doctor import devices, examine, model, packages
from vlmfx.doctor.check import Check

VERSION, IMPORT = importlib.metadata.version, importlib.import_module


def line(name: str, checks: list[Check] | None = None) -> Check:
    (found,) = [check for check in (examine() if checks is None else checks) if check.name == name]
    return found


@pytest.fixture
def set_version(monkeypatch):
    """Make a package another version, or with None absent."""

    def change(name: str, version: str | None) -> None:
        before = importlib.metadata.version

        def told(asked: str) -> str:
            if asked == name and version is None:
                raise importlib.metadata.PackageNotFoundError(asked)
            return version if asked == name and version is not None else before(asked)

        monkeypatch.setattr(importlib.metadata, "version", told)

    return change


def test_this_machine_is_fit(capsys):
    checks = examine()
    for name in ("python", "vlmfx", "torch build", "cpu", "cpu product", "torch", "tokenizers", "pillow", "scenes"):
        assert line(name, checks).status == "ok", line(name, checks)
    assert torch.__version__ in line("torch build", checks).found
    assert VERSION("numpy") in line("numpy", checks).found
    assert "none of its own" in line("kernels", checks).found
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.todo for check in checks if check.status != "ok")
    assert all("\n" not in str(check) for check in checks)


def test_what_is_absent_and_optional_says_which_extra_brings_it(set_version, capsys):
    set_version("av", None)
    check = line("av")
    assert (check.status, check.found) == ("absent", "not installed")
    assert check.todo == "pip install 'vlmfx[video]' for video files"
    assert main(["doctor"]) == 0
    assert "–       av                 not installed; pip install 'vlmfx[video]'" in capsys.readouterr().out


def test_what_is_absent_and_needed_is_broken(set_version, capsys):
    set_version("safetensors", None)
    assert line("safetensors").status == "broken"
    assert main(["doctor"]) == 1
    assert "BROKEN  safetensors" in capsys.readouterr().out


def test_what_no_extra_brings_is_installed_by_its_name(set_version, monkeypatch):
    """As in a copy of the files that was never installed, which knows no ranges."""
    monkeypatch.setattr(packages, "_ranges", dict)
    set_version("llguidance", None)
    assert line("llguidance").todo == "pip install llguidance for structured output"
    set_version("llguidance", "1.2.3")
    assert line("llguidance").status == "ok"


@pytest.mark.parametrize(("version", "status"), [("10.2.9", "broken"), ("10.3", "ok"), ("99.0.dev1", "ok")])
def test_versions_are_held_to_the_ranges_of_pyproject(version, status, set_version):
    set_version("pillow", version)
    check = line("pillow")
    assert check.status == status
    if status == "broken":
        assert check.found == "10.2.9, expected >=10.3"
        assert check.todo == "pip install 'pillow>=10.3'"


def test_an_extra_out_of_its_range_breaks_nothing_else(set_version):
    set_version("av", "9.0")
    set_version("triton", "3.0.0")
    check = line("av")
    assert (check.status, check.found, check.todo) == ("absent", "9.0, expected >=12", "pip install 'av>=12'")
    assert line("triton").todo == "`make test` wants that one"  # torch insists on its own
    set_version("triton", None)
    assert line("triton").status == "absent"


def test_without_metadata_packages_are_told_all_the_same(monkeypatch):
    def none(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", none)
    assert line("torch").status == "ok"


def test_a_torch_that_cannot_be_imported_is_a_line_of_each_check(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    checks = examine()
    for name in ("torch_build", "cpu", "cuda"):
        check = line(name, checks)
        assert check.status == "broken"
        assert "torch" in check.found
        assert check.todo == "install torch again"
    assert line("pillow", checks).status == "ok"
    assert main(["doctor"]) == 1
    assert main(["doctor", "--json"]) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [OSError("libc10.so: cannot open\nmore"), RuntimeError(""), KeyError("x")])
def test_whatever_a_check_raises_is_a_line(error, monkeypatch):
    def mine() -> Any:
        raise error

    monkeypatch.setattr(doctor, "CHECKS", (mine, devices.machine))
    first, second, _ = examine()
    assert (first.name, first.status) == ("mine", "broken")
    assert first.found.startswith(type(error).__name__)
    assert "more" not in first.found
    assert second.name == "python"


def test_a_device_that_fails_is_a_line(monkeypatch):
    check = devices._product("meta product", "meta")  # a device that holds no values
    assert (check.name, check.status) == ("meta product", "broken")


def test_a_device_that_multiplies_wrongly_is_told(monkeypatch):
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: matmul(a, b) * (1.01 if a.is_floating_point() else 1), raising=True
    )
    check = devices._product("cpu product", "cpu")
    assert check.status == "broken"
    assert "expected" in check.found


def test_triton_beside_a_numpy_that_breaks_its_interpreter(set_version, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    set_version("numpy", "2.4.0")
    check = line("triton runs")
    assert (check.status, check.todo) == ("broken", "pip install 'numpy<2.4'")
    set_version("numpy", "2.3.5")
    assert "interpreter only" in line("triton runs").found
    set_version("triton", None)
    assert [c for c in examine() if c.name == "triton runs"] == []


def test_gpus_are_told_one_by_one(monkeypatch):
    class Properties:
        name, total_memory, major, minor = "Imaginary 1", 24 * 2**30, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(devices, "_product", lambda name, device: Check(name=name, status="ok", found=device))
    checks = list(devices.cuda())
    assert [c.name for c in checks] == ["cuda:0", "cuda:0 product", "cuda:1", "cuda:1 product"]
    assert checks[0].found == "Imaginary 1, 24 GiB, capability 9.0"


def test_the_cache_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    assert line("hub cache", list(model.cache())).status == "ok"
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    check = line("hub cache", list(model.cache()))
    assert check.status == "broken"
    assert "HF_HOME" in check.todo
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert str(tmp_path / "hub") in line("hub cache", list(model.cache())).found


def test_a_shipped_model_that_is_missing_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("vlmfx.hub.SCENES", tmp_path / "gone")
    check = line("scenes")
    assert check.status == "broken"
    assert "lacks the shipped model" in check.found


def test_json_holds_what_the_lines_say(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", (packages.own, devices.kernels, devices.mlu))
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [Check(**each) for each in told] == examine()
    assert [sorted(each) for each in told] == [["found", "name", "status", "todo"]] * 3


def test_full_answers_a_question_of_the_demo(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", ())
    (check,) = examine(is_full=True)
    question = model.DEMO.with_suffix(".txt").read_text(encoding="utf-8").splitlines()[-1]
    (expected,) = LLM("scenes").generate(chat([str(model.DEMO)], question), SamplingParams.greedy(max_tokens=64))
    assert check.status == "ok", check
    assert f"{question!r} → {expected.outputs[0].text!r}" in check.found
    assert "tokens per second" in check.found
