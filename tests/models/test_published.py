"""The published configs, on the meta device: every weight that transformers' model has, under its published name and shape."""

from __future__ import annotations

import importlib
from math import prod
from typing import Any

import pytest
import torch

from vlmfx import weights
from vlmfx.checkpoint import FAMILIES
from vlmfx.tree import leaves, tree_map
from vlmfx.weight_files import published_name

CLIP_L_336 = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
VICUNA = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "ignore_index": -100,
    "image_token_index": 32000, "pad_token_id": 32001, "projector_hidden_act": "gelu", "vision_config": CLIP_L_336,
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN2_VL = {
    "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "hidden_act": "silu",
    "max_position_embeddings": 32768, "max_window_layers": 28, "num_hidden_layers": 28, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "sliding_window": 32768, "use_sliding_window": False, "image_token_id": 151655,
    "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}  # fmt: skip
QWEN2_VIT = {
    "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "patch_size": 14,
    "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
}  # fmt: skip
QWEN25_VL = {**QWEN2_VL, "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
QWEN25_VIT = {
    "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
    "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112, "tokens_per_second": 2,
    "fullatt_block_indexes": [7, 15, 23, 31], "temporal_patch_size": 2,
}  # fmt: skip
QWEN3_VL = {
    "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "image_token_id": 151655,
    "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
}  # fmt: skip
QWEN3 = {
    "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 262144,
    "model_type": "qwen3_vl_text", "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 5000000,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    "vocab_size": 151936,
}  # fmt: skip
QWEN3_VIT = {
    "hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "model_type": "qwen3_vl", "num_heads": 16,
    "num_position_embeddings": 2304, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip

# name → (config.json, parameters of the whole checkpoint, those of it that vlmfx does not need)
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "llava-1.5-7b": ({**LLAVA, "text_config": VICUNA}, 7_063_427_072, 12_598_272),
    "llava-1.5-13b": (
        {
            **LLAVA,
            "text_config": {
                **VICUNA, "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40,
                "num_hidden_layers": 40, "num_key_value_heads": 40,
            },
        },
        13_351_494_656, 12_598_272,
    ),
    "qwen2-vl-2b": (
        {
            **QWEN2_VL, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
            "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
            "vision_config": {**QWEN2_VIT, "hidden_size": 1536},
        },
        2_208_985_600, 0,
    ),
    "qwen2-vl-7b": (
        {
            **QWEN2_VL, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
            "vision_config": {**QWEN2_VIT, "hidden_size": 3584},
        },
        8_291_375_616, 0,
    ),
    "qwen2.5-vl-3b": (
        {
            **QWEN25_VL, "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16,
            "num_hidden_layers": 36, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
            "vision_config": {**QWEN25_VIT, "out_hidden_size": 2048},
        },
        3_754_622_976, 0,
    ),
    "qwen2.5-vl-7b": (
        {
            **QWEN25_VL, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
            "vision_config": {**QWEN25_VIT, "out_hidden_size": 3584},
        },
        8_292_166_656, 0,
    ),
    "qwen3-vl-4b": (
        {
            **QWEN3_VL, "tie_word_embeddings": True,
            "text_config": {
                **QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32,
                "num_hidden_layers": 36, "tie_word_embeddings": True,
            },
            "vision_config": {
                **QWEN3_VIT, "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560,
                "deepstack_visual_indexes": [5, 11, 17],
            },
        },
        4_437_815_808, 0,
    ),
    "qwen3-vl-8b": (
        {
            **QWEN3_VL, "tie_word_embeddings": False,
            "text_config": {
                **QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
                "num_hidden_layers": 36,
            },
            "vision_config": {
                **QWEN3_VIT, "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096,
                "deepstack_visual_indexes": [8, 16, 24],
            },
        },
        8_767_123_696, 0,
    ),
}  # fmt: skip


def functions_of(hf: dict[str, Any]) -> Any:
    return importlib.import_module(f"vlmfx.models.{FAMILIES[hf['architectures'][0]]}")


def transformers_with(hf: dict[str, Any]) -> Any:
    """transformers; a version that lacks the architecture skips."""
    transformers = importlib.import_module("transformers")
    if not hasattr(transformers, hf["architectures"][0]):
        pytest.skip("this transformers lacks the family")
    return transformers


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name):
    hf, total, unused = PUBLISHED[name]
    f = functions_of(hf)
    params = weights.abstract(f.param_specs(f.config(hf)), dtype=torch.bfloat16)
    assert {(t.device.type, t.dtype) for t in leaves(params)} == {("meta", torch.bfloat16)}
    assert sum(t.numel() for t in leaves(params)) == total - unused


@pytest.mark.parametrize("name", PUBLISHED)
def test_abstract_gives_the_shapes_of_the_specs(name):
    f = functions_of(PUBLISHED[name][0])
    specs = f.param_specs(f.config(PUBLISHED[name][0]))
    tree_map(
        lambda s, t: pytest.fail(f"{s} is {t.shape}") if s.shape != t.shape else None, specs, weights.abstract(specs)
    )
    for s in leaves(specs):
        assert len(s.axes) == len(s.shape)
        assert sum(prod(shape) for _, shape in s.sources) == prod(s.shape)


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_transformers(name):
    hf = PUBLISHED[name][0]
    transformers = transformers_with(hf)
    config = getattr(transformers, hf["architectures"][0].replace("ForConditionalGeneration", "Config")).from_dict(hf)
    with torch.device("meta"):
        reference = getattr(transformers, hf["architectures"][0])(config)
    f = functions_of(hf)
    cfg = f.config(hf)
    shapes = {published_name(k, f.KEY_PREFIXES): tuple(t.shape) for k, t in reference.state_dict().items()}
    weights.check(f.param_specs(cfg), shapes, where=name, ignored=lambda key: f.is_unused(cfg, key))


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_that_change_the_arithmetic(name):
    """What a sparse config leaves to defaults, against transformers' config classes."""
    hf = PUBLISHED[name][0]
    transformers = transformers_with(hf)
    f = functions_of(hf)
    cfg = f.config(hf)
    config = getattr(transformers, hf["architectures"][0].replace("ForConditionalGeneration", "Config")).from_dict(hf)
    text = getattr(config, "text_config", config)
    rope = getattr(text, "rope_parameters", None) or {"rope_theta": getattr(text, "rope_theta", None)}
    assert cfg.text.rope_theta == rope["rope_theta"]
    assert cfg.text.rms_norm_eps == text.rms_norm_eps
    assert cfg.text.num_kv_heads == text.num_key_value_heads
    assert cfg.text.max_position_embeddings == text.max_position_embeddings
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    assert cfg.text.head_dim == head_dim == 128
    if name.startswith("llava"):
        assert cfg.vision.hidden_act == config.vision_config.hidden_act == "quick_gelu"
        assert cfg.vision.layer_norm_eps == config.vision_config.layer_norm_eps
        assert cfg.features_per_image == 576
        assert cfg.feature_layers == (23,)
        return
    vision = config.vision_config
    assert cfg.text.mrope_section == ((24, 20, 20) if name.startswith("qwen3") else (16, 24, 24))
    assert (cfg.vision.patch_size, cfg.vision.num_heads) == (vision.patch_size, vision.num_heads)
    if name.startswith("qwen2-vl"):
        assert cfg.vision.intermediate_size == 5120
    elif name.startswith("qwen2.5"):
        assert cfg.vision.full_layers == tuple(vision.fullatt_block_indexes)
        assert cfg.vision.tokens_per_second == vision.tokens_per_second
        assert cfg.vision.window == vision.window_size // 14 // 2 == 4
    else:
        assert cfg.vision.deepstack_layers == tuple(vision.deepstack_visual_indexes)
        assert cfg.vision.positions_side == 48
