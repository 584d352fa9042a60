"""count_tokens says what generate will take, from headers alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import vlmfx
from tests.golden_cases import COMMITTED, EVERY, TINY, find, load_model
from tests.pictures import about, encoded, mixed, picture
from vlmfx import InvalidRequest
from vlmfx.processing import images
from vlmfx.processing.prompt import count_tokens as prompt_count
from vlmfx.processing.prompt import prepare

SIDE = st.integers(1, 700)


@pytest.fixture(params=EVERY)
def family(request):
    return request.param


def test_as_many_as_generate_takes(family):
    model = load_model(EVERY[family])
    for prompt in mixed(model):
        (output,) = vlmfx.LLM(model).generate([prompt], vlmfx.SamplingParams.greedy(max_tokens=1), use_tqdm=False)
        assert vlmfx.count_tokens(model, prompt) == len(output.prompt_token_ids)


def test_a_folder_and_messages(family):
    model = load_model(EVERY[family])
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image", "image": picture(50, 70)}, {"type": "text", "text": "What?"}]}
    ]
    expected = len(prepare(model.processor, {"messages": messages}).token_ids)
    for given_model in (EVERY[family], str(EVERY[family]), model, vlmfx.LLM(model)):
        assert vlmfx.count_tokens(given_model, messages) == expected
        assert vlmfx.count_tokens(given_model, {"messages": messages}) == expected


def test_no_pixel_is_decoded(family, monkeypatch):
    model = load_model(EVERY[family])
    expected = vlmfx.count_tokens(model, about(model, picture(90, 40)))
    whole = encoded(picture(90, 40))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr(images, "load_image", fail)
    assert vlmfx.count_tokens(model, about(model, whole[: len(whole) // 2])) == expected  # only its header is whole


def test_what_generate_refuses_is_refused(family):
    model = load_model(EVERY[family])
    with pytest.raises(InvalidRequest, match="1 image placeholder but 2 images were given"):
        vlmfx.count_tokens(model, {**about(model, picture(9, 9)), "multi_modal_data": {"image": [picture(9, 9)] * 2}})
    with pytest.raises(InvalidRequest, match="the image cannot be read"):
        vlmfx.count_tokens(model, about(model, b"no image"))


CASES = find(COMMITTED)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_as_many_as_the_reference_made_of_the_golden_prompts(case):
    """As text with images, and as messages where the case has them."""
    model = load_model(case.model_folder)
    for prompt in case.prompts():
        assert vlmfx.count_tokens(case.model_folder, prompt.request()) == prompt["input_ids"].numel()
        for request in prompt.chat_requests():
            assert vlmfx.count_tokens(model, request) == prompt["input_ids"].numel()


@settings(max_examples=25, deadline=None)
@given(family=st.sampled_from(sorted(TINY)), sizes=st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=2))
@example(family="llava", sizes=[(1, 3000)])
@example(family="llava", sizes=[(65, 1)])
@example(family="qwen2_vl", sizes=[(1, 201)])
@example(family="qwen3_vl", sizes=[(1, 201)])
@example(family="minicpm_v", sizes=[(1, 600)])
def test_placeholders_are_as_many_as_the_rows_that_encode_returns(family, sizes):
    """And what the one refuses, for its shape, the other does."""
    model = load_model(EVERY[family])
    long = replace(model.processor, max_model_len=100_000)  # the tiny models have short contexts
    prompt = about(model, *(picture(w, h) for w, h in sizes))
    refusals = []
    for function in (prompt_count, prepare):
        try:
            function(long, prompt)
        except InvalidRequest as error:
            refusals.append(str(error))
    if refusals:
        assert len(refusals) == 2
        assert refusals[0] == refusals[1]
        return
    inputs = prepare(long, prompt)
    with torch.no_grad():
        rows = model.functions.encode(model.params, model.config, inputs.vision)
    index = inputs.feature_index[inputs.feature_index >= 0]
    assert sorted(index.tolist()) == list(range(len(rows)))
    assert len(rows) == inputs.num_features
    assert prompt_count(long, prompt) == len(inputs.token_ids)


def test_options_that_change_no_count_play_no_part():
    folder = TINY["llava"]
    harmless: dict[str, Any] = {
        "dtype": "bfloat16", "device": "cpu", "trust_remote_code": True, "task": "embed", "max_num_seqs": 2, "tensor_parallel_size": 1,
    }  # fmt: skip
    assert vlmfx.count_tokens(folder, "Hi there", **harmless) == vlmfx.count_tokens(folder, "Hi there")


def test_limits_and_media_options_hold():
    model = load_model(TINY["llava"])
    for loaded in (TINY["llava"], model):
        with pytest.raises(InvalidRequest, match="limit_mm_per_prompt allows 0 images"):
            vlmfx.count_tokens(loaded, about(model, picture(9, 9)), limit_mm_per_prompt={"image": 0})
        with pytest.raises(InvalidRequest, match="media_io_kwargs"):
            vlmfx.count_tokens(loaded, "x", media_io_kwargs=5)
        with pytest.raises(InvalidRequest, match="allowed_local_media_path"):
            vlmfx.count_tokens(loaded, "x", allowed_local_media_path="no/such/folder")


def test_other_options_are_named():
    folder, model = TINY["llava"], load_model(TINY["llava"])
    with pytest.raises(InvalidRequest, match="max_modle_len: LLM has no option max_modle_len; remove it"):
        vlmfx.count_tokens(folder, "x", max_modle_len=9)
    with pytest.raises(InvalidRequest, match="max_model_len: the model is loaded already"):
        vlmfx.count_tokens(model, "x", max_model_len=9)
    with pytest.raises(InvalidRequest, match="max_model_len: the LLM is built already"):
        vlmfx.count_tokens(vlmfx.LLM(model), "x", max_model_len=9)
