"""count_tokens says what generate will take, from headers alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vlmfx
from tests.golden_cases import TINY, load_model
from tests.pictures import about, encoded, mixed, picture
from vlmfx import InvalidRequest
from vlmfx.processing import images
from vlmfx.processing.prompt import prepare

SIDE = st.integers(1, 700)


@pytest.fixture(params=TINY)
def family(request):
    return request.param


def test_as_many_as_generate_takes(family):
    model = load_model(TINY[family])
    for prompt in mixed(model):
        (output,) = vlmfx.LLM(model).generate([prompt], vlmfx.SamplingParams.greedy(max_tokens=1), use_tqdm=False)
        assert vlmfx.count_tokens(model, prompt) == len(output.prompt_token_ids)


def test_a_folder_and_messages(family):
    model = load_model(TINY[family])
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image", "image": picture(50, 70)}, {"type": "text", "text": "What?"}]}
    ]
    expected = len(prepare(model.processor, {"messages": messages}).token_ids)
    for given_model in (TINY[family], str(TINY[family]), model, vlmfx.LLM(model)):
        assert vlmfx.count_tokens(given_model, messages) == expected
        assert vlmfx.count_tokens(given_model, {"messages": messages}) == expected


def test_no_pixel_is_decoded(family, monkeypatch):
    model = load_model(TINY[family])
    expected = vlmfx.count_tokens(model, about(model, picture(90, 40)))
    whole = encoded(picture(90, 40))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr(images, "load_image", fail)
    assert vlmfx.count_tokens(model, about(model, whole[: len(whole) // 2])) == expected  # only its header is whole


def test_what_generate_refuses_is_refused(family):
    model = load_model(TINY[family])
    with pytest.raises(InvalidRequest, match="1 image placeholder but 2 images were given"):
        vlmfx.count_tokens(model, {**about(model, picture(9, 9)), "multi_modal_data": {"image": [picture(9, 9)] * 2}})
    with pytest.raises(InvalidRequest, match="the image cannot be read"):
        vlmfx.count_tokens(model, about(model, b"no image"))


@settings(max_examples=25, deadline=None)
@given(family=st.sampled_from(sorted(TINY)), sizes=st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=2))
def test_placeholders_are_as_many_as_the_rows_that_encode_returns(family, sizes):
    model = load_model(TINY[family])
    sizes = [(w, h) for w, h in sizes if max(w, h) <= 20 * min(w, h)] or [(33, 44)]
    long = replace(model.processor, max_model_len=100_000)  # the tiny models have short contexts
    inputs = prepare(long, about(model, *(picture(w, h) for w, h in sizes)))
    with torch.no_grad():
        rows = model.functions.encode(model.params, model.config, inputs.vision)
    index = inputs.feature_index[inputs.feature_index >= 0]
    assert sorted(index.tolist()) == list(range(len(rows)))
    assert len(rows) == inputs.num_features
