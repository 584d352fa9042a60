"""Phi-3.5-vision's published sizes, the order of its rows, and what holds for the functions of every family."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import invariants
from tests.golden_cases import load_model
from tests.models.test_pure_functions import (  # noqa: F401  (run here on the small model)
    test_arguments_are_not_changed,
    test_gradient_of_one_weight_is_the_difference_quotient,
    test_gradients_reach_every_weight,
    test_packed_sequences_do_not_see_each_other,
    test_torch_func_agrees_with_autograd,
)
from tests.pictures import picture
from tests.small_phi3_v import CROP, FOLDER, SIDE, small_model
from vlmfx import CheckpointError
from vlmfx.models import clip, phi3_v
from vlmfx.models.vision_inputs import VisionInputs, concat
from vlmfx.processing import phi3_v as processing
from vlmfx.tree import leaves
from vlmfx.weights import source_names

PUBLISHED: dict[str, Any] = {
    "architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v", "hidden_act": "silu", "hidden_size": 3072,
    "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": False, "vocab_size": 32064,
    "rope_scaling": {"type": "su", "short_factor": [1.05] * 48, "long_factor": [1.25] * 48},
    "embd_layer": {
        "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp", "use_hd_transform": True,
        "with_learnable_separator": True,
    },
    "img_processor": {
        "image_dim_out": 1024, "model_name": "openai/clip-vit-large-patch14-336", "name": "clip_vision_model",
        "num_img_tokens": 144,
    },
}  # fmt: skip


@pytest.fixture
def model():
    return small_model()


def test_number_of_parameters():
    """Of the published checkpoint, worked out by hand: the tower's last layer and its final norm are not loaded."""
    c, h, inner = 1024, 3072, 8192
    layer = 4 * (c * c + c) + 2 * 2 * c + 2 * 4 * c * c + 4 * c + c
    tower = c + 588 * c + 577 * c + 2 * c + 23 * layer
    projector = 4 * c * h + h + h * h + h + 2 * 4 * c
    text = 2 * 32064 * h + h + 32 * (2 * h + 3 * h * h + h * h + 3 * h * inner)
    cfg = phi3_v.config(PUBLISHED)
    assert sum(prod(s.shape) for s in leaves(phi3_v.param_specs(cfg))) == tower + projector + text
    # What the model's card gives for all of the file, 4.15 billion.
    assert tower + projector + text + layer + 2 * c == 4_146_621_440


def test_without_a_vision_config_the_tower_is_vit_l_14_336():
    assert phi3_v.config(PUBLISHED).vision == clip.ClipConfig(
        hidden_size=1024, intermediate_size=4096, num_layers=24, num_heads=16, image_size=336, patch_size=14,
        hidden_act="quick_gelu", layer_norm_eps=1e-5,
    )  # fmt: skip


