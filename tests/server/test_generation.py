"""/v1/chat/completions and /v1/completions: what LLM answers, whole and in streams, and what is refused."""

from __future__ import annotations

import pytest

from tests.server.harness import (
    CHAT,
    COMPLETIONS,
    PICTURE_URL,
    answer,
    asks,
    events,
    noise_url,
    post,
    refused,
    scenes,
    serving,
    tiny,
)
from vlmfx import LLM, SamplingParams


@pytest.fixture(scope="module")
def service():
    with serving(tiny(), {"max_num_seqs": 4, "limit_mm_per_prompt": {"image": 2}}) as made:
        yield made


@pytest.fixture(scope="module")
def llm():
    return LLM(tiny())


def text_of(chunks, index=0):
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


def test_scenes_answers_a_question_about_a_picture():
    with serving(scenes()) as service:
        found = answer(service, CHAT, asks("What colour is the star?", PICTURE_URL))
        assert found["choices"][0]["message"]["content"] == "red"
        chunks = events(post(service, CHAT, asks("How many objects are there?", PICTURE_URL, stream=True)))
        assert text_of(chunks) == "4"


@pytest.mark.parametrize("urls", [[], [noise_url()], [noise_url(30, 90, 1), noise_url(64, 64, 2)]])
def test_a_chat_is_answered_as_by_llm(service, llm, urls):
    body = asks("What is it?", *urls, return_token_ids=True)
    (output,) = llm.chat(body["messages"], SamplingParams.greedy(max_tokens=12))
    found = answer(service, CHAT, body)
    (choice,) = found["choices"]
    assert choice["token_ids"] == list(output.outputs[0].token_ids)
    assert choice["message"] == {"role": "assistant", "content": output.outputs[0].text, "refusal": None}
    assert choice["finish_reason"] == output.outputs[0].finish_reason
    num_prompt, num_answer = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
    assert found["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
    }
    assert (found["object"], found["model"], found["id"][:9]) == ("chat.completion", "tiny", "chatcmpl-")


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_is_the_whole_in_pieces(service, n):
    body = asks("Why?", noise_url(), n=n, temperature=1.0, seed=5, logprobs=True, top_logprobs=2, ignore_eos=True)
    whole = answer(service, CHAT, body)
    chunks = events(post(service, CHAT, {**body, "stream": True}))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert len(mine) >= 2, "how many depends on who is quicker"
        assert text_of(chunks, choice["index"]) == choice["message"]["content"]
        content = [token for c in mine if c["logprobs"] for token in c["logprobs"]["content"]]
        assert content == choice["logprobs"]["content"]
        ends = [c["finish_reason"] for c in mine]
        assert ends == [None] * (len(ends) - 1) + [choice["finish_reason"]]


def test_usage_in_a_stream(service):
    body = asks("Why?", noise_url(), stream=True)
    usage = answer(service, CHAT, {**body, "stream": False})["usage"]
    chunks = events(post(service, CHAT, {**body, "stream_options": {"include_usage": True}}))
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], usage)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    chunks = events(post(service, CHAT, {**body, "stream_options": options}))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == usage["completion_tokens"]
    assert counts[0] <= 1, "each chunk has what is so far, not what will be"
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks[1:]} == {usage["prompt_tokens"]}
    assert chunks[-1]["usage"] == usage


def test_completions_of_several_prompts_whole_and_streamed(service, llm):
    body = {"prompt": ["Hello there", "x", [5, 6, 7]], "temperature": 0, "max_tokens": 6, "logprobs": 1}
    outputs = llm.generate(
        ["Hello there", "x", {"prompt_token_ids": [5, 6, 7]}], SamplingParams.greedy(max_tokens=6), use_tqdm=False
    )
    whole = answer(service, COMPLETIONS, body)
    assert whole["object"] == "text_completion"
    assert [choice["text"] for choice in whole["choices"]] == [output.outputs[0].text for output in outputs]
    chunks = events(post(service, COMPLETIONS, {**body, "stream": True, "stream_options": {"include_usage": True}}))
    assert chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        for key in ("tokens", "token_logprobs", "text_offset"):
            assert [x for c in mine if c["logprobs"] for x in c["logprobs"][key]] == choice["logprobs"][key]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]


