"""/tokenize and /detokenize: the ids that the model is given."""

from __future__ import annotations

import pytest

from tests.server.harness import CHAT, answer, asks, noise_url, refused, serving, tiny


@pytest.fixture(scope="module")
def service():
    with serving(tiny()) as made:
        yield made


@pytest.mark.parametrize("urls", [[], [noise_url(), noise_url(80, 80, 1)]])
def test_a_chat_is_counted_as_it_is_answered(service, urls):
    body = asks("What is it?", *urls)
    usage = answer(service, CHAT, body)["usage"]
    found = answer(service, "/tokenize", {"model": "tiny", "messages": body["messages"]})
    assert found["count"] == len(found["tokens"]) == usage["prompt_tokens"]
    assert found["max_model_len"] == service.max_model_len
    assert found["token_strs"] is None


def test_counting_reads_the_header_of_a_picture_alone(service):
    whole, cut = noise_url(), noise_url()[: len("data:image/png;base64,") + 200]
    counts = [answer(service, "/tokenize", {"messages": asks("x", url)["messages"]})["count"] for url in (whole, cut)]
    assert counts[0] == counts[1]


def test_a_text_there_and_back(service):
    tokenizer = service.processor.tokenizer
    found = answer(service, "/tokenize", {"prompt": "Hello <|im_end|> there", "return_token_strs": True})
    assert found["tokens"] == tokenizer.encode("Hello <|im_end|> there")
    assert found["token_strs"] == [tokenizer.id_to_token(i) for i in found["tokens"]]
    assert answer(service, "/detokenize", {"tokens": found["tokens"]}) == {"prompt": "Hello <|im_end|> there"}
    plain = answer(service, "/tokenize", {"prompt": "Hello", "add_special_tokens": False})
    assert plain["tokens"] == tokenizer.encode("Hello", add_special_tokens=False)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "x"}], "add_special_tokens": True},
            "add_special_tokens",
        ),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}], "chat_template": "x{{1}}"}, "chat_template"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, "tokens"),
    ],
)
def test_what_is_wrong_is_named(service, path, body, param):
    assert refused(service, path, body)["param"] == param


def test_ids_that_no_token_has_are_refused(service):
    assert "the model's vocabulary" in refused(service, "/detokenize", {"tokens": [5, 10**12]})["message"]
