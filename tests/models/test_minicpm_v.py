"""minicpm_v: the published sizes, names that may be there without being read, and configs of other versions."""

from __future__ import annotations

from typing import Any

import pytest

from vlmfx import weights
from vlmfx.errors import CheckpointError
from vlmfx.models import minicpm_v
from vlmfx.tree import leaves

PUBLISHED: dict[str, Any] = {
    "architectures": ["MiniCPMV"], "version": 2.6, "vocab_size": 151666, "hidden_size": 3584,
    "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768, "hidden_act": "silu",
    "use_sliding_window": False, "tie_word_embeddings": False, "query_num": 64, "drop_vision_last_layer": False,
    "slice_mode": True, "image_size": 448, "patch_size": 14,
    "vision_config": {
        "hidden_size": 1152, "image_size": 980, "intermediate_size": 4304, "model_type": "siglip",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
    },
}  # fmt: skip


def test_number_of_parameters_is_the_published_one():
    """openbmb/MiniCPM-V-2_6: model.safetensors.index.json gives a total_size of 16,198,350,304 bytes, in bfloat16."""
    params = weights.abstract(minicpm_v.param_specs(minicpm_v.config(PUBLISHED)))
    assert sum(t.numel() for t in leaves(params)) * 2 == 16_198_350_304


def test_published_defaults():
    cfg = minicpm_v.config(PUBLISHED)
    assert (cfg.vision.hidden_act, cfg.vision.layer_norm_eps) == ("gelu_pytorch_tanh", 1e-6)
    assert (cfg.vision.table_side, cfg.resampler.num_heads, cfg.resampler.num_queries) == (70, 28, 64)
    assert (cfg.text.head_dim, cfg.text.mrope_section, cfg.text.qkv_bias) == (128, (), True)


def test_what_may_be_stored_unread():
    cfg = minicpm_v.config(PUBLISHED)
    for name in (
        "vpm.embeddings.position_ids",
        "resampler.pos_embed",
        "llm.model.layers.0.self_attn.rotary_emb.inv_freq",
    ):
        assert minicpm_v.is_unused(cfg, name)
    assert not minicpm_v.is_unused(cfg, "llm.lm_head.weight")
    assert not minicpm_v.is_unused(cfg, "vpm.encoder.layers.27.mlp.fc1.weight")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2.5},
        {"version": None},
        {"version": "2.6"},
        {"drop_vision_last_layer": True},
        {"slice_mode": False},
        {"query_num": 0},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"use_sliding_window": True},
        {"hidden_size": 3600},
    ],
    ids=str,
)
def test_config_names_the_wrong_key(change):
    with pytest.raises(CheckpointError, match=next(iter(change))):
        minicpm_v.config({**PUBLISHED, **change})