def arranged(projected: Tensor, grids: list[tuple[int, int]]) -> Tensor:
    """Rows of each image in the order that the reference calls "sub_glb", by loops over lines and columns."""
    line_end, crops_end = projected[-2], projected[-1]
    views = projected[:-2].view(-1, SIDE, SIDE, projected.shape[1])
    rows, at = [], 0
    for height, width in grids:
        whole, crops = views[at], views[at + 1 : at + 1 + height * width]
        for line in range(height * SIDE):
            for column in range(width * SIDE):
                rows.append(crops[line // SIDE * width + column // SIDE, line % SIDE, column % SIDE])
            rows.append(line_end)
        rows.append(crops_end)
        for line in range(SIDE):
            rows += [*whole[line], line_end]
        at += 1 + height * width
    return torch.stack(rows)


@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(grids=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3))
def test_rows_lie_line_by_line_then_the_whole_image(grids):
    small = small_model()
    f, params, cfg = small.functions, small.params, small.config
    images = [picture(CROP * width, CROP * height, seed) for seed, (height, width) in enumerate(grids)]
    inputs = concat(
        [
            processing.vision_inputs(one_crop_a_tile(small.processor.config, grid), [image])
            for grid, image in zip(grids, images, strict=True)
        ]
    )
    hidden = f.vision_hidden(params, cfg, inputs)
    projected = f.project(params, cfg, hidden, in_tower_order(inputs, len(hidden)))
    assert torch.equal(f.encode(params, cfg, inputs), arranged(projected, grids))


def in_tower_order(inputs: VisionInputs, num_patches: int) -> VisionInputs:
    """The inputs under which `project` arranges nothing: the rows of each view, then the two separators."""
    return replace(inputs, row_index=torch.arange(num_patches // 4 + 2))


def one_crop_a_tile(cfg: processing.Phi3VProcessing, grid: tuple[int, int]) -> processing.Phi3VProcessing:
    """The settings under which an image of exactly these crops keeps its size."""
    changed = {**vars(cfg), "num_crops": prod(grid)}
    return processing.Phi3VProcessing(**changed)


@torch.no_grad()
def test_four_patches_become_one_row_in_reading_order():
    """MODELS: (side, 2, side, 2, C) → (side, side, 2, 2, C); the separators go through the projection too."""
    small = small_model()
    p, width = small.params["projector"], small.config.vision.hidden_size
    x = torch.randn(2 * (2 * SIDE) ** 2, width, generator=torch.Generator().manual_seed(0))
    patches = x.view(2, 2 * SIDE, 2 * SIDE, width)
    blocks = [
        torch.cat([patches[v, 2 * i + a, 2 * j + b] for a in (0, 1) for b in (0, 1)])
        for v in range(2)
        for i in range(SIDE)
        for j in range(SIDE)
    ]
    rows = torch.stack([*blocks, p["line_end"][0], p["crops_end"][0]])
    up = torch.nn.functional.gelu(rows @ p["up"]["weight"].T + p["up"]["bias"])
    expected = up @ p["down"]["weight"].T + p["down"]["bias"]
    inputs = in_tower_order(processing.vision_inputs(small.processor.config, [picture(CROP, CROP)]), len(x))
    mine = small.functions.project(small.params, small.config, x, inputs)
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_what_a_checkpoint_may_hold_besides():
    cfg = load_model(FOLDER).config
    at = "model.vision_embed_tokens.img_processor.vision_model"
    for name in ("encoder.layers.2.mlp.fc1.bias", "post_layernorm.weight", "embeddings.position_ids"):
        assert phi3_v.is_unused(cfg, f"{at}.{name}")
    assert phi3_v.is_unused(cfg, "model.vision_embed_tokens.wte.weight")
    assert phi3_v.is_unused(cfg, "model.layers.0.self_attn.rotary_emb.inv_freq")
    for name in (f"{at}.encoder.layers.3.mlp.fc1.bias", "lm_head.weight", "model.vision_embed_tokens.other"):
        assert not phi3_v.is_unused(cfg, name)
    assert not any(phi3_v.is_unused(cfg, name) for name in source_names(phi3_v.param_specs(cfg)))


@pytest.mark.parametrize("value", [None, [], "x"])
@pytest.mark.parametrize("key", ["embd_layer", "img_processor"])
def test_a_section_that_is_no_object_is_named(key, value):
    hf = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(CheckpointError, match=f"config.json: {key} is .*, expected an object"):
        phi3_v.config({**hf, key: value})
    if value is not None:
        with pytest.raises(CheckpointError, match=r"img_processor\.vision_config is .*, expected an object"):
            phi3_v.config({**hf, "img_processor": {**hf["img_processor"], "vision_config": value}})


@pytest.mark.parametrize(
    ("section", "changed", "says"),
    [
        ("embd_layer", {"hd_transform_order": "glb_sub"}, "embd_layer.hd_transform_order is 'glb_sub'"),
        ("embd_layer", {"use_hd_transform": False}, "embd_layer.use_hd_transform is False"),
        ("embd_layer", {"projection_cls": "linear"}, "embd_layer.projection_cls"),
        ("embd_layer", {"with_learnable_separator": False}, "embd_layer.with_learnable_separator"),
        ("img_processor", {"name": "siglip"}, "img_processor.name is 'siglip'"),
        ("img_processor", {"layer_idx": -1}, "img_processor.layer_idx is -1"),
        ("img_processor", {"image_dim_out": 768}, "img_processor.image_dim_out is 768, expected 16"),
        ("img_processor", {"num_img_tokens": 145}, "img_processor.num_img_tokens is 145, expected 144"),
        ("img_processor", {"vision_config": {"image_size": 42, "patch_size": 14}}, "image_size is 42, expected a multiple of 2 p"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_implemented_is_refused(section, changed, says):
    hf = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(CheckpointError, match=says) as caught:
        phi3_v.config({**hf, section: {**hf[section], **changed}})
    assert invariants.is_one_sentence(caught.value)
