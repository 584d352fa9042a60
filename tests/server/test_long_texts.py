"""A text that cannot fit is refused before it is tokenized, wherever it is sent."""

from __future__ import annotations

import pytest

from tests.server.harness import CHAT, COMPLETIONS, EMBEDDINGS, post, serving, tiny
from vlmfx.processing.tokenizer import Tokenizer

LONG = "The quick brown fox jumps over the lazy dog. " * (2**21 // 45)
CHAT_BODY = {"messages": [{"role": "user", "content": LONG}]}


@pytest.mark.parametrize(
    ("task", "path", "body"),
    [
        ("generate", CHAT, CHAT_BODY),
        ("generate", COMPLETIONS, {"prompt": LONG}),
        ("generate", COMPLETIONS, {"prompt": ["Hello", LONG]}),
        ("generate", "/tokenize", {"prompt": LONG}),
        ("generate", "/tokenize", {"prompt": LONG, "add_special_tokens": False}),
        ("generate", "/tokenize", CHAT_BODY),
        ("embed", EMBEDDINGS, {"input": LONG}),
        ("embed", EMBEDDINGS, CHAT_BODY),
        ("embed", "/v1/score", {"text_1": "x", "text_2": LONG}),
    ],
)
def test_a_text_that_cannot_fit_is_not_tokenized(monkeypatch, task, path, body):
    true, longest = Tokenizer.encode, 0

    def encode(self, text, **options):
        nonlocal longest
        longest = max(longest, len(text))
        return true(self, text[:5000], **options)

    monkeypatch.setattr(Tokenizer, "encode", encode)
    with serving(tiny(), {"task": task}) as service:
        response = post(service, path, body)
    assert longest < 5000
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "prompt"
    assert "it is at least " in error["message"]
    assert "shorten it" in error["message"]
