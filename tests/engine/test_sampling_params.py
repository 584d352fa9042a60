"""SamplingParams refuses what cannot be sampled, in a sentence, and is a value."""

import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmfx import GuidedDecodingParams, StructuredOutputsParams
from vlmfx.engine.sampling_params import ABSENT, MAX_LOGIT_BIAS, MAX_STRINGS, SamplingParams, check_vocab
from vlmfx.errors import InvalidRequest


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no repr")


REFUSED = [
    *[
        (f, v)
        for f in ("temperature", "top_p", "min_p")
        for v in (math.nan, math.inf, -math.inf, -0.1, True, "1", None)
    ],
    *[(f, 10**400) for f in ("temperature", "top_p", "min_p", "seed", "logprobs", "n", "repetition_penalty")],
    *[(f, v) for f in ("top_k", "min_tokens") for v in (1.0, True, "1", None, -2, math.nan, [1])],
    *[("top_p", v) for v in (0, 0.0, 1.0001)],
    ("min_p", 1.5),
    *[("seed", v) for v in (2**64, -(2**63) - 1, 1.0, "1", False)],
    *[("n", v) for v in (0, 129, 1.0, True, "2", None)],
    *[(f, v) for f in ("presence_penalty", "frequency_penalty") for v in (2.1, -2.1, math.nan, True, None, "1")],
    *[("repetition_penalty", v) for v in (0, 0.0, -1.0, math.inf, math.nan, True, None)],
    *[("max_tokens", v) for v in (0, -1, 1.5, True, "16")],
    ("min_tokens", 17),
    *[(f, v) for f in ("logprobs", "prompt_logprobs") for v in (21, -1, True, 1.0, "5")],
    *[("stop", v) for v in ("", [""], ["a", ""], [1], [None], [b"a"], b"a", 1, {"a"}, [Unprintable()])],
    *[(f, v) for f in ("stop_token_ids", "allowed_token_ids") for v in (1, "1", [-1], [1.0], [True], [None], ["1"])],
    *[("bad_words", v) for v in ("word", [""], ["a", ""], [1], [None], {"a"}, ["\ud800"])],
    *[("logit_bias", v) for v in ([(1, 2.0)], "1", 5)],
    *[("structured_outputs", v) for v in ({"regex": "a"}, "a", 1)],
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
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "bad_words": (),
        "include_stop_str_in_output": False,
        "ignore_eos": False,
        "min_tokens": 0,
        "max_tokens": 16,
        "logprobs": None,
        "prompt_logprobs": None,
        "skip_special_tokens": True,
        "detokenize": True,
        "logit_bias": None,
        "allowed_token_ids": None,
        "structured_outputs": None,
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
        ("prompt_logprobs", 0, 0),
        ("n", np.int64(128), 128),
        ("presence_penalty", -2, -2.0),
        ("frequency_penalty", np.float32(2), 2.0),
        ("repetition_penalty", 5, 5.0),
        ("bad_words", ["a b", "c", "a b"], ("a b", "c")),
        ("bad_words", None, ()),
        ("allowed_token_ids", [7, 2, 7], (7, 2)),
        ("logit_bias", {}, None),
        ("logit_bias", {"7": 1, np.int64(3): -1e9, 0: 101}, {7: 1.0, 3: -100.0, 0: 100.0}),
    ],
)
def test_stored_form(field, given_, stored):
    value = getattr(SamplingParams(**{field: given_}), field)
    assert value == stored
    assert type(value) is type(stored)


