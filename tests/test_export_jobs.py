"""The processes of an export: what ends them, what they end, and how many there are; nothing is compiled here."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.compile.functions import needs_compiler
from tests.golden_cases import TINY
from tests.invariants import is_one_sentence
from vlmfx import export_jobs
from vlmfx.errors import CompileError
from vlmfx.export_jobs import JOB_BYTES, _default_jobs, _processes

ROOT = Path(__file__).resolve().parents[1]


def test_an_error_ends_the_processes_of_the_export_and_no_others():
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    other.start()
    own: set[BaseProcess] = set()

    def interrupted() -> None:
        with _processes(1) as pool:
            pool.submit(os.getpid).result()
            pool.submit(time.sleep, 600)
            own.update(set(multiprocessing.active_children()) - {other})
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert [process.is_alive() for process in (*own, other)] == [False, True]
    finally:
        other.kill()
        other.join()


def test_a_process_that_is_killed_tells_of_memory():
    with (
        pytest.raises(CompileError, match=r"for want of memory most likely; run it again with fewer jobs") as caught,
        _processes(1) as pool,
    ):
        pool.submit(signal.raise_signal, signal.SIGKILL).result()
    assert is_one_sentence(caught.value)


UNGUARDED = """
import sys
from vlmfx.compile.buckets import Plan
from vlmfx.export import export
plan = Plan(encode=(256,), prefill=(128,), decode=(2,), max_segments=3, max_seqs=2)
export(sys.argv[1], sys.argv[2], plan=plan, device="cpu", max_model_len=128, max_num_seqs=2, jobs=1, use_tqdm=False)
"""


@needs_compiler
def test_a_script_without_a_guard_is_told_so(tmp_path):
    (tmp_path / "script.py").write_text(UNGUARDED)
    run = subprocess.run(
        [sys.executable, tmp_path / "script.py", TINY["qwen2_vl"], tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    last = run.stderr.splitlines()[-1]
    assert 'has its export outside of `if __name__ == "__main__":`; put it there.' in last
    assert is_one_sentence(CompileError(last.partition(": ")[2]))
    assert "memory" not in last


@pytest.mark.parametrize(("num_bytes", "expected"), [(0, 1), (3 * JOB_BYTES - 1, 2), (1000 * JOB_BYTES, 4)])
def test_as_many_jobs_as_processors_and_memory_allow(monkeypatch, num_bytes, expected):
    monkeypatch.setattr(export_jobs, "available_bytes", lambda: num_bytes)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert _default_jobs() == expected
