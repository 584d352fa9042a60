"""Errors survive what worker pools and servers do to them."""

import copy
import pickle

import numpy as np
import pytest
import torch

from vlmfx.errors import BatchError, CheckpointError, InvalidRequest, reason_of, shown
from vlmfx.models.validate import refuse


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("seed", "found -1.", found=-1, expected="0 or more"),
        BatchError("1 of 2 prompts failed.", ["an output"]),
        CheckpointError("no weights."),
    ],
)
def test_pickle_and_copy_keep_everything(error):
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error)
        assert (str(other), vars(other)) == (str(error), vars(error))


class Mute:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "text"),
    [("four", "'four'"), (7, "7"), (True, "True"), ([1, "a"], "[1, 'a']"), (None, "None"), ("a\nb", "'a\\nb'")],
)
def test_a_short_value_is_shown_as_it_is(value, text):
    assert shown(value) == text


@pytest.mark.parametrize("limit", [10, 80])
def test_whatever_the_value_it_is_shown_in_one_short_line(limit):
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    itself: list = []
    itself.append(itself)
    hard = [
        object(),
        lambda: 0,
        10**5000,
        [10**5000],
        {10**5000: 1},
        Mute(),
        [Mute()],
        deep,
        itself,
        "long " * 999,
        np.zeros((9, 9)),
        torch.eye(9),
    ]
    for value in hard:
        text = shown(value, limit)
        assert 0 < len(text) <= limit
        assert len(text.splitlines()) == 1
        assert "0x" not in text


def test_a_config_with_a_number_of_5001_digits_is_refused_in_one_sentence():
    with pytest.raises(CheckpointError, match=r"hidden_size is .*, expected a small number"):
        refuse("hidden_size", 10**5000, "a small number")


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("Too short.\nSecond line"), "Too short"),
        (ValueError("cannot identify image file <_io.BytesIO object at 0x7f01deadbeef>"), "cannot identify image file"),
        (ValueError("malformed node or string on line 1: <ast.BinOp object at 0x7f01deadbeef>"), "malformed node or string on line 1"),
        (OSError("bad file <_io.BufferedReader name='/srv/me/a.png'> here"), "bad file here"),
        (FileNotFoundError(2, "No such file or directory", "/srv/me/a b.png"), "No such file or directory"),
        (OSError("[Errno 1094995529] Invalid data found: '<none>'"), "Invalid data found"),
        (ValueError("cannot open /srv/models/a.bin for you"), "cannot open for you"),
        (ValueError("stuck at 0xdeadbeef00"), "stuck"),
        (ValueError("Roles alternate. Change them!"), "Roles alternate; Change them!"),
        (ValueError("see https://h.example/a/b, or text/plain and 3/4"), "see https://h.example/a/b, or text/plain and 3/4"),
        (ValueError("x" * 10**6), "x" * 199 + "…"),
        (ValueError(), "ValueError"),
        (Silent(), "Silent"),
    ],
)  # fmt: skip
def test_reasons_say_nothing_of_the_process(error, expected):
    assert reason_of(error) == expected
