"""Errors survive what worker pools and servers do to them."""

import copy
import pickle

import pytest

from vlmfx.errors import BatchError, CheckpointError, InvalidRequest


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
