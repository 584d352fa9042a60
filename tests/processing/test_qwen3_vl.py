"""qwen3_vl: learned positions, frame sizes and prompts with times as transformers makes them."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import invariants
from tests.golden_cases import TINY, load_model
from tests.pictures import picture
from tests.versions import transformers_from
from vlmfx.errors import InvalidRequest
from vlmfx.models.vision_inputs import VisionInputs, cumulative
from vlmfx.processing import qwen2_vl, qwen3_vl
from vlmfx.processing.prompt import prepare
from vlmfx.processing.video import VideoPlan

transformers_from(5, 20, "is not known to have vision_utils")
vision_utils = importlib.import_module("transformers.vision_utils")

PROCESSOR = load_model(TINY["qwen3_vl"]).processor
CFG, TOKENIZER = PROCESSOR.config, PROCESSOR.tokenizer
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
PAD = CFG.video_token_id
SIDE = st.integers(1, 20)


@settings(max_examples=200, deadline=None)
@given(t=st.integers(1, 2), height=SIDE, width=SIDE, side=st.sampled_from([1, 2, 6, 7, 48]))
def test_learned_positions_are_those_of_transformers(t, height, width, side):
    """As the share of every learned position in every patch: the same place may be written in several ways."""
    cfg = replace(CFG, positions_side=side)
    ids = qwen2_vl.patch_positions(2 * height, 2 * width, 2).repeat(t, 1)
    frame = 4 * height * width
    plain = VisionInputs(
        pixels=torch.zeros(len(ids), 1),
        position_ids=ids,
        cu_seqlens=cumulative([frame] * t),
        mean=cfg.mean,
        std=cfg.std,
    )
    mine = qwen3_vl.with_learned_positions(cfg, plain)
    grid = torch.tensor([[t, 2 * height, 2 * width]])
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grid, side, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    expected = torch.zeros(len(ids), side**2).scatter_add(1, indices, weights)
    assert mine.position_weights is not None
    shares = torch.zeros(len(ids), side**2).scatter_add(1, mine.position_ids[:, 2:], mine.position_weights)
    torch.testing.assert_close(shares, expected, atol=1e-5, rtol=0)
    assert torch.equal(mine.position_ids[:, :2], ids)


def test_worked_positions():
    """2 × 4 patches over 3 × 3 learned positions: the corners are corners, columns fall at 0, 2/3, 4/3 and 2."""
    cfg = replace(CFG, positions_side=3)
    ids = torch.tensor([[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 3]])
    plain = VisionInputs(
        pixels=torch.zeros(6, 1), position_ids=ids, cu_seqlens=cumulative([6]), mean=cfg.mean, std=cfg.std
    )
    mine = qwen3_vl.with_learned_positions(cfg, plain)
    assert mine.position_weights is not None
    shares = torch.zeros(6, 9).scatter_add(1, mine.position_ids[:, 2:], mine.position_weights)
    expected = torch.zeros(6, 9)
    for patch, place, share in [
        (0, 0, 1), (1, 0, 1 / 3), (1, 1, 2 / 3), (2, 1, 2 / 3), (2, 2, 1 / 3), (3, 2, 1), (4, 6, 1), (5, 8, 1),
    ]:  # fmt: skip
        expected[patch, place] = share
    torch.testing.assert_close(shares, expected, atol=1e-6, rtol=0)


def plan(num_frames: int, height: int, width: int, fps: float | None = None, stride: int = 1) -> VideoPlan:
    return VideoPlan(
        frame_indices=tuple(range(0, num_frames * stride, stride)),
        num_source_frames=num_frames * stride,
        height=height,
        width=width,
        fps=fps,
    )


@settings(max_examples=300, deadline=None)
@given(
    num_frames=st.integers(2, 60),
    height=st.integers(1, 2000),
    width=st.integers(1, 2000),
    limits=st.sampled_from([qwen3_vl.VIDEO_PIXELS, (4096, 25165824), (4096, 50_000)]),
)
def test_frame_sizes_equal_transformers(num_frames, height, width, limits):
    reference = importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl").smart_resize
    cfg, made = replace(CFG, video_pixels=limits), plan(num_frames, height, width)
    try:
        expected = reference(num_frames, height, width, 2, 32, *limits)
    except ValueError:
        with pytest.raises(InvalidRequest, match=r"multi_modal_data\.video.*ratio over 200"):
            qwen3_vl.frame_size(cfg, made)
        return
    assert qwen3_vl.frame_size(cfg, made) == expected
    layout = qwen3_vl.video_layout(cfg, made)
    assert layout.grid == (-(-num_frames // 2), expected[0] // 32, expected[1] // 32)
    assert len(layout.timestamps) == layout.grid[0]


@pytest.mark.parametrize(
    ("num_frames", "fps", "stride", "expected"),
    [
        (4, 2.0, 1, (0.25, 1.25)),
        (5, 2.0, 1, (0.25, 1.25, 2.0)),  # the last frame fills its temporal patch
        (4, 24.0, 12, (0.25, 1.25)),
        (25, None, 12, (0.25, *(i + 0.25 for i in range(1, 12)), 12.0)),  # 24 frames a second, where nobody says
        (1, 30.0, 1, (0.0,)),
    ],
)
def test_times(num_frames, fps, stride, expected):
    assert qwen3_vl.video_layout(CFG, plan(num_frames, 64, 64, fps, stride)).timestamps == expected


def test_limits_of_videos(tmp_path):
    """As the published folders give them, for all frames together; without that file transformers' own."""
    assert CFG.video_pixels == (128 * 1024, 768 * 1024)
    folder = Path(shutil.copytree(TINY["qwen3_vl"], tmp_path / "model"))
    published = {
        "size": {"longest_edge": 25165824, "shortest_edge": 4096}, "patch_size": 16, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "processor_class": "Qwen3VLProcessor",
        "video_processor_type": "Qwen3VLVideoProcessor",
    }  # fmt: skip
    (folder / "video_preprocessor_config.json").write_text(json.dumps(published), encoding="utf-8")
    processor = load_model(folder).processor
    assert processor.config.video_pixels == (4096, 25165824)
    video = {"prompt": VIDEO, "multi_modal_data": {"video": [[picture(96, 64)] * 2]}}
    assert prepare(processor, video).num_features == 3 * 2
    request = {**video, "mm_processor_kwargs": {"max_pixels": 1024}}
    assert prepare(processor, request).num_features == 3 * 2  # a request's limits are those of its images


