"""Intake: requests come out in order, whatever is taken out of the middle, and a load that fails is that request's own."""

from __future__ import annotations

from dataclasses import replace
from threading import Event
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmfx import SamplingParams
from vlmfx.engine.intake import Intake
from vlmfx.engine.sequence import Request

PARAMS = SamplingParams()


def request(number: int, *, is_ready: bool = True) -> Request:
    def nothing() -> Any:
        raise AssertionError("the intake's own load is called")

    return Request(number=number, num_tokens=1, load=nothing, params=PARAMS, arrival=0.0, is_ready=is_ready)


def loaded(request: Request) -> Any:
    return request.number, None


def taken(intake: Intake) -> list[int]:
    """Numbers of all, one at a time."""
    numbers = []
    while len(intake):
        intake.load(lambda request: not intake.num_loading)
        intake.wait(None)
        numbers += [request.number for request, _ in intake.take()]
    return numbers


@given(
    priorities=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    removed=st.sets(st.integers(0, 19)),
    is_ready=st.booleans(),
)
def test_those_that_stay_come_in_order(priorities, removed, is_ready):
    intake = Intake(loaded)
    for number, priority in enumerate(priorities):
        intake.add(replace(request(number, is_ready=is_ready), priority=priority))
    for number in removed:
        intake.remove(number)
    left = sorted((priority, number) for number, priority in enumerate(priorities) if number not in removed)
    assert sorted(r.number for r in intake) == sorted(number for _, number in left)
    assert taken(intake) == [number for _, number in left]
    intake.close()


@pytest.mark.parametrize("is_ready", [True, False])
def test_a_load_that_fails_is_told_with_its_request(is_ready):
    def load(request: Request) -> Any:
        if request.number == 1:
            raise ValueError("a broken picture")
        return loaded(request)

    intake = Intake(load)
    for number in range(3):
        intake.add(request(number, is_ready=is_ready))
    intake.load(lambda request: True)
    intake.wait(None, for_all=True)
    errors = {request.number: future.exception() for request, future in intake.take()}
    assert [str(errors[n]) for n in range(3)] == ["None", "a broken picture", "None"]
    assert not len(intake)
    intake.close()


def test_what_is_being_loaded_can_be_removed():
    intake = Intake(loaded)
    intake.add(request(0))
    intake.load(lambda request: True)
    intake.remove(0)
    assert not len(intake)
    assert list(intake.take()) == []
    intake.close()


def test_what_is_removed_takes_no_thread():
    begun: list[int] = []
    go_on = Event()

    def load(request: Request) -> Any:
        begun.append(request.number)
        go_on.wait(10)
        return loaded(request)

    intake = Intake(load)
    for number in range(50):
        intake.add(request(number, is_ready=False))
    intake.load(lambda request: True)
    for number in range(49):
        intake.remove(number)
    go_on.set()
    intake.wait(None)
    assert [request.number for request, _ in intake.take()] == [49]
    assert len(begun) < 20, "as many as there are threads, and the last"
    intake.close()
