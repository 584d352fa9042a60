"""Requests of every kind that a service sees, good ones and bad ones, for tests that run many of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from string import ascii_letters
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.pictures import about, encoded, picture, placeholder
from tests.strategies import normal
from tests.videos import noise
from vlmfx.checkpoint import Model
from vlmfx.compile.executor import EagerExecutor
from vlmfx.compile.layout import BLOCK_SIZE
from vlmfx.engine import runner
from vlmfx.engine.structured_outputs import StructuredOutputsParams
from vlmfx.models.layers import Cache
from vlmfx.models.vision_inputs import VisionInputs

SIZES = [(60, 40), (30, 90), (64, 64), (90, 33), (56, 56), (120, 60)]
PREFIX = "You answer questions about pictures. " * 3  # more than two blocks of the cache
IMAGE, FORM = r"multi_modal_data\.image", r"structured_outputs\."
RULES: list[dict[str, Any]] = [
    {},
    {"logprobs": 3},
    {"prompt_logprobs": 1, "logprobs": 0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "logprobs": 2},
    {"temperature": 1.5, "min_p": 0.02},
    {"temperature": 1.0, "n": 3},
    {"temperature": 1.2, "n": 2, "logprobs": 1, "presence_penalty": 0.5},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.5},
    {"stop": ["e", "a"]},
    {"temperature": 1.0, "stop": ["s", "o"], "include_stop_str_in_output": True},
    {"stop_token_ids": [*range(100, 200)]},
    {"temperature": 1.5, "ignore_eos": False, "min_tokens": 3},
    {"bad_words": ["the", "what is"]},
    {"temperature": 1.0, "logit_bias": {"300": 4.0, "301": -100.0}},
    {"allowed_token_ids": [*range(50, 90)]},
    {"structured_outputs": StructuredOutputsParams(choice=["a cat", "a dog", "nothing"])},
    {"temperature": 1.0, "n": 2, "structured_outputs": StructuredOutputsParams(regex="[a-z]+ [0-9]{1,3}")},
    {"temperature": 1.0, "detokenize": False},
]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request as its user writes it: prompt, arguments of SamplingParams, other arguments of `AsyncEngine.generate`; and, a pattern, the
    error that a bad one fails by."""

    name: str
    prompt: Any
    params: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def good(model: Model, count: int, seed: int = 0) -> list[Ask]:
    """Each kind of prompt with each kind of parameters, as far as `count` goes."""
    rng, made = Random(seed), []
    for number in range(count):
        rules = RULES[number % len(RULES)]
        kind = PROMPTS[(number + number // len(RULES)) % len(PROMPTS)]
        params = {"temperature": 0.0, "ignore_eos": True, "max_tokens": rng.randint(3, 10), **rules}
        if params["temperature"]:
            params["seed"] = rng.getrandbits(40)
        options = {"priority": rng.choice([0, 0, 1]), "salt": rng.choice(["", "", "another tenant"])}
        name = f"good {number}: {kind.__name__}, {rules}"
        made.append(Ask(name=name, prompt=kind(model, rng), params=params, options=options))
    return made


def text(model: Model, rng: Random) -> Any:
    return "A question about nothing at all. " * rng.randint(1, 6)


def beginning(model: Model, rng: Random) -> Any:
    return PREFIX + rng.choice(["What is it?", "Why?", "Where is the cat, and who has seen it last?"])


def ids(model: Model, rng: Random) -> Any:
    return {"prompt_token_ids": [rng.randint(3, 330) for _ in range(rng.randint(1, 70))]}


def alike(model: Model, rng: Random) -> Any:
    """But for one token of the first blocks."""
    tokens = [*range(60, 110)]
    tokens[rng.randrange(32)] = 59
    return {"prompt_token_ids": tokens}


def image(model: Model, rng: Random) -> Any:
    return about(model, _picture(rng), text=rng.choice(["What is it?", "Why?", PREFIX]))


def file(model: Model, rng: Random) -> Any:
    return about(model, encoded(_picture(rng)), text="Read it.")


def images(model: Model, rng: Random) -> Any:
    return about(model, *(_picture(rng) for _ in range(rng.randint(2, 3))), text="Compare them.")


def embeds(model: Model, rng: Random) -> Any:
    return _with_rows(model, rng.randrange(3))


def overflowing(model: Model, rng: Random) -> Any:
    """Embeddings that are finite, of which the model makes NaN: the answer is nonsense, and others' are not."""
    return _with_rows(model, 0, lambda rows: torch.full_like(rows, 3e38))


def video(model: Model, rng: Random) -> Any:
    mark = model.processor.functions.PLACEHOLDERS.get("video")
    if mark is None:
        return image(model, rng)
    frames = noise(4, 56, 84, rng.randrange(2))
    return {"prompt": mark.format(number=1) + "What moves?", "multi_modal_data": {"video": frames}}


def chat(model: Model, rng: Random) -> Any:
    parts = [{"type": "image", "image": _picture(rng)}, {"type": "text", "text": "What is it?"}]
    return {"messages": [{"role": "user", "content": parts}]}


PROMPTS = [text, image, beginning, images, ids, embeds, file, alike, chat, video, overflowing]


def bad(model: Model, capacity: int, unlucky_token: int) -> list[Ask]:
    """One of each kind that fails; capacity: tokens that the engine's cache holds; unlucky_token: what `break_programs` fails for."""
    rng = Random(1)
    whole, unlucky = encoded(_picture(rng)), [unlucky_token]
    tokenizer = model.processor.tokenizer
    half, known = whole[: len(whole) // 2], tokenizer.encode(PREFIX)
    words = {word: tokenizer.encode(word, add_special_tokens=False) for word in ascii_letters}
    word = next(word for word, tokens in words.items() if len(tokens) == 1)
    prompts: dict[str, tuple[str, Any]] = {
        "no prompt": ("prompt: it is empty", ""),
        "no known key": ("images", {"prompt": "x", "images": 1}),
        "an id that is none": ("prompt_token_ids", {"prompt_token_ids": [10**9]}),
        "bytes that are no image": (IMAGE, about(model, b"no image at all")),
        "a file that ends early": (IMAGE, about(model, half)),
        "a picture that ends early": (IMAGE, about(model, Image.open(io.BytesIO(half)))),
        "an image too few": ("placeholders but 1", about(model, _picture(rng), text=placeholder(model, 2))),
        "an image too many": ("0 image placeholders but 1", {**about(model, _picture(rng)), "prompt": "What?"}),
        "rows of another width": (f"{IMAGE}: embeddings have shape", _with_rows(model, 0, lambda rows: rows[..., 1:])),
        "rows of NaN": (f"{IMAGE}: .* are not finite", _with_rows(model, 0, lambda rows: rows * torch.nan)),
        "too few rows": ("rows|placeholder", _with_rows(model, 0, lambda rows: rows[..., 1:, :])),
        "longer than the context": ("prompt: .*max_model_len", {"prompt_token_ids": [5] * model.max_model_len}),
        "larger than the cache": (f"the cache holds {capacity} in all", {"prompt_token_ids": [5] * capacity}),
        "a fault in encode": ("a fault in encode", about(model, Image.new("RGB", (60, 40)))),
        "a fault in prefill": ("a fault in prefill", {"prompt_token_ids": [*range(40, 75), *unlucky, 9]}),
        "a fault behind a known beginning": ("a fault in prefill", {"prompt_token_ids": [*known, *unlucky]}),
    }
    params: dict[str, tuple[str, dict[str, Any]]] = {
        "a temperature below 0": ("temperature", {"temperature": -1.0}),
        "a bias of no token": ("logit_bias", {"logit_bias": {10**6: 1.0}}),
        "more texts than run at once": ("n: it is 100, but only", {"temperature": 1.0, "n": 100}),
        "a regex that is none": (FORM + "regex", {"structured_outputs": StructuredOutputsParams(regex="(")}),
        "a grammar without a rule": (FORM, {"structured_outputs": StructuredOutputsParams(grammar="start: missing")}),
        "no token left": ("leave no token", {"allowed_token_ids": words[word], "bad_words": [word]}),
        # Or in prefill, where the text is preempted before the step that would have failed.
        "a fault in decode": ("a fault in", {"allowed_token_ids": unlucky}),
        "a fault in decode, twice": ("a fault in", {"allowed_token_ids": unlucky, "temperature": 1.0, "n": 2}),
    }
    plain: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 8}
    return [
        *(Ask(name=name, prompt=prompt, params=plain, error=error) for name, (error, prompt) in prompts.items()),
        *(
            Ask(name=name, prompt="What is it?", params={**plain, **more}, error=error)
            for name, (error, more) in params.items()
        ),
    ]


def break_programs(monkeypatch: pytest.MonkeyPatch, unlucky_token: int) -> None:
    """From now on encode fails for a black image, prefill for a part of a prompt with this token, decode for a text that has drawn it;
    and what prefill has written for that part is NaN."""
    encode, prefill, decode = EagerExecutor.encode, runner.prefill, runner.decode

    def encode_or_fail(self: EagerExecutor, inputs: VisionInputs) -> Tensor:
        runs = inputs.pixels[: len(inputs.pixels) // 64 * 64].reshape(-1, 64)
        if not bool(runs.any(1).all()):
            raise RuntimeError("a fault in encode")
        return encode(self, inputs)

    def prefill_or_fail(model: Model, chunks: Sequence[runner.Chunk], cache: Cache, *args: Any) -> Any:
        made = prefill(model, chunks, cache, *args)
        unlucky = [chunk for chunk in chunks if unlucky_token in chunk.token_ids]
        for chunk in unlucky:
            for place in range(chunk.start, chunk.start + len(chunk.token_ids)):
                for k, v in cache:
                    k[chunk.blocks[place // BLOCK_SIZE], :, place % BLOCK_SIZE] = torch.nan
                    v[chunk.blocks[place // BLOCK_SIZE], :, place % BLOCK_SIZE] = torch.nan
        if unlucky:
            raise RuntimeError("a fault in prefill")
        return made

    def decode_or_fail(model: Model, ids: Tensor, *args: Any) -> Any:
        if unlucky_token in ids.tolist():
            raise RuntimeError("a fault in decode")
        return decode(model, ids, *args)

    monkeypatch.setattr(EagerExecutor, "encode", encode_or_fail)
    monkeypatch.setattr(runner, "prefill", prefill_or_fail)
    monkeypatch.setattr(runner, "decode", decode_or_fail)


def _picture(rng: Random) -> Image.Image:
    """One of few, so that many ask about the same."""
    number = rng.randrange(len(SIZES))
    return picture(*SIZES[number], number)


def _with_rows(model: Model, seed: int, change: Callable[[Tensor], Tensor] = lambda rows: rows) -> dict[str, Any]:
    """A prompt with ready embeddings."""
    width = model.config.text.hidden_size
    has_grid = bool(model.config.text.mrope_section)
    rows = change(normal(seed, 4, width) if has_grid else normal(seed, 1, 36, width))
    value = {"image_embeds": rows, "image_grid_thw": [[1, 4, 4]]} if has_grid else rows
    return {"prompt": placeholder(model) + "What is it?", "multi_modal_data": {"image": value}}
