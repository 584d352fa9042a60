"""qwen2_5_vl: windows and positions as transformers makes them, for images and videos of any size."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden_cases import TINY, load_model
from tests.pictures import about, picture
from tests.qwen_reference import reference_of
from tests.versions import transformers_from
from vlmfx.errors import InvalidRequest
from vlmfx.models.vision_inputs import VisionInputs, cumulative
from vlmfx.processing import qwen2_5_vl, qwen2_vl
from vlmfx.processing.inputs import MediaLayout
from vlmfx.processing.prompt import prepare
from vlmfx.processing.video import VideoPlan

transformers_from(5, 20, "is not known to have vision_utils")
vision_utils = importlib.import_module("transformers.vision_utils")

CFG = load_model(TINY["qwen2_5_vl"]).processor.config
SIDE = st.integers(1, 12)
IMAGE, VIDEO = 392, 393


def numbered(t: int, height: int, width: int) -> VisionInputs:
    """Inputs of a grid of merged patches whose every patch lies where its own number says."""
    ids = qwen2_vl.patch_positions(2 * height, 2 * width, 2).repeat(t, 1)
    return VisionInputs(
        pixels=torch.empty(0, dtype=torch.uint8),
        patch_offsets=torch.arange(len(ids))[:, None],
        row_stride=torch.zeros(len(ids), dtype=torch.int32),
        position_ids=ids,
        cu_seqlens=cumulative([4 * height * width] * t),
        mean=CFG.mean,
        std=CFG.std,
    )


@settings(max_examples=200, deadline=None)
@given(t=st.integers(1, 3), height=SIDE, width=SIDE, window=st.integers(1, 5))
def test_windows_are_those_of_transformers(t, height, width, window):
    grid = torch.tensor([[t, 2 * height, 2 * width]])
    order, ends = vision_utils.get_vision_window_index(grid, 2, window * 28, 14)
    mine = qwen2_5_vl.in_windows(type(CFG)(**{**vars(CFG), "window": window}), numbered(t, height, width))
    assert mine.patch_offsets is not None
    assert torch.equal(mine.patch_offsets.view(-1, 4), torch.arange(4 * len(order)).view(-1, 4)[order])
    assert mine.row_index is not None
    assert torch.equal(mine.row_index, order.argsort())
    assert mine.cu_window_seqlens is not None
    assert mine.cu_window_seqlens.tolist() == ends.tolist()
    position_ids = vision_utils.get_vision_position_ids(grid, 2)
    assert torch.equal(mine.position_ids, position_ids.unflatten(0, (-1, 4))[order].flatten(0, 1))
    assert mine.cu_seqlens.tolist() == vision_utils.get_vision_cu_seqlens(grid).tolist()


def test_worked_windows():
    """3 × 2 merged patches in windows of 2 × 2, row by row: the upper four, then the lower two."""
    mine = qwen2_5_vl.in_windows(CFG, numbered(1, 3, 3))
    assert CFG.window == 2
    assert mine.cu_window_seqlens is not None
    assert mine.cu_window_seqlens.diff().tolist() == [16, 8, 8, 4]
    assert mine.patch_offsets is not None
    assert (mine.patch_offsets[::4, 0] // 4).tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]
    assert mine.row_index is not None
    assert mine.row_index.tolist() == [0, 1, 4, 2, 3, 5, 6, 7, 8]


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(20, 200), st.integers(20, 200)), min_size=1, max_size=3))
def test_as_many_rows_as_the_layouts_say(sizes):
    model = load_model(TINY["qwen2_5_vl"])
    images = [picture(w, h, seed) for seed, (w, h) in enumerate(sizes)]
    inputs = prepare(model.processor, about(model, *images))
    with torch.no_grad():
        rows = model.functions.encode(model.params, model.config, inputs.vision)
    counts = [qwen2_5_vl.layout(CFG, (image.height, image.width)).num_rows for image in images]
    assert len(rows) == sum(counts) == inputs.num_features == int((inputs.feature_index >= 0).sum())


def plan(num_frames: int, fps: float | None, num_source_frames: int | None = None) -> VideoPlan:
    total = num_source_frames or num_frames
    indices = tuple(round(i * (total - 1) / max(1, num_frames - 1)) for i in range(num_frames))
    return VideoPlan(frame_indices=indices, num_source_frames=total, height=84, width=112, fps=fps)


@settings(max_examples=100, deadline=None)
@given(
    num_frames=st.integers(1, 9),
    fps=st.sampled_from([0.7, 1.0, 2.0, 3.0, 23.976, 24.0, 30.0]),
    stride=st.integers(1, 40),
    before=st.integers(0, 3),
)
def test_time_of_videos_equals_transformers(num_frames, fps, stride, before):
    """The time of each frame. What follows a video longer than wide is left out: see below."""
    from transformers.video_utils import VideoMetadata

    made = plan(num_frames, fps, num_frames * stride)
    layout = qwen2_5_vl.video_layout(CFG, made)
    metadata = VideoMetadata(total_num_frames=num_frames * stride, fps=fps, frames_indices=list(made.frame_indices))
    seconds = torch.tensor([2 / metadata.sampled_fps])
    ids = [5] * before + [VIDEO] * layout.num_rows
    model = reference_of(TINY["qwen2_5_vl"], "qwen2_5_vl").model.model
    batch = torch.tensor([ids])
    grid = torch.tensor([[layout.grid[0], 6, 8]])
    kinds = 2 * (batch == VIDEO).int()
    theirs, _ = model.get_rope_index(batch, kinds, video_grid_thw=grid, second_per_grid_ts=seconds)
    mine, following = qwen2_5_vl.positions(CFG, ids, {"video": [layout]})
    assert torch.equal(mine, theirs[:, 0])
    assert following == int(mine.max()) + 1


def test_what_follows_a_long_video():
    """Two tokens a second, 6 temporal patches of 2 seconds each at 1 frame a second: times 0, 4, …, 20, so text goes on at 21 + 1.

    The published rule (arXiv:2409.12191, section 2.1): one after the largest position. transformers 5 takes the frame's sides only."""
    layout = qwen2_5_vl.video_layout(CFG, plan(12, 1.0))
    assert (layout.grid, layout.num_rows, layout.time_step) == ((6, 3, 4), 72, 4.0)
    positions, following = qwen2_5_vl.positions(CFG, [5, *[VIDEO] * 72, 6], {"video": [layout]})
    assert positions[0, 1:73].unique().tolist() == [1, 5, 9, 13, 17, 21]
    assert positions[1, 1:73].unique().tolist() == [1, 2, 3]
    assert positions[2, 1:73].unique().tolist() == [1, 2, 3, 4]
    assert positions[:, 73].tolist() == [22, 22, 22]
    assert following == 23


def test_frames_that_come_without_a_rate_are_half_a_second_apart():
    assert qwen2_5_vl.video_layout(CFG, plan(4, None)).time_step == 2.0  # 2 frames, 1 second, 2 tokens


def test_images_stand_still():
    """A grid of ready embeddings with several frames counts them as Qwen2-VL does."""
    positions, _ = qwen2_5_vl.positions(CFG, [IMAGE] * 8, {"image": [MediaLayout(num_rows=8, grid=(2, 2, 2))]})
    assert positions[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_video_that_is_too_thin():
    with pytest.raises(InvalidRequest, match=r"multi_modal_data\.video.*ratio over 200"):
        qwen2_5_vl.video_layout(CFG, VideoPlan(frame_indices=(0,), num_source_frames=1, height=1, width=201, fps=None))