def test_n_prompts_and_n_answers_are_counted_through(service):
    body = {"prompt": ["a b c", "x"], "n": 2, "temperature": 1, "seed": 3, "max_tokens": 4, "ignore_eos": True}
    whole = answer(service, COMPLETIONS, body)
    chunks = events(post(service, COMPLETIONS, {**body, "stream": True}))
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert [text_of(chunks, i) for i in range(4)] == [choice["text"] for choice in whole["choices"]]


def test_seeds_stops_and_forms(service):
    drawn = asks("Why?", temperature=1.0, seed=9, ignore_eos=True)
    first = answer(service, CHAT, drawn)["choices"][0]["message"]["content"]
    assert answer(service, CHAT, drawn)["choices"][0]["message"]["content"] == first
    assert answer(service, CHAT, {**drawn, "seed": 10})["choices"][0]["message"]["content"] != first
    stop = first[4:6]
    choice = answer(service, CHAT, {**drawn, "stop": [stop]})["choices"][0]
    assert choice["message"]["content"] == first[: first.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    chunks = events(post(service, CHAT, {**drawn, "stop": [stop], "stream": True}))
    assert text_of(chunks) == first[: first.index(stop)]
    for form in ({"structured_outputs": {"choice": ["yes", "no"]}}, {"guided_choice": ["yes", "no"]}):
        assert answer(service, CHAT, asks("Well?", **form))["choices"][0]["message"]["content"] in ("yes", "no")
    schema = {"name": "x", "schema": {"enum": ["a", "b"]}}
    found = answer(service, CHAT, asks("Well?", response_format={"type": "json_schema", "json_schema": schema}))
    assert found["choices"][0]["message"]["content"].strip() in ('"a"', '"b"')


def test_a_last_message_is_continued(service, llm):
    body = asks("Why?", add_generation_prompt=False, continue_final_message=True)
    body["messages"].append({"role": "assistant", "content": "Because of"})
    (output,) = llm.chat(
        body["messages"], SamplingParams.greedy(max_tokens=12), add_generation_prompt=False, continue_final_message=True
    )
    assert answer(service, CHAT, body)["choices"][0]["message"]["content"] == output.outputs[0].text


def test_one_salt_does_not_see_what_another_has_cached(service):
    text = "A question that is as long as several blocks of the cache, so that it can be found in there again. " * 2
    counters = service.engine.engine.counters
    found = []
    for salt in ("a", "a", "b"):
        before = counters.num_cached
        answer(service, CHAT, asks(text, cache_salt=salt))
        found.append(counters.num_cached - before)
    assert found[0] == found[2] == 0 < found[1]


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        (asks("x", stream=False, stream_options={"include_usage": True}), 400, "stream_options", "stream"),
        (asks("x", stream=True, stream_options={"usage": True}), 400, "stream_options.usage", "include_usage"),
        (asks("x", stream="yes"), 400, "stream", "True or False"),
        (asks("x", stream=True, prompt_logprobs=1), 400, "prompt_logprobs", "stream"),
        (asks("x", temprature=1), 400, "temprature", "no such field"),
        (asks("x", tools=[{"type": "function"}]), 400, "tools", "tools"),
        (asks("x", max_tokens=10**6), 400, "max_tokens", "maximum context length"),
        ({**asks("x"), "max_tokens": None, "max_completion_tokens": 10**6}, 400, "max_completion_tokens", "leaves"),
        (asks("word " * 9000), 400, "prompt", "tokens long"),
        (asks("x", n=5, temperature=1), 400, "n", "max_num_seqs"),
        (asks("x", chat_template="{{ 1 }}"), 400, "chat_template", "--trust-request-chat-template"),
        (asks("x", model="gpt-4o"), 404, "model", "'tiny' is served"),
        (asks("x", *[noise_url()] * 3), 400, "multi_modal_data.image", "limit_mm_per_prompt allows 2 images"),
        (asks("x", "data:image/png;base64,AAAA"), 400, None, "image"),
        (asks("x", structured_outputs={"json": {"type": 3}}), 400, "structured_outputs.json", ""),
        (asks("x", structured_outputs={"json": 3}), 400, "structured_outputs.json", ""),
        (asks("x", structured_outputs={"sent_as": "x"}), 400, "structured_outputs.sent_as", "need one of json"),
        (asks("x", guided_json={"type": 3}), 400, "guided_json", "cannot be compiled"),
        (asks("x", guided_json=3), 400, "guided_json", "JSON schema"),
        (asks("x", guided_regex="("), 400, "guided_regex", "cannot be compiled"),
        (asks("x", guided_choice=[]), 400, "guided_choice", "at least one"),
        (asks("x", guided_grammar="start: missing"), 400, "guided_grammar", "cannot be compiled"),
        (asks("x", guided_grammar="start: %json {}"), 400, "guided_grammar", "as structured_outputs.json"),
        (asks("x", response_format={"type": "json_schema", "json_schema": {"schema": {"type": 3}}}), 400,
         "response_format.json_schema.schema", "cannot be compiled"),
        (asks("x", response_format={"type": "json_schema", "json_schema": {"json_schema": 3}}), 400,
         "response_format.json_schema.json_schema", "JSON schema"),
        ({"messages": []}, 400, "messages", "at least one"),
        ([1], 400, "body", "JSON object"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("streams", [False, True])
def test_what_is_wrong_is_named(service, body, status, param, says, streams):
    if streams and isinstance(body, dict):
        body = {"stream": True, **body}
    error = refused(service, CHAT, body, status)
    assert param is None or error["param"] == param
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("detail", ["auto", "low", "high", None])
def test_details_and_uuids_of_images_are_accepted(service, detail):
    body = asks("What?", noise_url())
    expected = answer(service, CHAT, body)["choices"]
    body["messages"][0]["content"][0] |= {"uuid": "x"}
    body["messages"][0]["content"][0]["image_url"]["detail"] = detail
    assert answer(service, CHAT, body)["choices"] == expected
    body["messages"][0]["content"][0]["image_url"]["detail"] = "tiny"
    assert refused(service, CHAT, body)["param"].endswith(".detail")


def test_a_damaged_image_fails_with_a_status_also_in_a_stream(service):
    url = noise_url()[:-400]
    for streams in (False, True):
        error = refused(service, CHAT, asks("x", url + "=" * (-len(url.partition(",")[2]) % 4), stream=streams))
        assert error["type"] == "invalid_request_error"


def test_settings_of_images_change_their_tokens(service):
    body = asks("What?", noise_url(200, 200))
    many = answer(service, CHAT, body)["usage"]["prompt_tokens"]
    few = answer(service, CHAT, {**body, "mm_processor_kwargs": {"max_pixels": 56 * 56}})["usage"]["prompt_tokens"]
    assert few < many
    error = refused(service, CHAT, {**body, "mm_processor_kwargs": {"pixels": 1}})
    assert error["param"] == "mm_processor_kwargs"


def test_templates_of_requests_where_they_are_trusted():
    with serving(tiny(), trust_request_chat_template=True) as service:
        body = asks("x", chat_template="{{ 'Hello' }}", return_token_ids=True, max_tokens=1)
        found = answer(service, CHAT, body)
        assert found["prompt_token_ids"] == service.processor.tokenizer.encode("Hello")
        for template in ("{% for i in range(10**9) %}{{ i }}{% endfor %}", "{{ ''.__class__.__mro__ }}", "/etc/passwd"):
            assert refused(service, CHAT, {**body, "chat_template": template})["param"] == "chat_template"


def test_a_request_that_takes_too_long_ends():
    with serving(tiny(), {"max_num_seqs": 1}, request_timeout_s=0.2) as service:
        body = asks("x", max_tokens=400, ignore_eos=True)
        assert refused(service, CHAT, body, 504)["type"] == "server_error"
        response = post(service, CHAT, {**body, "stream": True})
        chunks = events(response)
        assert "took longer" in chunks[-1]["error"]["message"]
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
