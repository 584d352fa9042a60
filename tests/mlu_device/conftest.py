"""Tests on a pretend `mlu` device, which a process cannot get rid of again: tests/test_mlu_device.py runs them in one of their own."""

from __future__ import annotations

import torch

from tests.compile import standin
from vlmfx.ops.mlu.emu import device


class Graph(standin.Graph):
    """As torch.mlu.MLUGraph: it refuses to wait in a capture, and what the device does not allow in one. Memory on the device is of the
    graph's pool, as torch's allocator gives it on a card."""

    factories = ()

    def capture_begin(self, pool: object = None) -> None:
        super().capture_begin(pool)
        torch.mlu.capturing(True)  # type: ignore[attr-defined]

    def capture_end(self) -> None:
        torch.mlu.capturing(False)  # type: ignore[attr-defined]
        super().capture_end()


device.install(Graph)
