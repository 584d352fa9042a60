"""The end of a server whose threads do not end: Python's own would abort the process where one is inside torch."""

from __future__ import annotations

import logging
import os
import threading

import pytest

from tests.server.harness import tiny
from vlmfx import LLM
from vlmfx.server import serve
from vlmfx.server.options import ServerOptions

OPTIONS = ServerOptions(names=("tiny",), host="127.0.0.1", port=0)


class Left(Exception):
    """The process is left at once, by a code."""


@pytest.mark.parametrize("pool", ["working", "aside", "fetching"])
@pytest.mark.parametrize("code", [0, 130])
def test_a_process_is_left_whose_threads_do_not_end(monkeypatch, pool, code):
    gate = threading.Event()

    def run(service, listeners):
        getattr(service, pool).submit(gate.wait)
        if code:
            raise KeyboardInterrupt

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(serve, "_run", run)
    monkeypatch.setattr(serve, "ENDING_S", 0.1)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    monkeypatch.setattr(os, "_exit", leave)
    try:
        with pytest.raises(Left) as left:
            serve.serve(lambda: LLM(tiny()), OPTIONS)
        assert left.value.args == (code,)
    finally:
        gate.set()


def test_threads_that_end_are_waited_for(monkeypatch):
    ended = []

    def run(service, listeners):
        begun = threading.Event()

        def work():
            begun.set()
            threading.Event().wait(0.3)
            ended.append(True)

        service.working.submit(work)
        assert begun.wait(30)

    monkeypatch.setattr(serve, "_run", run)
    monkeypatch.setattr(serve, "ENDING_S", 60)
    assert serve.serve(lambda: LLM(tiny()), OPTIONS) == 0
    assert ended == [True]
