"""Qwen2.5-VL equals transformers, stage by stage: images whose windows are ragged, videos, and other configs."""

from __future__ import annotations

import pytest
import torch

from tests.golden_cases import TINY, load_model
from tests.pictures import picture
from tests.qwen_reference import Clip, Reference, assert_equal_stages, reference_of, saved_variant
from tests.versions import transformers_from
from vlmfx.models.vision_inputs import concat
from vlmfx.processing import qwen2_5_vl

transformers_from(4, 52, "lacks the family, or its nested config")

FOLDER = TINY["qwen2_5_vl"]
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
BUDGET = (56 * 56, 12845056)  # a frame's, in this folder the images'


def assert_equal(text, images=(), clips=(), **options):
    assert_equal_stages(
        load_model(FOLDER), reference_of(FOLDER, "qwen2_5_vl"), text, images, clips, budget=BUDGET, **options
    )


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (112, 112),  # 4 × 4 merged patches, 2 × 2 whole windows
        (140, 84),  # 5 × 3: ragged to the right and below
        (28, 300),  # one column, half a window wide
        (300, 28),
        (56, 56),  # one window
    ],
)
def test_one_image(width, height):
    assert_equal(f"{IMAGE}What is it?", [picture(width, height)])


def test_images_and_text():
    assert_equal("Just words, no picture.")
    assert_equal(f"Compare {IMAGE} and {IMAGE}: why?", [picture(90, 130), picture(200, 60, 1)])
    assert_equal(IMAGE * 3, [picture(60, 60), picture(150, 90, 1), picture(61, 59, 2)])


@pytest.mark.parametrize(("num_frames", "fps"), [(1, 2.0), (2, 1.0), (5, 2.0), (6, 3.0), (4, 24.0)])
def test_a_video(num_frames, fps):
    """Odd frame counts, and steps in time of a whole and of a broken number. What follows a video stands one after its
    largest position, which is transformers' rule while the video is wider than long."""
    frames = [picture(200, 90, seed) for seed in range(num_frames)]
    assert_equal(f"Watch {VIDEO} now.", clips=[Clip(frames, fps)])


def test_a_video_before_an_image():
    """Feature rows are the images' and then the videos', whatever their order in the prompt."""
    clip = Clip([picture(150, 100, seed) for seed in range(4)], 2.0)
    assert_equal(f"{VIDEO} or {IMAGE}{IMAGE}?", [picture(90, 60, 7), picture(60, 90, 8)], [clip])


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_config.fullatt_block_indexes": []},
        {"vision_config.fullatt_block_indexes": [0, 1, 2, 9]},
        {"vision_config.window_size": 112},
        {"vision_config.window_size": 28},
        {"vision_config.window_size": 100},  # no multiple of a merged patch: 3 of them
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
    ],
    ids=str,
)
def test_other_configs_that_transformers_saves(changes, tmp_path):
    folder = saved_variant(FOLDER, tmp_path / "model", changes)
    reference = Reference(folder, "qwen2_5_vl")
    images = [picture(190, 130), picture(90, 250, 1)]
    assert_equal_stages(load_model(folder), reference, f"{IMAGE}{IMAGE}Why?", images, num_tokens=0)


@torch.no_grad()
def test_windows_change_the_answer():
    """The comparisons above would notice a tower that attends to the whole frame everywhere."""
    model = load_model(FOLDER)
    inputs = qwen2_5_vl.vision_inputs(model.processor.config, [picture(140, 84)])
    f, whole = model.functions, model.processor.config
    plain = f.encode(model.params, model.config, inputs)
    one_window = qwen2_5_vl.vision_inputs(type(whole)(**{**vars(whole), "window": 100}), [picture(140, 84)])
    assert one_window.cu_window_seqlens is not None
    assert one_window.cu_window_seqlens.tolist() == [0, 60]
    assert (plain - f.encode(model.params, model.config, one_window)).abs().max() > 0.01


@torch.no_grad()
def test_images_together_are_as_alone():
    model = load_model(FOLDER)
    cfg, f = model.processor.config, model.functions
    alone = [qwen2_5_vl.vision_inputs(cfg, [picture(w, h)]) for w, h in ((140, 84), (56, 56), (200, 130))]
    together = f.encode(model.params, model.config, concat(alone))
    expected = torch.cat([f.encode(model.params, model.config, one) for one in alone])
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5)
