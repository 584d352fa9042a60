"""Outputs to bodies, of outputs written by hand."""

from __future__ import annotations

import base64
import json
import math
import struct

import pytest

from vlmfx.engine.embedding import EmbeddingOutput, EmbeddingRequestOutput
from vlmfx.engine.request import CompletionOutput, Logprob, RequestOutput
from vlmfx.errors import DeadlineExceeded, EngineFull, InternalError, InvalidRequest
from vlmfx.openai.requests import Form
from vlmfx.openai.responses import chat_response, completion_response, embedding_response, error_response

FIRST = {7: Logprob(-2.0, 3, "é"), 1: Logprob(-0.5, 1, "a"), 2: Logprob(-math.inf, 2, "b")}


def output(num: int = 1) -> RequestOutput:
    texts = [CompletionOutput(i, f"é{i}", (7, 1), -2.5, [FIRST, {1: FIRST[1]}], "stop", 1) for i in range(num)]
    return RequestOutput("0", "p", [4, 5, 6], texts, True, prompt_logprobs=[None, {5: Logprob(-1.0, 1, "x")}])


def test_a_chat():
    body = chat_response(output(2), "m", 12, Form(num_top=2), id="chatcmpl-1")
    assert (body["id"], body["object"], body["created"], body["model"]) == ("chatcmpl-1", "chat.completion", 12, "m")
    first, second = body["choices"]
    assert (first["index"], second["index"]) == (0, 1)
    assert second["message"] == {"role": "assistant", "content": "é1", "refusal": None}
    assert (first["finish_reason"], first["stop_reason"]) == ("stop", 1)
    token = first["logprobs"]["content"][0]
    assert (token["token"], token["logprob"], token["bytes"]) == ("é", -2.0, [195, 169])
    assert [(top["token"], top["logprob"]) for top in token["top_logprobs"]] == [("a", -0.5), ("b", -9999.0)]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert body["prompt_logprobs"] == [None, {"5": {"logprob": -1.0, "rank": 1, "decoded_token": "x"}}]
    json.dumps(body, allow_nan=False)


def test_token_ids_are_shown_where_asked_for():
    body = chat_response(output(), "m", 0, Form(returns_ids=True, names_ids=True))
    assert body["prompt_token_ids"] == [4, 5, 6]
    (choice,) = body["choices"]
    assert choice["token_ids"] == [7, 1]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["token_id:7", "token_id:1"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []


def test_completions_of_several_prompts():
    body = completion_response([output(2), output(1)], "m", 0, Form(num_top=1))
    assert (body["object"], body["id"][:5]) == ("text_completion", "cmpl-")
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["text"] for choice in body["choices"]] == ["é0", "é1", "é0"]
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["é", "a"], "token_logprobs": [-2.0, -0.5], "text_offset": [0, 1],
        "top_logprobs": [{"é": -2.0, "a": -0.5}, {"a": -0.5}],
    }  # fmt: skip
    assert body["usage"] == {"prompt_tokens": 6, "completion_tokens": 6, "total_tokens": 12}


def test_vectors_as_numbers_and_as_base64():
    outputs = [EmbeddingRequestOutput(str(i), EmbeddingOutput([0.5, -1.0 * i]), [1, 2]) for i in range(2)]
    body = embedding_response(outputs, "m", 0)
    assert body["data"][1] == {"object": "embedding", "index": 1, "embedding": [0.5, -1.0]}
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == 4
    text = embedding_response(outputs, "m", 0, is_base64=True)["data"][1]["embedding"]
    assert struct.unpack("<2f", base64.b64decode(text)) == (0.5, -1.0)


@pytest.mark.parametrize(
    ("error", "status", "kind", "param"),
    [
        (InvalidRequest("n", "too many."), 400, "invalid_request_error", "n"),
        (InternalError("broken."), 500, "server_error", None),
        (EngineFull("full."), 503, "server_error", None),
        (DeadlineExceeded("late."), 504, "server_error", None),
    ],
)
def test_errors(error, status, kind, param):
    assert error_response(error) == (
        status,
        {"error": {"message": str(error), "type": kind, "param": param, "code": None}},
    )
