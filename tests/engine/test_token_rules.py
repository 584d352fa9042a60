"""TokenRules: masks are what the parameters say of the tokens so far, and need no token unknown to the host unless they say so."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.test_token_mask import ids_of
from vlmfx.engine.sampling_params import SamplingParams
from vlmfx.engine.token_rules import TokenRules
from vlmfx.errors import InvalidRequest
from vlmfx.hub import SCENES
from vlmfx.processing.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(SCENES)
VOCAB = len(TOKENIZER) + 30  # rows of padding
EOS = TOKENIZER.encode("<|im_end|>")
WORDS = ["red", " circle", "zqx", "re", "a red circle", "zz", "<|im_end|>"]


def rules(prompt: list[int] | None = None, vocab: int = VOCAB, **params: Any) -> TokenRules:
    p = SamplingParams(**{"max_tokens": None, **params})
    return TokenRules(p, prompt or [], tokenizer=TOKENIZER, vocab_size=vocab, eos_token_ids=EOS)


def allowed(params: SamplingParams, answer: list[int], *, is_ahead: bool = False) -> set[int]:
    """The tokens that may come next, one rule at a time."""
    ids = set(range(VOCAB)) & set(range(VOCAB) if params.allowed_token_ids is None else params.allowed_token_ids)
    for word in params.bad_words or ():
        for text in (word.lstrip(), " " + word.lstrip()):
            *before, last = TOKENIZER.encode(text, add_special_tokens=False)
            if answer[len(answer) - len(before) :] == before:
                ids.discard(last)
    stops = {*EOS, *(params.stop_token_ids or ())} if len(answer) + is_ahead < params.min_tokens else set()
    return ids - stops or ids


def next_ids(r: TokenRules, **options: bool) -> set[int]:
    mask = r.mask(**options)
    return set(range(VOCAB)) if mask is None else ids_of(mask)


# Answers that end in the beginning of a word, or in all of it.
PIECES = [
    TOKENIZER.encode(text, add_special_tokens=False)[:cut] for text in (*WORDS, " red", " zqx") for cut in (1, 2, 9)
]
ANSWERS = st.lists(st.sampled_from(PIECES), max_size=4).map(lambda pieces: [i for piece in pieces for i in piece])


@given(
    answer=ANSWERS,
    bad_words=st.lists(st.sampled_from(WORDS), max_size=3),
    allowed_ids=st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=9),
    min_tokens=st.integers(0, 4),
    stops=st.lists(st.integers(0, VOCAB + 9), max_size=3),
)
def test_masks_by_definition(answer, bad_words, allowed_ids, min_tokens, stops):
    ids = None if allowed_ids is None else sorted(allowed_ids)
    r = rules(bad_words=bad_words, allowed_token_ids=ids, min_tokens=min_tokens, stop_token_ids=stops)
    for at in range(len(answer) + 1):
        if at:
            r.accept(answer[at - 1])
        assert next_ids(r) == allowed(r.params, answer[:at])
        if not r.needs_host:
            assert next_ids(r, is_ahead=True) == allowed(r.params, answer[:at], is_ahead=True)


def test_words_of_one_token_leave_the_answer_on_the_device():
    (token,) = TOKENIZER.encode("red", add_special_tokens=False)
    (spaced,) = TOKENIZER.encode(" red", add_special_tokens=False)
    r = rules(bad_words=["red"])
    assert not r.needs_host
    assert next_ids(r) == set(range(VOCAB)) - {token, spaced}
    assert rules(bad_words=["zqx"]).needs_host
    for params in (
        {},
        {"min_tokens": 3},
        {"allowed_token_ids": [1]},
        {"repetition_penalty": 2.0},
        {"logit_bias": {1: 1}},
    ):
        assert not rules(**params).needs_host
    with pytest.raises(AssertionError, match="not known yet"):
        rules(bad_words=["zqx"]).mask(is_ahead=True)


def test_a_word_of_two_tokens_is_cut_short_where_it_would_end():
    first, *_, last = TOKENIZER.encode("zz", add_special_tokens=False)
    r = rules([first], bad_words=["zz"])
    assert last in next_ids(r)  # the prompt does not count
    r.accept(first)
    assert last not in next_ids(r)
    r.accept(5)
    assert last in next_ids(r)


def test_nothing_asked_for_is_no_mask_and_no_history():
    r = rules([1, 2, 3], stop_token_ids=[7], logit_bias={})
    assert r.mask() is None
    r.accept(4)
    assert r.mask(is_ahead=True) is None
    assert len(r.history) == len(r.bias) == 0


def test_history_grows_with_the_answer():
    r, answer = rules([1, 2], presence_penalty=1.0), list(range(500))
    for token in answer:
        r.accept(token)
    assert r.history.tolist() == [1, 2, *answer]
    assert (r.prompt_len, r.history.dtype) == (2, "int32")


def test_copies_go_on_by_themselves():
    first, last = TOKENIZER.encode("zz", add_special_tokens=False)
    one = rules([1], bad_words=["zz"], frequency_penalty=1.0)
    other = one.copy()
    one.accept(first)
    assert last not in next_ids(one)
    assert last in next_ids(other)
    other.accept(9)
    assert (one.history.tolist(), other.history.tolist()) == ([1, first], [1, 9])


def test_min_tokens_gives_way_to_what_leaves_only_a_stop():
    r = rules(allowed_token_ids=EOS, min_tokens=2)
    assert next_ids(r) == set(EOS)


def test_rules_that_leave_no_token_are_refused():
    red = TOKENIZER.encode("red", add_special_tokens=False)
    with pytest.raises(
        InvalidRequest,
        match=r"^allowed_token_ids: allowed_token_ids and bad_words leave no token to draw as number 1; ",
    ):
        rules(allowed_token_ids=red, bad_words=["red"])
    first, last = TOKENIZER.encode("zq", add_special_tokens=False)
    r = rules(allowed_token_ids=[last], bad_words=["zq"])
    r.accept(first)
    with pytest.raises(InvalidRequest, match=r"leave no token to draw as number 2; allow more tokens.$"):
        r.mask()


def test_what_the_model_or_the_tokenizer_has_not_is_refused():
    with pytest.raises(InvalidRequest, match=r"^logit_bias: found 1000 but need ids below 40"):
        rules(vocab=40, logit_bias={1000: 1.0})
    with pytest.raises(InvalidRequest, match=r"^bad_words: '  ' has no tokens; leave it out.$"):
        rules(bad_words=["  "])
