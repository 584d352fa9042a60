"""/v1/embeddings and /v1/score: the vectors that LLM gives."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest

from tests.server.harness import CHAT, EMBEDDINGS, answer, asks, noise_url, refused, serving, tiny
from vlmfx import LLM


@pytest.fixture(scope="module")
def service():
    with serving(tiny(), {"task": "embed"}) as made:
        yield made


@pytest.fixture(scope="module")
def llm():
    return LLM(tiny(), task="embed")


def test_texts_ids_and_their_usage(service, llm):
    expected = [output.outputs.embedding for output in llm.embed(["x y", "z"], use_tqdm=False)]
    found = answer(service, EMBEDDINGS, {"model": "tiny", "input": ["x y", "z"]})
    assert [one["embedding"] for one in found["data"]] == [pytest.approx(vector, abs=1e-6) for vector in expected]
    ids = [service.processor.tokenizer.encode(text) for text in ("x y", "z")]
    assert answer(service, EMBEDDINGS, {"input": ids})["data"] == found["data"]
    assert found["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert (found["object"], found["data"][1]["index"]) == ("list", 1)


def test_a_conversation_with_a_picture_short_and_in_base64(service, llm):
    messages = asks("Represent it.", noise_url())["messages"]
    (output,) = llm.embed({"messages": messages, "add_generation_prompt": False}, dimensions=8)
    body = {"messages": messages, "dimensions": 8, "encoding_format": "base64"}
    (one,) = answer(service, EMBEDDINGS, body)["data"]
    assert struct.unpack("<8f", base64.b64decode(one["embedding"])) == pytest.approx(output.outputs.embedding, abs=1e-6)


def test_many_inputs_come_back_in_order(service):
    texts = [f"text number {i}" for i in range(70)]
    found = answer(service, EMBEDDINGS, {"input": texts, "dimensions": 4})["data"]
    for i in (0, 33, 69):
        (alone,) = answer(service, EMBEDDINGS, {"input": texts[i], "dimensions": 4})["data"]
        assert found[i]["embedding"] == pytest.approx(alone["embedding"], abs=1e-5)


def test_scores(service, llm):
    picture = {"type": "image_url", "image_url": {"url": noise_url()}}
    parts = {"content": [picture, {"type": "text", "text": "z"}]}
    sides: list[tuple[Any, Any, list[Any]]] = [
        ({"text_1": "x", "text_2": ["y", "z"]}, "x", ["y", "z"]),
        ({"queries": ["x", "y"], "documents": ["y", "z"]}, ["x", "y"], ["y", "z"]),
        ({"text_1": "x", "text_2": parts}, "x", [[picture], [{"type": "text", "text": "z"}]]),
        ({"text_1": "x", "text_2": [parts]}, "x", [parts["content"]]),
    ]
    for body, first, second in sides:
        prompts = [
            p if isinstance(p, str) else {"messages": [{"role": "user", "content": p}], "add_generation_prompt": False}
            for p in second
        ]
        expected = [output.outputs.score for output in llm.score(first, prompts, use_tqdm=False)]
        found = answer(service, "/v1/score", body)
        assert [one["score"] for one in found["data"]] == pytest.approx(expected, abs=1e-5)
        assert found["data"][0]["object"] == "score"
        again = answer(service, "/score", body)["data"]
        assert [one["score"] for one in again] == pytest.approx(expected, abs=1e-5)  # another batch, other roundings


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (EMBEDDINGS, {"input": ""}, "input"),
        (EMBEDDINGS, {"input": "x", "dimensions": 10**6}, "dimensions"),
        (EMBEDDINGS, {"input": "x", "encoding_format": "int8"}, "encoding_format"),
        (EMBEDDINGS, {"input": "x", "messages": []}, "input"),
        (EMBEDDINGS, {"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1 }}"}, "chat_template"),
        (EMBEDDINGS, {"input": ["x", "word " * 9000]}, "prompt"),
        ("/v1/score", {"text_1": "x"}, "text_2"),
        ("/v1/score", {"text_1": "x", "documents": "y"}, "text_1"),
        ("/v1/score", {"text_1": ["x", "y"], "text_2": ["x", "y", "z"]}, "text_1"),
        ("/v1/score", {"text_1": "x", "text_2": {"text": "y"}}, "text_2"),
        ("/v1/score", {"text_1": "x", "text_2": "y", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
    ],
)
def test_what_is_wrong_is_named(service, path, body, param):
    assert refused(service, path, body)["param"] == param


def test_each_task_has_its_paths(service):
    assert "--task generate" in refused(service, CHAT, asks("x"), 404)["message"]
    with serving(tiny()) as other:
        assert "--task embed" in refused(other, EMBEDDINGS, {"input": "x"}, 404)["message"]
