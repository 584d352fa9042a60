"""Tests on a pretend `mlu` device, which a process cannot get rid of again: tests/test_mlu_device.py runs them in one of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from tests.compile import standin
from vlmfx.ops.mlu.emu import device


class Graph(standin.Graph):
    """As torch.mlu.MLUGraph: it refuses to wait in a capture, and what the device does not allow in one. Memory on the device is of the
    graph's pool, as torch's allocator gives it on a card."""

    factories = ()
    made: ClassVar[list[Graph]] = []

    def capture_begin(self, pool: object = None) -> None:
        super().capture_begin(pool)
        self.made.append(self)
        torch.mlu.capturing(True)  # type: ignore[attr-defined]

    def capture_end(self) -> None:
        torch.mlu.capturing(False)  # type: ignore[attr-defined]
        super().capture_end()


device.install(Graph)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PYTHONPATH with a torch_mlu, for a process of its own."""
    (tmp_path / "torch_mlu.py").write_text("from vlmfx.ops.mlu.emu import device\n\ndevice.install()\n")
    return f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"
