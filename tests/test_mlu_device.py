"""The product on a pretend `mlu` device, in a process of its own: tests/mlu_device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops import emulated

HERE = Path(__file__).parent
FILES = sorted(path.name for path in (HERE / "mlu_device").glob("test_*.py"))


@pytest.mark.skipif(not emulated.HAS_EMULATOR, reason=emulated.WHY_NO_EMULATOR)
@pytest.mark.parametrize("file", FILES)
def test_on_mlu(file: str):
    environment = {**os.environ, "VLMFX_MLU_DEVICE": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "mlu_device" / file)]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    print(done.stdout[-20000:], done.stderr[-4000:])
    assert done.returncode == 0
