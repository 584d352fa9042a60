"""Encoder time: what encoding takes and nothing else; on a GPU between events, without waiting for them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from tests.golden_cases import TINY, load_model
from tests.pictures import picture
from vlmfx import LLM, SamplingParams
from vlmfx.compile.executor import EagerExecutor
from vlmfx.engine.encoder_clock import EncoderClock

PAUSE_S = 0.05


def about(seed: int) -> dict[str, Any]:
    parts = [{"type": "image", "image": picture(60, 40, seed)}, {"type": "text", "text": "What is it?"}]
    return {"messages": [{"role": "user", "content": parts}]}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of which each takes a while longer."""
    real = EagerExecutor._run

    def run(self: EagerExecutor, *args: Any) -> Any:
        time.sleep(PAUSE_S)
        return real(self, *args)

    monkeypatch.setattr(EagerExecutor, "_run", run)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("task", ["generate", "embed"])
def test_each_picture_is_counted_once(task):
    llm = LLM(load_model(TINY["qwen2_vl"]), task=task, backend="eager")

    def ask(prompt: Any) -> None:
        llm.embed(prompt) if task == "embed" else llm.generate(prompt, SamplingParams.greedy(max_tokens=4))

    start = time.perf_counter()
    ask(about(0))
    whole = time.perf_counter() - start
    first = llm.engine.counters.encoder_seconds
    assert llm.engine.counters.num_encoded == 1
    assert PAUSE_S <= first < whole - PAUSE_S, "of encode, but not of the other programs"
    ask("no picture")
    assert llm.engine.counters.encoder_seconds == first
    ask(about(1))
    assert llm.engine.counters.encoder_seconds >= first + PAUSE_S
    assert llm.get_metrics()["encoder_seconds"] == llm.engine.counters.encoder_seconds


def test_what_fails_takes_time_too():
    clock = EncoderClock(torch.device("cpu"))

    def fail() -> None:
        with clock.span():
            time.sleep(PAUSE_S)
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert clock.read() >= PAUSE_S


def test_on_a_gpu_nothing_waits(monkeypatch):
    made: list[Any] = []

    class Event:
        """One that is never waited for; times are in milliseconds."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.is_over, self.at = False, 100.0 * len(made)
            made.append(self)

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return self.is_over

        def elapsed_time(self, other: Any) -> float:
            assert self.is_over
            assert other.is_over
            return float(other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = EncoderClock(torch.device("cuda"))
    for _ in range(2):
        with clock.span():
            pass
    assert clock.read() == 0
    for event in made[:3]:
        event.is_over = True
    assert clock.read() == pytest.approx(0.1)
    made[3].is_over = True
    assert clock.read() == clock.read() == pytest.approx(0.2)
