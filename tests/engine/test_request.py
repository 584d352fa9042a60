"""SamplingParams refuses what cannot be sampled, in a sentence; results carry vLLM's names."""

import dataclasses
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmfx.engine.request import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)
from vlmfx.errors import InvalidRequest, VlmfxError


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no repr")


REFUSED = [
    *[
        (f, v)
        for f in ("temperature", "top_p", "min_p")
        for v in (math.nan, math.inf, -math.inf, -0.1, True, "1", None)
    ],
    *[(f, 10**400) for f in ("temperature", "top_p", "min_p", "seed", "logprobs")],
    *[(f, v) for f in ("top_k", "min_tokens") for v in (1.0, True, "1", None, -2, math.nan, [1])],
    *[("top_p", v) for v in (0, 0.0, 1.0001)],
    ("min_p", 1.5),
    *[("seed", v) for v in (2**64, -(2**63) - 1, 1.0, "1", False)],
    *[("max_tokens", v) for v in (0, -1, 1.5, True, "16")],
    ("min_tokens", 17),
    *[("logprobs", v) for v in (21, -1, True, 1.0, "5")],
    *[("stop", v) for v in ("", [""], ["a", ""], [1], [None], [b"a"], b"a", 1, {"a"}, [Unprintable()])],
    *[("stop_token_ids", v) for v in (1, "1", [-1], [1.0], [True], [None], ["1"])],
    *[(f, v) for f in ("ignore_eos", "detokenize", "skip_special_tokens") for v in (0, 1, None, "yes")],
    ("include_stop_str_in_output", np.True_),
]


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_refuses_and_says_what_it_found_and_needs(field, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    error = caught.value
    assert error.field == field
    assert error.found is value or any(error.found is item for item in value)
    assert isinstance(error.expected, str)
    assert error.expected in str(error)
    assert str(error).startswith(f"{field}: found ")
    assert str(error).endswith(".")
    assert len(str(error)) < 300


def test_min_tokens_beyond_max_tokens_names_both():
    with pytest.raises(InvalidRequest, match=r"^min_tokens: found 5 .* max_tokens, which is 4; "):
        SamplingParams(min_tokens=5, max_tokens=4)
    assert SamplingParams(min_tokens=500, max_tokens=None).min_tokens == 500
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(min_tokens=10**5000, max_tokens=4)
    assert caught.value.field == "min_tokens"


def test_stop_strings_need_text():
    with pytest.raises(InvalidRequest, match="detokenize"):
        SamplingParams(stop="a", detokenize=False)


def test_defaults_are_vllms():
    assert dataclasses.asdict(SamplingParams()) == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "include_stop_str_in_output": False,
        "ignore_eos": False,
        "min_tokens": 0,
        "max_tokens": 16,
        "logprobs": None,
        "skip_special_tokens": True,
        "detokenize": True,
    }


@pytest.mark.parametrize(
    ("field", "given_", "stored"),
    [
        ("stop", "ab", ("ab",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", [], ()),
        ("stop_token_ids", [7, np.int64(2), 7], (7, 2)),
        ("top_k", -1, 0),
        ("top_k", np.int32(5), 5),
        ("temperature", 2, 2.0),
        ("temperature", np.float32(0.5), 0.5),
        ("top_p", 1, 1.0),
        ("seed", -1, None),
        ("seed", 2**64 - 1, 2**64 - 1),
        ("seed", -(2**63), -(2**63)),
        ("logprobs", 20, 20),
        ("logprobs", 0, 0),
        ("max_tokens", None, None),
    ],
)
def test_stored_form(field, given_, stored):
    value = getattr(SamplingParams(**{field: given_}), field)
    assert value == stored
    assert type(value) is type(stored)


params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 1e300),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(-1, 2**40),
    min_p=st.floats(0, 1),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    stop=st.none() | st.text(min_size=1) | st.lists(st.text(min_size=1)),
    stop_token_ids=st.none() | st.lists(st.integers(0, 2**31)),
    logprobs=st.none() | st.integers(0, 20),
    max_tokens=st.none() | st.integers(1, 2**40),
)


@settings(deadline=None)
@given(p=params)
def test_is_a_value(p):
    """Hashable, picklable, and building it again from its own fields changes nothing."""
    assert dataclasses.replace(p) == p
    assert pickle.loads(pickle.dumps(p)) == p
    assert hash(dataclasses.replace(p)) == hash(p)
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.temperature = 0.0


def test_arguments_are_by_name_and_unknown_ones_are_named():
    with pytest.raises(TypeError):
        SamplingParams(1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_greedy_is_what_none_means():
    p = SamplingParams.greedy(stop="x")
    assert (p.temperature, p.max_tokens, p.stop) == (0.0, None, ("x",))
    assert SamplingParams.greedy(max_tokens=3).max_tokens == 3


@pytest.mark.parametrize(
    ("max_tokens", "left", "budget"), [(None, 1000, 512), (None, 10, 10), (600, 1000, 600), (9, 4, 4)]
)
def test_token_budget(max_tokens, left, budget):
    assert SamplingParams(max_tokens=max_tokens).token_budget(left) == budget


def test_failed_request():
    error = VlmfxError("no")
    result = RequestOutput.failed("r1", error, prompt="hi", prompt_token_ids=(1, 2))
    assert result.outputs == [CompletionOutput(0, "", (), None, None, "error", None)]
    assert (result.error, result.finished, result.prompt_token_ids, result.metrics) == (error, True, [1, 2], None)
    assert result.outputs[0].finished()


def test_results_are_as_mutable_as_vllms():
    output = CompletionOutput(index=0, text="", token_ids=())
    output.text += "a"
    assert not output.finished()
    Logprob(-1.0).decoded_token = "a"
    result = RequestOutput("r", None, [1], [output], finished=False)
    result.finished = True
    with pytest.raises(dataclasses.FrozenInstanceError):
        RequestMetrics(prompt_tokens=1, output_tokens=1).prompt_tokens = 2  # type: ignore[misc]


@pytest.mark.parametrize("module", ["request", "stopping"])
def test_imports_without_torch(module):
    code = f"import sys, vlmfx.engine.{module}; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
