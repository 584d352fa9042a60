"""What is expected of a card, by torch's own arithmetic, holds in the emulator; and a card of which it does not hold is told apart."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.ops import emulated
from vlmfx.ops.mlu import build, probe

pytestmark = [emulated.NO_EMULATOR] if not emulated.HAS_EMULATOR else []
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _library() -> None:
    emulated.library().bang_emu_options(0, probe.CORES, 1)


@pytest.mark.parametrize("name", probe.PROBES)
def test_the_emulator_does_what_is_expected_of_a_card(name: str):
    assert probe.run(name, CPU) <= probe.PROBES[name].tolerance


@pytest.mark.parametrize("name", probe.PROBES)
def test_a_card_that_does_another_thing_is_told_apart(name: str, monkeypatch: pytest.MonkeyPatch):
    """Here the next probe's step stands for the card's."""
    number = [*probe.PROBES].index(name)
    others = [*probe.PROBES.values()]
    monkeypatch.setitem(probe.PROBES, name, others[(number + 1) % len(others)])
    assert probe.run(name, CPU) > probe.PROBES[name].tolerance


def test_the_numbers_are_those_of_the_kernels():
    text = (build.KERNELS / "entries.h").read_text(encoding="utf-8")
    names = re.findall(r"PROBE_([A-Z0-9_]+)", text)
    assert [name.lower() for name in names] == [*probe.PROBES]


def test_every_intrinsic_that_kernels_use_is_probed():
    def used(path: Path) -> set[str]:
        return {*re.findall(r"__bang_\w+", path.read_text(encoding="utf-8"))}

    probed = used(build.KERNELS / "probe.mlu")
    assert set().union(*(used(path) for path in build.KERNELS.iterdir())) == probed


def test_without_a_card_a_sentence(capsys: pytest.CaptureFixture[str]):
    assert probe.main() == 1
    assert 'error: device "mlu" is not present on this machine' in capsys.readouterr().err
