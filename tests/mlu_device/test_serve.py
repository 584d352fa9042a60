"""`vlmfx serve --device mlu` and `vlmfx generate --device mlu`, as their users run them; torch_mlu is a file that makes the device."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import httpx

from tests.server.harness import DEMO, PICTURE_URL, asks
from tests.server.test_serve import served
from vlmfx import LLM, SamplingParams

QUESTION, PARAMS = "What colour is the star?", SamplingParams.greedy(max_tokens=12)


@cache
def expected() -> str:
    """What the CPU says."""
    answer = LLM("scenes", device="cpu", dtype="float32").chat(
        asks(QUESTION, PICTURE_URL)["messages"], PARAMS, use_tqdm=False
    )
    return answer[0].outputs[0].text


def test_it_answers(path: str, tmp_path: Path):
    arguments = ["scenes", "--port", "0", "--host", "127.0.0.1"]
    with served(tmp_path / "log", *arguments, device="mlu", PYTHONPATH=path) as server:
        response = httpx.post(
            f"{server.url}/v1/chat/completions", json=asks(QUESTION, PICTURE_URL, model="scenes"), timeout=120
        )
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["message"]["content"] == expected()
        assert server.end() == 0, server.log.read_text()


def test_generate_answers(path: str):
    command = [sys.executable, "-m", "vlmfx", "generate", QUESTION, "--image", str(DEMO), "--device", "mlu"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected()
