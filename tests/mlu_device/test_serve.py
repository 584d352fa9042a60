"""`vlmfx serve --device mlu` and `vlmfx generate --device mlu`, as their users run them; torch_mlu is a file that makes the device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.server.harness import DEMO, PICTURE_URL, asks
from tests.server.test_serve import served

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PYTHONPATH with a torch_mlu."""
    (tmp_path / "torch_mlu.py").write_text("from vlmfx.ops.mlu.emu import device\n\ndevice.install()\n")
    return f"{tmp_path}{os.pathsep}{ROOT}"


def test_it_answers(path: str, tmp_path: Path):
    body = asks("What colour is the star?", PICTURE_URL, model="scenes")
    answers = []
    for device in ("mlu", "cpu"):
        with served(
            tmp_path / device, "scenes", "--port", "0", "--host", "127.0.0.1", device=device, PYTHONPATH=path
        ) as server:
            response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
            assert response.status_code == 200, response.text
            answers.append(response.json()["choices"][0]["message"]["content"])
            assert server.end() == 0, server.log.read_text()
    assert answers[0] == answers[1]
    assert answers[0]


def test_generate_answers(path: str):
    command = [sys.executable, "-m", "vlmfx", "generate", "What colour is the star?", "--image", str(DEMO), "--device"]
    answers = [
        subprocess.run(
            [*command, device], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
        ).stdout
        for device in ("mlu", "cpu")
    ]
    assert answers[0] == answers[1]
    assert answers[0].strip()
