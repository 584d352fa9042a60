"""How tests run an op on a card: what they compare is what the device gave, and what it wrote; and that they find a card by themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from tests.ops.kernels import Kernel, assert_equal
from tests.strategies import normal
from vlmfx.ops import cache_write, rms_norm

ROOT = Path(__file__).parents[2]


def test_outputs_come_back():
    case = (normal(0, 3, 70), normal(1, 70), 1e-6)
    assert_equal(rms_norm.OP, Kernel(rms_norm.OP, "mlu-card", "mlu", rms_norm.OP)(*case), rms_norm.reference(*case))


def test_what_is_written_comes_back():
    k, v = normal(0, 2, 1, 8), normal(1, 2, 1, 8)
    slots = torch.tensor([5, 0], dtype=torch.int32)
    mine, right = ([torch.zeros(2, 1, 4, 8) for _ in range(2)] for _ in range(2))
    Kernel(cache_write.OP, "mlu-card", "mlu", cache_write.OP)(k, v, *mine, slots)
    cache_write.reference(k, v, right[0], right[1], slots)
    for got, expected in zip(mine, right, strict=True):
        assert torch.equal(got, expected)
        assert got.any()


def test_the_first_day_s_tests_find_the_card(path: str):
    """In a process that nobody told of it, on a machine with torch_mlu."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/ops/test_rms_norm.py",
        "-k",
        "mlu-card or emulated",
    ]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("VLMFX_MLU_DEVICE", "VLMFX_MLU_LIBRARY")
    }
    done = subprocess.run(command, cwd=ROOT, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True)
    assert re.search(r"2 passed, 1 skipped, \d+ deselected", done.stdout), done.stdout


def test_probes_and_their_sentence(path: str):
    command = [sys.executable, "-m", "vlmfx.ops.mlu.probe"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^(\d+) of \1 hold$", done.stdout, re.MULTILINE)
