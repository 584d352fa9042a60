"""The shipped model, and where downloads are kept."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from vlmfx.doctor.check import Check

DEMO = Path(__file__).resolve().parents[1] / "assets" / "demo.png"


def cache() -> Iterator[Check]:
    """Whether downloads from the hub can be kept."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    free = f"{shutil.disk_usage(there).free / 2**30:.0f} GiB free"
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        yield Check(name="hub cache", status="ok", found=f"{folder}, {free}")
    else:
        todo = "set HF_HOME to a folder that can, or give local folders"
        yield Check(name="hub cache", status="broken", found=f"{folder} cannot be written", todo=todo)


def scenes() -> Iterator[Check]:
    """Whether the shipped model is there and loads."""
    from vlmfx import checkpoint, tree

    started = time.perf_counter()
    model = checkpoint.load("scenes", device="cpu")
    seconds = time.perf_counter() - started
    count = sum(t.numel() for t in tree.leaves(model.params)) / 1e6
    yield Check(name="scenes", status="ok", found=f"{count:.1f}M parameters, loads in {seconds:.2f} s")


def answer() -> Iterator[Check]:
    """The first question of the demo, answered by the shipped model on the default device."""
    from vlmfx import checkpoint
    from vlmfx.engine.drain import run
    from vlmfx.engine.request import SamplingParams
    from vlmfx.engine.sequence import Request
    from vlmfx.processing.prompt import prepare

    model = checkpoint.load("scenes")
    picture = DEMO
    question = picture.with_suffix(".txt").read_text(encoding="utf-8").splitlines()[-1]
    parts = [{"type": "image", "image": str(picture)}, {"type": "text", "text": question}]
    inputs = prepare(model.processor, {"messages": [{"role": "user", "content": parts}]})
    params = SamplingParams.greedy(max_tokens=64)
    request = Request.ready(0, inputs, params, time.perf_counter())
    (output,) = run(model, [request], max_num_seqs=1)
    assert output.metrics is not None
    dtype = str(model.dtype).removeprefix("torch.")
    yield Check(
        name="answer",
        status="ok",
        found=f"{question!r} → {output.outputs[0].text!r} ({model.device}, {dtype}, {output.metrics.speed})",
    )
