"""StopChecker: however a text comes in pieces, it ends at the same place, and nothing emitted is taken back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmfx.engine.request import SamplingParams
from vlmfx.engine.stopping import StopChecker, StopStep

EOS, STOP_ID, WORD = 2, 7, 5
TEXTS = st.text(alphabet="ab", max_size=30) | st.text(alphabet="abé中😀", max_size=30)
STOPS = st.lists(
    st.text(alphabet="ab", min_size=1, max_size=5) | st.text(alphabet="ab中", min_size=1, max_size=3), max_size=4
)


def checker(max_tokens=1000, **options):
    return StopChecker(
        SamplingParams(max_tokens=None, stop_token_ids=[STOP_ID], **options), eos_token_ids=[EOS], max_tokens=max_tokens
    )


@st.composite
def pieces(draw, texts=TEXTS):
    """A text cut anywhere, with empty pieces too, as tokens in the middle of a character give."""
    text = draw(texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def cut(text, stops, include, searched_from=0):
    """(text up to the stop string complete first, that string), or (text, None); by the definition."""
    for end in range(searched_from + 1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


def run(check, texts, ids=None):
    """Every step until the end, and then EOS if there was none."""
    steps = []
    for token, text in zip([*(ids or [WORD] * len(texts)), EOS], [*texts, ""], strict=True):
        steps.append(check.step(token, text))
        if steps[-1].finish_reason:
            break
    return steps


@settings(deadline=None, max_examples=500)
@given(texts=pieces(), stops=STOPS, include=st.booleans())
def test_any_split_ends_where_the_whole_text_does(texts, stops, include):
    steps = run(checker(stop=stops, include_stop_str_in_output=include), texts)
    want, reason = cut("".join(texts), stops, include)
    assert "".join(s.text for s in steps) == want
    assert (steps[-1].finish_reason, steps[-1].stop_reason) == ("stop", reason)


@settings(deadline=None, max_examples=500)
@given(texts=pieces(), stops=STOPS, include=st.booleans())
def test_what_is_emitted_stands_and_no_more_is_held_than_needed(texts, stops, include):
    """After each step the emitted text begins every text that could still come, and only a stop string's beginning is
    held back."""
    check, seen, emitted = checker(stop=stops, include_stop_str_in_output=include), "", ""
    for text in texts:
        seen, step = seen + text, check.step(WORD, text)
        emitted += step.text
        if step.finish_reason:
            return
        futures = [cut(seen + stop[i:], stops, include)[0] for stop in stops for i in range(len(stop))]
        futures.append(seen)  # nothing more comes
        assert all(f.startswith(emitted) for f in futures)
        beginnings = {"", *(stop[:i] for stop in stops for i in range(len(stop)) if not include)}
        assert seen[len(emitted) :] == max((b for b in beginnings if seen.endswith(b)), key=len)


@settings(deadline=None, max_examples=300)
@given(texts=pieces(), stops=STOPS, include=st.booleans(), min_tokens=st.integers(0, 6))
def test_stop_strings_complete_in_the_first_min_tokens_do_not_stop(texts, stops, include, min_tokens):
    check = checker(stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens)
    steps = run(check, [*texts, *[""] * min_tokens])
    ignored = len("".join(texts[:min_tokens]))
    want, reason = cut("".join(texts), stops, include, searched_from=ignored)
    assert "".join(s.text for s in steps) == want
    assert steps[-1].stop_reason == reason


@settings(deadline=None, max_examples=300)
@given(texts=pieces(), stops=STOPS, max_tokens=st.integers(1, 14))
def test_length_emits_what_was_held(texts, stops, max_tokens):
    steps = run(checker(max_tokens, stop=stops), texts)
    want, reason = cut("".join(texts[:max_tokens]), stops, False)
    assert "".join(s.text for s in steps) == want
    is_length = reason is None and len(texts) >= max_tokens
    assert steps[-1] == StopStep(steps[-1].text, "length" if is_length else "stop", reason)
    assert len(steps) <= max_tokens


@settings(deadline=None)
@given(texts=pieces(), stops=STOPS)
def test_flush_gives_the_rest(texts, stops):
    check = checker(stop=stops)
    steps = [check.step(WORD, t) for t in texts if not check.finished]
    assert "".join(s.text for s in steps) + check.flush() == cut("".join(texts), stops, False)[0]
    assert check.finished
    assert check.flush() == ""


def test_a_stop_string_across_tokens():
    check = checker(stop=["\n\nUser:"])
    assert [check.step(WORD, t) for t in ("Hi.\n", "\nUs", "er", ":x")] == [
        StopStep("Hi."),
        StopStep(""),
        StopStep(""),
        StopStep("", "stop", "\n\nUser:"),
    ]


def test_a_beginning_that_comes_to_nothing_is_emitted():
    check = checker(stop="abab")
    assert [check.step(WORD, t).text for t in ("aba", "a", "b", "x")] == ["", "aba", "", "abx"]


def test_of_strings_complete_at_once_the_first_listed_counts():
    assert checker(stop=["b", "ab"]).step(WORD, "xab") == StopStep("xa", "stop", "b")
    assert checker(stop=["ab", "b"]).step(WORD, "xab") == StopStep("x", "stop", "ab")


def test_the_string_complete_first_counts_not_the_first_listed():
    assert checker(stop=["c", "a"]).step(WORD, "xabc") == StopStep("x", "stop", "a")


@pytest.mark.parametrize(
    ("token", "options", "want"),
    [
        (EOS, {}, StopStep("", "stop", None)),
        (EOS, {"include_stop_str_in_output": True}, StopStep("<t>", "stop", None)),
        (EOS, {"ignore_eos": True}, StopStep("<t>")),
        (EOS, {"min_tokens": 1}, StopStep("<t>")),
        (STOP_ID, {}, StopStep("", "stop", STOP_ID)),
        (STOP_ID, {"include_stop_str_in_output": True}, StopStep("<t>", "stop", STOP_ID)),
        (STOP_ID, {"ignore_eos": True}, StopStep("", "stop", STOP_ID)),
        (STOP_ID, {"min_tokens": 1}, StopStep("<t>")),
        (WORD, {}, StopStep("<t>")),
        (WORD, {"max_tokens": 1}, StopStep("<t>", "length", None)),
        (EOS, {"max_tokens": 1}, StopStep("", "stop", None)),
        (EOS, {"max_tokens": 1, "min_tokens": 1}, StopStep("<t>", "length", None)),
        (WORD, {"max_tokens": 1, "stop": "t"}, StopStep("<", "stop", "t")),
        (STOP_ID, {"include_stop_str_in_output": True, "stop": "t"}, StopStep("<t", "stop", "t")),
    ],
)
def test_one_token(token, options, want):
    check = checker(**options)
    assert check.step(token, "<t>") == want
    assert check.finished == (want.finish_reason is not None)


def test_min_tokens_counts_tokens_before_the_stop():
    check = checker(min_tokens=2)
    assert [check.step(EOS).finish_reason for _ in range(3)] == [None, None, "stop"]


def test_a_stop_token_emits_what_was_held():
    check = checker(stop="abc")
    assert check.step(WORD, "xab") == StopStep("x")
    assert check.step(EOS, "</s>") == StopStep("ab", "stop", None)


def test_an_ended_request_takes_no_token():
    check = checker()
    check.step(EOS)
    with pytest.raises(AssertionError):
        check.step(WORD)


def test_long_stop_strings_cost_no_more_a_character():
    """Nearly matching text is the worst case of a search that starts over: 8,000 × 20,000 comparisons here."""
    check = checker(max_tokens=10**6, stop="a" * 8_000 + "b")
    for _ in range(100):
        assert check.step(WORD, "a" * 200).finish_reason is None
    assert check.step(WORD, "b").stop_reason == "a" * 8_000 + "b"
