"""qwen2_vl: sizes, patches, grids, ids and M-RoPE positions as transformers makes them, for images of any size."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden_cases import TINY, load_model
from tests.pictures import about, picture
from tests.processing import references
from tests.versions import transformers_from
from vlmfx.errors import InvalidRequest
from vlmfx.processing import qwen2_vl
from vlmfx.processing.inputs import MediaLayout
from vlmfx.processing.prompt import prepare

SIDE = st.integers(1, 300)
LIMITS = st.sampled_from([(56 * 56, 28 * 28 * 1280), (784, 784), (784, 20_000), (100_000, 200_000)])


def processing(min_pixels: int = 56 * 56, max_pixels: int = 28 * 28 * 1280) -> qwen2_vl.Qwen2VLProcessing:
    return replace(load_model(TINY["qwen2_vl"]).processor.config, min_pixels=min_pixels, max_pixels=max_pixels)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((224, 224), (224, 224)),
        ((1080, 1920), (1092, 1932)),
        ((100, 150), (112, 140)),
        ((30, 40), (56, 84)),
        ((42, 70), (56, 56)),  # 70 / 28 = 2.5 rounds to even
    ],
)
def test_worked_sizes(size, expected):
    cfg = processing(max_pixels=12845056)
    assert qwen2_vl.smart_resize(cfg, *size) == expected
    assert qwen2_vl.layout(cfg, size).num_rows == expected[0] * expected[1] // 784


@settings(max_examples=300, deadline=None)
@given(height=st.integers(1, 5000), width=st.integers(1, 5000), limits=LIMITS)
def test_sizes_equal_transformers(height, width, limits):
    if max(height, width) > 200 * min(height, width):
        height = width
    if references.refuses_small_sides() and min(height, width) < 28:
        return
    expected = [max(side, 28) for side in references.smart_resize()(height, width, 28, *limits)]  # 4.46 may give 0
    assert qwen2_vl.smart_resize(processing(*limits), height, width) == tuple(expected)


@settings(max_examples=200, deadline=None)
@given(height=st.integers(1, 5000), width=st.integers(1, 5000), limits=LIMITS)
def test_sizes_fit_the_patches_and_the_limits(height, width, limits):
    cfg = processing(*limits)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(InvalidRequest, match="a ratio over 200"):
            qwen2_vl.smart_resize(cfg, height, width)
        return
    h, w = qwen2_vl.smart_resize(cfg, height, width)
    assert h % 28 == w % 28 == 0 < h * w
    if max(height, width) <= 4 * min(height, width):  # of thin images a side of one patch may break the limit
        enlarged = limits[0] + 28 * 2.5 * limits[0] ** 0.5 + 784  # sides of area limits[0], each rounded up by a patch
        assert h * w <= max(limits[1], enlarged)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=3), limits=LIMITS)
def test_patches_and_grids_equal_transformers(sizes, limits):
    sizes = [(w, h) for w, h in sizes if max(w, h) <= 200 * min(w, h)] or [(5, 6)]
    images = [picture(w, h, seed) for seed, (w, h) in enumerate(sizes)]
    reference = references.image_processor("qwen2_vl", TINY["qwen2_vl"])
    reference.min_pixels, reference.max_pixels = limits
    reference.size = {**dict(reference.size), "shortest_edge": limits[0], "longest_edge": limits[1]}
    if references.refuses_small_sides() and (limits[1] < 20_000 or any(min(size) < 28 for size in sizes)):
        return  # 4.46 refuses small sides, and may resize to none
    expected = reference(images, return_tensors="pt")
    cfg = processing(*limits)
    inputs = qwen2_vl.vision_inputs(cfg, images)
    pixels = inputs.patches(cfg.patch_size, torch.float32)
    torch.testing.assert_close(pixels, torch.as_tensor(expected["pixel_values"]), atol=1e-6, rtol=0)
    grids = [qwen2_vl.layout(cfg, (h, w)).grid for w, h in sizes]
    assert [[t, h * 2, w * 2] for t, h, w in grids] == torch.as_tensor(expected["image_grid_thw"]).tolist()
    assert inputs.cu_seqlens.diff().tolist() == [math.prod(grid) * 4 for grid in grids]


@pytest.mark.parametrize(
    ("words", "sizes"), [("Hi", []), ("What?", [(30, 40)]), ("Compare. \n", [(90, 90), (100, 60)])]
)
def test_ids_equal_transformers(words, sizes):
    transformers = transformers_from(4, 46, "is older than the oldest promised")
    model = load_model(TINY["qwen2_vl"])
    request = about(model, *[picture(w, h) for w, h in sizes], text=words)
    expected = request["prompt"]
    for w, h in sizes:
        rows = qwen2_vl.layout(model.processor.config, (h, w)).num_rows
        expected = expected.replace("<|image_pad|>", "<pad>" * rows, 1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY["qwen2_vl"])
    ids = tokenizer(expected.replace("<pad>", "<|image_pad|>"))["input_ids"]
    assert prepare(model.processor, request).token_ids == ids


@lru_cache
def reference_model() -> Any:
    """transformers' model class that has get_rope_index, tiny and random."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(TINY["qwen2_vl"])
    model = transformers.Qwen2VLForConditionalGeneration(config)
    return model if hasattr(model, "get_rope_index") else model.model


@st.composite
def prompts(draw):
    """Merged grids of images, and how many text tokens lie before, between and behind them."""
    grids = draw(st.lists(st.tuples(st.just(1), st.integers(1, 6), st.integers(1, 6)), max_size=4))
    texts = draw(st.lists(st.integers(1, 5), min_size=len(grids) + 1, max_size=len(grids) + 1))
    return grids, texts


@settings(max_examples=80, deadline=None)
@given(prompts())
def test_positions_equal_transformers(case):
    grids, texts = case
    cfg = processing()
    start = reference_model().config.vision_start_token_id
    ids = [5] * texts[0]
    for grid, text in zip(grids, texts[1:], strict=True):
        ids += [start, *[cfg.image_token_id] * math.prod(grid), *[7] * text]
    layouts = [MediaLayout(num_rows=math.prod(grid), grid=grid) for grid in grids]
    mine, following = qwen2_vl.positions(cfg, ids, {"image": layouts})
    table = torch.tensor([[t, 2 * h, 2 * w] for t, h, w in grids]) if grids else None
    get_rope_index = reference_model().get_rope_index
    batch = torch.tensor([ids])
    options: dict[str, Any] = {"attention_mask": torch.ones_like(batch)}
    if "mm_token_type_ids" in inspect.signature(get_rope_index).parameters:
        options["mm_token_type_ids"] = (batch == cfg.image_token_id).int()
    expected, deltas = get_rope_index(batch, image_grid_thw=table, **options)
    assert torch.equal(mine, expected[:, 0])
    assert following - len(ids) == int(deltas.flatten()[0])


def test_patch_positions_follow_the_patches():
    """The row and the column of each patch, in 2 x 2 blocks."""
    assert qwen2_vl.patch_positions(4, 2, 2).tolist() == [
        [0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1], [3, 0], [3, 1],
    ]  # fmt: skip


def test_settings_of_old_and_new_preprocessor_configs():
    loaded = load_model(TINY["qwen2_vl"])
    model, tokenizer = loaded.config, loaded.processor.tokenizer
    old = qwen2_vl.config({"min_pixels": 784, "max_pixels": 7840}, model, tokenizer)
    new = qwen2_vl.config({"size": {"shortest_edge": 784, "longest_edge": 7840}}, model, tokenizer)
    assert old == new
    assert (old.min_pixels, old.max_pixels) == (784, 7840)
