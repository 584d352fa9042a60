"""What is new in a request to chunks of a stream, of events written by hand."""

from __future__ import annotations

import pytest

from vlmfx.engine.events import Event
from vlmfx.engine.request import Logprob, SamplingParams
from vlmfx.engine.sequence import Request
from vlmfx.errors import InvalidRequest
from vlmfx.openai.chunks import Chunks, StreamForm, stream_form
from vlmfx.openai.requests import Form


def request(number: int, logprobs: int | None = None) -> Request:
    params = SamplingParams(logprobs=logprobs)
    return Request(number=number, num_tokens=4, load=lambda: pytest.fail("not here"), params=params, arrival=0.0)


def chunks(is_chat: bool = True, form: Form | None = None, **stream: bool) -> Chunks:
    made = Chunks(
        is_chat=is_chat, id="x-1", created=12, model_name="m", form=form or Form(), stream=StreamForm(**stream)
    )
    made.places, made.num_prompt = {7: 0, 8: 2}, {7: 4, 8: 5}
    return made


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, None),
        ({"stream": False}, None),
        ({"stream": None, "stream_options": None}, None),
        ({"stream": True}, StreamForm()),
        ({"stream": True, "stream_options": {}}, StreamForm()),
        ({"stream": True, "stream_options": {"include_usage": True}}, StreamForm(shows_usage=True)),
        ({"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
         StreamForm(shows_usage=True, is_continuous=True)),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True, "include_usage": None}}, StreamForm()),
    ],
)  # fmt: skip
def test_how_a_body_is_streamed(body, expected):
    assert stream_form(body) == expected


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"stream": 1}, "stream"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"x" * 500: 1}}, f"stream_options.{'x' * 65}"),
        ({"stream": True, "prompt_logprobs": 0}, "prompt_logprobs"),
    ],
)
def test_what_is_wrong_with_a_stream_is_named(body, field):
    with pytest.raises(InvalidRequest) as caught:
        stream_form(body)
    assert caught.value.field == field


def test_events_that_came_together_are_one_chunk_a_choice():
    first, second, made = request(7), request(8), chunks()
    events = [
        Event(request=first, index=0, text="a", token_ids=(1,)),
        Event(request=second, index=0, text="x", token_ids=(2,)),
        Event(request=first, index=0, text="b", token_ids=(3,), finish_reason="stop", stop_reason=9),
    ]
    found = made.of(events)
    assert [body["choices"][0]["index"] for body in found] == [0, 2]
    assert found[0]["choices"][0] == {
        "index": 0, "delta": {"content": "ab"}, "logprobs": None, "finish_reason": "stop", "stop_reason": 9,
    }  # fmt: skip
    assert found[1]["choices"][0]["finish_reason"] is None
    assert (found[0]["id"], found[0]["created"], found[0]["model"]) == ("x-1", 12, "m")
    assert "usage" not in found[0]


def test_a_token_without_text_is_shown_where_tokens_are():
    event = Event(request=request(7), token_ids=(5,))
    assert chunks().of([event]) == []
    (shown,) = chunks(form=Form(returns_ids=True)).of([event])
    assert shown["choices"][0]["token_ids"] == [5]
    (counted,) = chunks(shows_usage=True, is_continuous=True).of([event])
    assert counted["usage"] == {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}


def test_offsets_of_a_completion_go_on():
    made, one = chunks(is_chat=False, form=Form(num_top=1)), request(7, logprobs=1)

    def event(text: str, token: int) -> Event:
        return Event(request=one, text=text, token_ids=(token,), logprobs=({token: Logprob(-1.0, 1, text)},))

    offsets = [made.of([event(text, i)])[0]["choices"][0]["logprobs"]["text_offset"] for i, text in enumerate("ab")]
    assert offsets == [[0], [1]]
    assert made.first(3) == []


def test_usage_comes_last_where_it_is_asked_for():
    assert chunks().last() == []
    made = chunks(shows_usage=True)
    made.of([Event(request=request(7), text="a", token_ids=(1,))])
    (last,) = made.last()
    assert (last["choices"], last["usage"]["completion_tokens"], last["usage"]["prompt_tokens"]) == ([], 1, 9)
    assert [body["usage"] for body in made.first(2)] == [None, None]
    assert made.first(1)[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
