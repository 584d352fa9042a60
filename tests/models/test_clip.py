"""CLIP's tower: hidden states of the layers that are asked for, and of no others."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from tests.golden_cases import TINY, load_model
from vlmfx import weights
from vlmfx.models import clip
from vlmfx.models.vit import block

transformers = pytest.importorskip("transformers")


def small() -> tuple[clip.ClipConfig, Any, torch.Tensor]:
    model = load_model(TINY["llava"])
    cfg = model.config.vision
    torch.manual_seed(0)
    return cfg, model.params["vision"], torch.randn(2 * cfg.num_patches, 3 * cfg.patch_size**2)


@pytest.mark.parametrize("layers", [(0,), (1,), (1, 0), (0, 0, 1)])
def test_layers_come_in_the_order_asked_for(layers):
    """Each equals that of transformers' tower."""
    cfg, params, patches = small()
    config = transformers.CLIPVisionConfig(
        hidden_size=cfg.hidden_size, intermediate_size=cfg.intermediate_size, num_hidden_layers=len(params["layers"]),
        num_attention_heads=cfg.num_heads, image_size=cfg.image_size, patch_size=cfg.patch_size,
        hidden_act=cfg.hidden_act, layer_norm_eps=cfg.layer_norm_eps,
    )  # fmt: skip
    reference = transformers.CLIPVisionModel(config).eval()
    published = weights.save(clip.param_specs(cfg, "vision_model", len(params["layers"])), params)
    for name, tensor in reference.state_dict().items():
        key = name if name in published else f"vision_model.{name}"
        if key in published:
            tensor.copy_(published[key])
    side = cfg.image_size // cfg.patch_size
    pixels = patches.view(2, side, side, 3, cfg.patch_size, cfg.patch_size)
    pixels = pixels.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, cfg.image_size, cfg.image_size)
    with torch.no_grad():
        expected = reference(pixels, output_hidden_states=True).hidden_states
    found = clip.hidden_states(params, cfg, patches, layers)
    assert len(found) == len(layers)
    for layer, state in zip(layers, found, strict=True):
        torch.testing.assert_close(state, expected[layer], rtol=1e-4, atol=1e-4)


def test_other_layers_are_not_kept(monkeypatch):
    cfg, params, patches = small()
    params = {**params, "layers": [params["layers"][0]] * 6}
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def counted(*args: Any) -> torch.Tensor:
        nonlocal most
        out = block(*args)
        made.append(weakref.ref(out))
        most = max(most, sum(ref() is not None for ref in made))
        return out

    monkeypatch.setattr(clip, "block", counted)
    (state,) = clip.hidden_states(params, cfg, patches, (5,))
    assert state.shape == (2, cfg.num_patches + 1, cfg.hidden_size)
    assert len(made) == 6
    assert most <= 3  # the one that is asked for, a block's input and its output