TEXTS = st.text(min_size=1)
params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 1e300),
    top_p=st.floats(0, 1, exclude_min=True),
    top_k=st.integers(-1, 2**40),
    min_p=st.floats(0, 1),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    stop=st.none() | TEXTS | st.lists(TEXTS),
    stop_token_ids=st.none() | st.lists(st.integers(0, 2**31)),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    presence_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0, 1e300, exclude_min=True),
    bad_words=st.none() | st.lists(TEXTS, max_size=5),
    allowed_token_ids=st.none() | st.lists(st.integers(0, 2**31), min_size=1),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 2**31), st.floats(-200, 200)),
    structured_outputs=st.none() | st.builds(StructuredOutputsParams, choice=st.just(["a", "b"])),
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
        SamplingParams(1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", sorted(ABSENT))
def test_what_vllm_has_beyond_is_named(name):
    options: dict[str, Any] = {"temperature": 0.0, name: None}
    with pytest.raises(InvalidRequest, match=f"^{name}: vLLM has it, but vlmfx does not yet; remove it.$") as caught:
        SamplingParams(**options)
    assert caught.value.field == name


def test_greedy_answers_are_one():
    with pytest.raises(InvalidRequest, match=r"^n: found 2 but need 1 with temperature 0; "):
        SamplingParams.greedy(n=2)
    assert SamplingParams(n=2, temperature=1e-9).n == 2


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        ({"x": 1.0}, "found 'x' but need an integer"),
        ({" 7": 1.0}, "found ' 7' but need an integer"),
        ({"²": 1.0}, "found '²' but need an integer"),
        ({"9" * 5000: 1.0}, "found .* but need an integer"),
        ({-1: 1.0}, "found -1 but need an integer of at least 0"),
        ({True: 1.0}, "found True but need an integer"),
        ({7: math.nan}, "found nan but need a finite number; beyond ±100"),
        ({7: math.inf}, "found inf but need a finite number; beyond ±100"),
        ({7: None}, "found None but need a finite number"),
        ({7: 1.0, "7": 2.0}, "found '7' but need each token id once"),
        (dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0), "found 1025 ids but need at most 1024"),
    ],
)
def test_a_bias_that_is_refused(bias, said):
    with pytest.raises(InvalidRequest, match=f"^logit_bias: {said}"):
        SamplingParams(logit_bias=bias)


def test_a_bias_is_the_parameters_own():
    given_ = {1: 2.0}
    p = SamplingParams(logit_bias=given_)
    given_[1] = 3.0
    assert p.logit_bias == {1: 2.0}


def test_words_and_ids_that_allow_nothing_or_are_too_many():
    with pytest.raises(InvalidRequest, match=r"^allowed_token_ids: found \[\] but need at least one id; "):
        SamplingParams(allowed_token_ids=[])
    with pytest.raises(InvalidRequest, match=r"^bad_words: found 129 strings but need at most 128; "):
        SamplingParams(bad_words=[str(i) for i in range(MAX_STRINGS + 1)])


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_strings_that_would_take_the_time_of_every_step(name):
    def params(*given: str) -> SamplingParams:
        options: dict[str, Any] = {name: [*given]}
        return SamplingParams(**options)

    with pytest.raises(InvalidRequest, match=rf"^{name}: found 129 strings but need at most 128; "):
        params(*(f"{i:x}" for i in range(MAX_STRINGS + 1)))
    with pytest.raises(InvalidRequest, match=rf"^{name}: found 8193 characters in all but need at most 8192; "):
        params("a" * 8192, "b")
    assert len(getattr(params("a" * 8191, "b"), name)) == 2


def test_the_older_name_of_structured_outputs():
    form = GuidedDecodingParams(regex="a+")
    p = SamplingParams(guided_decoding=form)
    assert p == SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"))
    assert dataclasses.replace(p, n=2).structured_outputs is form
    with pytest.raises(InvalidRequest, match=r"^guided_decoding: .* beside structured_outputs"):
        SamplingParams(structured_outputs=form, guided_decoding=form)
    with pytest.raises(InvalidRequest, match=r"^guided_decoding: found 'a\+' but need a StructuredOutputsParams"):
        SamplingParams(guided_decoding="a+")  # type: ignore[arg-type]


def test_ids_are_within_the_vocabulary():
    check_vocab(SamplingParams(logit_bias={9: 1.0}, allowed_token_ids=[0, 9], stop_token_ids=[99]), 10)
    wrong: dict[str, Any] = {"logit_bias": {3: 1.0, 10: 1.0}, "allowed_token_ids": [3, 10]}
    for name, value in wrong.items():
        with pytest.raises(InvalidRequest, match=f"^{name}: found 10 but need ids below 10, the model's vocabulary; "):
            check_vocab(SamplingParams(**{name: value}), 10)


def test_greedy_is_what_none_means():
    p = SamplingParams.greedy(stop="x")
    assert (p.temperature, p.max_tokens, p.stop) == (0.0, None, ("x",))
    assert SamplingParams.greedy(max_tokens=3).max_tokens == 3


@pytest.mark.parametrize(
    ("max_tokens", "left", "budget"), [(None, 1000, 512), (None, 10, 10), (600, 1000, 600), (9, 4, 4)]
)
def test_token_budget(max_tokens, left, budget):
    assert SamplingParams(max_tokens=max_tokens).token_budget(left) == budget
