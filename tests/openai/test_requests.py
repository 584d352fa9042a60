"""Bodies to prompts and SamplingParams: every field, by OpenAI's names and vLLM's; what is wrong is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from vlmfx import SamplingParams
from vlmfx.engine.structured_outputs import StructuredOutputsParams
from vlmfx.errors import InvalidRequest
from vlmfx.openai.fields import check_model
from vlmfx.openai.requests import (
    Form,
    chat_request,
    completion_request,
    embedding_request,
    form_of,
    request_options,
)
from vlmfx.openai.sampling import REST_OF_CONTEXT

MESSAGES = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object"}


def form(**kind):
    return StructuredOutputsParams(**kind)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"temperature": None, "stop": None, "user": "x", "metadata": {"a": "b"}, "store": True}, {}),
        ({"use_beam_search": False, "length_penalty": 1, "echo": False, "modalities": ["text"]}, {}),
        ({"max_tokens": 3}, {"max_tokens": 3}),
        ({"max_completion_tokens": 4}, {"max_tokens": 4}),
        ({"max_completion_tokens": 4, "max_tokens": 4}, {"max_tokens": 4}),
        ({"temperature": 0, "top_p": 0.5, "seed": 7}, {"temperature": 0.0, "top_p": 0.5, "seed": 7}),
        ({"n": 3, "stop": "a"}, {"n": 3, "stop": "a"}),
        ({"stop": ["a", "b"], "stop_token_ids": [3]}, {"stop": ["a", "b"], "stop_token_ids": [3]}),
        ({"presence_penalty": 1, "frequency_penalty": -1}, {"presence_penalty": 1, "frequency_penalty": -1}),
        ({"logit_bias": {"5": -100}}, {"logit_bias": {5: -100.0}}),
        ({"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2}, {"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2}),
        ({"min_tokens": 2, "ignore_eos": True}, {"min_tokens": 2, "ignore_eos": True}),
        ({"bad_words": ["a"], "allowed_token_ids": [1]}, {"bad_words": ["a"], "allowed_token_ids": [1]}),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False},
         {"include_stop_str_in_output": True, "skip_special_tokens": False}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 3, "prompt_logprobs": 1}, {"logprobs": 3, "prompt_logprobs": 1}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"structured_outputs": form(json_object=True)}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}},
         {"structured_outputs": form(json=SCHEMA)}),
        ({"structured_outputs": {"regex": "a+", "json": None}}, {"structured_outputs": form(regex="a+")}),
        ({"guided_json": SCHEMA}, {"structured_outputs": form(json=SCHEMA)}),
        ({"guided_choice": ["a", "b"]}, {"structured_outputs": form(choice=["a", "b"])}),
        ({"guided_regex": "a"}, {"structured_outputs": form(regex="a")}),
        ({"guided_grammar": 'start: "a"'}, {"structured_outputs": form(grammar='start: "a"')}),
        ({"tool_choice": "auto", "tools": []}, {}),
    ],
)  # fmt: skip
def test_sampling_of_a_chat(fields, expected):
    prompt, params = chat_request({"model": "m", "messages": MESSAGES, **fields})
    assert prompt == {"messages": MESSAGES}
    assert params == SamplingParams(**{"max_tokens": REST_OF_CONTEXT, **expected})


def test_what_goes_to_the_template_goes_with_the_messages():
    beside = {
        "chat_template": "{{ 1 }}", "chat_template_kwargs": {"a": 1}, "add_generation_prompt": False,
        "continue_final_message": True, "mm_processor_kwargs": {"max_pixels": 1}, "media_io_kwargs": {"video": {}},
        "chat_template_content_format": "string",
    }  # fmt: skip
    prompt, _ = chat_request({"messages": MESSAGES, **beside})
    assert prompt == {"messages": MESSAGES, **beside}
    tools = [{"type": "function", "function": {"name": "f"}}]
    prompt, _ = chat_request(
        {"messages": MESSAGES, "tools": tools, "tool_choice": "none", "chat_template_kwargs": {"a": 1}}
    )
    assert prompt["chat_template_kwargs"] == {"tools": tools, "a": 1}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"messages": None}, "messages"),
        ({"temprature": 1}, "temprature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"prompt": "x"}, "prompt"),
    ],
)  # fmt: skip
def test_a_wrong_field_of_a_chat_is_named(fields, name):
    with pytest.raises(InvalidRequest) as caught:
        chat_request({"messages": MESSAGES, **fields})
    assert caught.value.field == name
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("body", [None, [], "x", 3])
def test_a_body_is_an_object(body):
    for read in (chat_request, completion_request, embedding_request):
        with pytest.raises(InvalidRequest, match=r"^body: "):
            read(body)


TEXTS_AND_IDS = [
    ("a", [{"prompt": "a"}]),
    (["a", "b"], [{"prompt": "a"}, {"prompt": "b"}]),
    ([1, 2], [{"prompt_token_ids": [1, 2]}]),
    ([[1], [2, 3]], [{"prompt_token_ids": [1]}, {"prompt_token_ids": [2, 3]}]),
]
NO_PROMPTS: list[Any] = [None, "", [], [""], [[]], [1, "a"], [True], {"a": 1}, 3, ["a"] * 2049]


@pytest.mark.parametrize(("given", "prompts"), TEXTS_AND_IDS)
def test_prompts_of_completions_and_embeddings(given, prompts):
    assert completion_request({"prompt": given})[0] == prompts
    assert embedding_request({"input": given}).prompts == prompts


@pytest.mark.parametrize("given", NO_PROMPTS)
def test_what_is_no_prompt_is_refused(given):
    with pytest.raises(InvalidRequest, match=r"^prompt: "):
        completion_request({"prompt": given})
    with pytest.raises(InvalidRequest, match=r"^input: "):
        embedding_request({"input": given})


def test_sampling_of_a_completion():
    assert completion_request({"prompt": "a"})[1] == SamplingParams(max_tokens=16)
    assert completion_request({"prompt": "a", "logprobs": 2, "max_tokens": 5})[1] == SamplingParams(
        logprobs=2, max_tokens=5
    )
    for fields in ({"logprobs": True}, {"messages": MESSAGES}, {"echo": True}, {"suffix": "x"}):
        with pytest.raises(InvalidRequest, match=next(iter(fields))):
            completion_request({"prompt": "a", **fields})


def test_embeddings():
    made = embedding_request({"input": "a", "dimensions": 8, "encoding_format": "base64", "user": "x"})
    assert (made.dimensions, made.is_base64) == (8, True)
    made = embedding_request({"messages": MESSAGES, "chat_template_kwargs": {"a": 1}})
    assert made.prompts == [{"messages": MESSAGES, "chat_template_kwargs": {"a": 1}, "add_generation_prompt": False}]
    for fields in (
        {"n": 2},
        {"dimensions": 0},
        {"encoding_format": "int8"},
        {"messages": MESSAGES},
        {"chat_template": "x"},
    ):
        with pytest.raises(InvalidRequest):
            embedding_request({"input": "a", **fields})


def test_what_a_response_shows_and_how_a_request_runs():
    params = SamplingParams(logprobs=2)
    assert form_of({}, params) == Form(num_top=2)
    assert form_of({"return_token_ids": True, "return_tokens_as_token_ids": True}, params) == Form(
        num_top=2, returns_ids=True, names_ids=True
    )
    assert request_options({"priority": -1, "cache_salt": "s"}) == {"priority": -1, "salt": "s"}
    assert request_options({"priority": None}) == {}
    for body in ({"priority": "high"}, {"cache_salt": ""}):
        with pytest.raises(InvalidRequest):
            request_options(body)


def test_the_model_is_the_one_that_is_served_or_not_named():
    check_model({"model": "m"}, "m")
    check_model({}, "m")
    with pytest.raises(InvalidRequest, match=r"^model: it is 'other'"):
        check_model({"model": "other"}, "m")