def layouts_of(*num_frames: int) -> dict[str, list[qwen3_vl.Qwen3VideoLayout]]:
    cfg = replace(CFG, video_pixels=(1024, 4096))
    return {"video": [qwen3_vl.video_layout(cfg, plan(n, 40, 70, 2.0)) for n in num_frames]}


def test_prompts_with_times():
    """A text, with vision tokens around its placeholder or without, and its ids, give the same prompt; expanded ids pass as they are."""
    layouts = layouts_of(3, 1)
    block = "<{} seconds><|vision_start|>{}<|vision_end|>"
    sizes = [video.num_rows // len(video.timestamps) for video in layouts["video"]]
    pads = ["<|video_pad|>" * n for n in sizes]
    expected = TOKENIZER.encode(
        "See "
        + block.format("0.2", pads[0])
        + block.format("1.0", pads[0])
        + " and "
        + block.format("0.0", pads[1])
        + "."
    )
    for text in (f"See {VIDEO} and {VIDEO}.", "See <|video_pad|> and <|video_pad|>."):
        for prompt in (text, TOKENIZER.encode(text)):
            made = qwen3_vl.expand(CFG, TOKENIZER, prompt, layouts)
            assert made.token_ids == expected
            places = made.feature_index[made.feature_index >= 0]
            assert torch.equal(places, torch.arange(2 * sizes[0] + sizes[1]))
    again = qwen3_vl.expand(CFG, TOKENIZER, expected, layouts)
    assert again.token_ids == expected
    positions, following = qwen3_vl.positions(CFG, expected, layouts)
    assert positions.shape == (3, len(expected))
    assert following == int(positions.max()) + 1
    texts = (torch.tensor(expected) != PAD).nonzero().flatten()
    assert torch.equal(positions[0, texts], positions[1, texts])


@pytest.mark.parametrize(("text", "found", "given_videos"), [("no", 0, 1), (f"{VIDEO}{VIDEO}", 2, 1), (VIDEO, 1, 2)])
def test_placeholders_and_videos_must_agree(text, found, given_videos):
    layouts = layouts_of(*[2] * given_videos)
    for prompt in (text, TOKENIZER.encode(text)):
        with pytest.raises(InvalidRequest, match=f"it has {found} video placeholder") as caught:
            qwen3_vl.expand(CFG, TOKENIZER, prompt, layouts)
        assert invariants.is_one_sentence(caught.value)
        assert caught.value.expected == given_videos


def test_a_placeholder_without_a_video():
    with pytest.raises(InvalidRequest, match="it has 1 video placeholder but 0 videos were given"):
        prepare(PROCESSOR, VIDEO)


@pytest.mark.parametrize("width", [47, 96, 145])
def test_embeddings_of_another_width(width):
    value = {"image_embeds": torch.ones(4, width), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    with pytest.raises(InvalidRequest, match="expected") as caught:
        qwen3_vl.embed_inputs(CFG, value)
    assert invariants.is_one_sentence(caught.value)


@pytest.mark.parametrize(
    "value", [torch.ones(4, 48), {"image_embeds": torch.ones(4, 48)}, {"image_grid_thw": [[1, 4, 4]]}]
)
def test_embeddings_without_their_grid(value):
    with pytest.raises(InvalidRequest, match="without their grid"):
        qwen3_vl.embed_inputs(CFG, value)


def test_embeddings_of_both_widths_together():
    values = [
        {"image_embeds": torch.ones(4, width), "image_grid_thw": torch.tensor([[1, 4, 4]])} for width in (48, 144)
    ]
    rows, layouts = qwen3_vl.embed_inputs(CFG, values)
    assert rows.shape == (8, 144)
    assert rows[:4, :48].eq(1).all()
    assert rows[:4, 48:].eq(0).all()
    assert rows[4:].eq(1).all()
    assert [item.num_rows for item in layouts] == [4, 4]


@settings(max_examples=20, deadline=None)
@given(width=st.integers(20, 200), height=st.integers(20, 200), num_frames=st.integers(1, 4))
def test_as_many_rows_as_the_layouts_say(width, height, num_frames):
    model = load_model(TINY["qwen3_vl"])
    media = {"image": [picture(width, height)], "video": [[picture(height, width)] * num_frames]}
    prompt = f"<|vision_start|><|image_pad|><|vision_end|>{VIDEO}"
    inputs = prepare(model.processor, {"prompt": prompt, "multi_modal_data": media})
    with torch.no_grad():
        rows = model.functions.encode(model.params, model.config, inputs.vision)
    assert len(rows) == inputs.num_features == int((inputs.feature_index >= 0).sum())
