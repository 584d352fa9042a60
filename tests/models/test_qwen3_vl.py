"""Qwen3-VL equals transformers, stage by stage: images, videos with their times, deepstack, and other configs."""

from __future__ import annotations

import pytest
import torch

from tests import invariants
from tests.golden_cases import TINY, load_model
from tests.pictures import about, picture
from tests.qwen_reference import Clip, Reference, assert_equal_stages, reference_of, saved_variant
from tests.versions import transformers_from
from vlmfx import LLM, SamplingParams
from vlmfx.processing.prompt import prepare
from vlmfx.processing.qwen3_vl import VIDEO_PIXELS

transformers_from(4, 57, "lacks the family")

FOLDER = TINY["qwen3_vl"]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def assert_equal(text, images=(), clips=(), **options):
    assert_equal_stages(
        load_model(FOLDER), reference_of(FOLDER, "qwen3_vl"), text, images, clips, budget=VIDEO_PIXELS, **options
    )


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (96, 96),  # 6 × 6 patches, as many as learned positions
        (160, 64),  # between them
        (32, 300),
        (32, 32),  # 2 × 2 patches: the corners of the learned positions
        (700, 500),
    ],
)
def test_one_image(width, height):
    assert_equal(f"{IMAGE}What is it?", [picture(width, height)])


def test_images_and_text():
    assert_equal("Just words, no picture.")
    assert_equal(f"Compare {IMAGE} and {IMAGE}: why?", [picture(90, 130), picture(200, 60, 1)])
    assert_equal(IMAGE * 3, [picture(60, 60), picture(150, 90, 1), picture(61, 59, 2)])


@pytest.mark.parametrize(("num_frames", "fps"), [(2, 1.0), (5, 2.0), (6, 3.0), (4, 24.0)])
def test_a_video(num_frames, fps):
    frames = [picture(200, 90, seed) for seed in range(num_frames)]
    assert_equal(f"Watch.{VIDEO} now.", clips=[Clip(frames, fps)])


def test_videos_and_images():
    """Feature rows are the images' and then the videos', whatever their order in the prompt."""
    clips = [Clip([picture(150, 100, seed) for seed in range(4)], 2.0), Clip([picture(64, 64)] * 3, 2.0)]
    assert_equal(f"{VIDEO} or {IMAGE}{VIDEO}{IMAGE}?", [picture(90, 60, 7), picture(60, 90, 8)], clips)


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_config.deepstack_visual_indexes": []},
        {"vision_config.deepstack_visual_indexes": [0, 1, 2]},
        {"vision_config.num_position_embeddings": 1},
        {"vision_config.num_position_embeddings": 16},
        {"text_config.rope_scaling.mrope_section": [2, 3, 3]},
        {"tie_word_embeddings": False, "text_config.num_key_value_heads": 4},
    ],
    ids=str,
)
def test_other_configs_that_transformers_saves(changes, tmp_path):
    folder = saved_variant(FOLDER, tmp_path / "model", changes)
    reference = Reference(folder, "qwen3_vl")
    images = [picture(190, 130), picture(90, 250, 1)]
    assert_equal_stages(load_model(folder), reference, f"{IMAGE}{IMAGE}Why?", images, num_tokens=0)


@torch.no_grad()
def test_embeddings_with_their_deepstack_parts_are_the_image():
    model = load_model(FOLDER)
    request = about(model, picture(90, 70), picture(50, 120, 1))
    inputs = prepare(model.processor, request)
    rows = model.functions.encode(model.params, model.config, inputs.vision)
    assert rows.shape == (6 + 8, 48 * 3)
    ready = {"image_embeds": rows, "image_grid_thw": torch.tensor([[1, 4, 6], [1, 8, 4]])}
    params = SamplingParams.greedy(max_tokens=8, ignore_eos=True)
    outputs = LLM(model).generate([request, {**request, "multi_modal_data": {"image": ready}}], params, use_tqdm=False)
    first, second = invariants.token_ids(outputs)
    assert first == second
    assert outputs[0].prompt_token_ids == outputs[1].prompt_token_ids


@torch.no_grad()
def test_embeddings_without_them_are_transformers_inputs_embeds():
    """transformers adds nothing in the first layers where it gets merged embeddings in place of pixels."""
    model, reference = load_model(FOLDER), reference_of(FOLDER, "qwen3_vl")
    text, image = f"{IMAGE}What is it?", picture(90, 70)
    theirs = reference.stages(reference.inputs(text, [image], budget=VIDEO_PIXELS))
    language, head = reference.model.model.language_model, reference.model.lm_head
    hidden = language(inputs_embeds=theirs["merged"][None], position_ids=theirs["positions"][:, None], use_cache=False)
    expected = head(hidden.last_hidden_state)[0]
    rows = theirs["vision"][0][1][:, :48]
    for embeds in (rows, rows[None], [rows]):
        ready = {"image_embeds": embeds, "image_grid_thw": torch.tensor([[1, 4, 6]])}
        inputs = prepare(model.processor, {"prompt": text, "multi_modal_data": {"image": ready}})
        torch.testing.assert_close(invariants.prompt_logits(model, inputs), expected, atol=1e-4, rtol=1e-5)
    assert (expected - theirs["logits"]).abs().max() > 0.1
