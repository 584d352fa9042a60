"""siglip: the tower equals transformers' Idefics2 tower, which is the same NaViT, for images of unequal sizes in one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from tests.strategies import normal
from vlmfx import weights
from vlmfx.errors import CheckpointError
from vlmfx.models import siglip
from vlmfx.models.vision_inputs import cumulative

CONFIG: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 4,
    "image_size": 40, "num_channels": 3, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
IS_PUBLISHED_FORMULA = int(transformers.__version__.split(".")[0]) < 5  # later versions round the fractions otherwise


@pytest.fixture(scope="module")
def reference() -> Idefics2VisionTransformer:
    """With every weight random, biases and norms too."""
    torch.manual_seed(5)
    model = Idefics2VisionTransformer(Idefics2VisionConfig(**CONFIG)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model


def spread(height: int, width: int, side: int) -> Tensor:
    """The rows of a side × side table that lie nearest below each patch of an image, in exact arithmetic."""
    return torch.tensor([(i * side // height) * side + j * side // width for i in range(height) for j in range(width)])


@torch.no_grad()
def test_equals_idefics2(reference):
    cfg = siglip.vision_config(CONFIG)
    state = {f"vpm.{name}": value for name, value in reference.state_dict().items()}
    specs = siglip.param_specs(cfg, "vpm")
    weights.check(specs, {name: tuple(value.shape) for name, value in state.items()}, where="idefics2")
    params = weights.load(specs, lambda name: state[name], dtype=torch.float32)
    images = [
        normal(i, height * 4, width * 4, 3) for i, (height, width) in enumerate([(3, 7), (7, 3), (3, 7), (1, 11)])
    ]
    patches = [image.unfold(0, 4, 4).unfold(1, 4, 4).reshape(-1, 3 * 4 * 4) for image in images]
    index = torch.cat([spread(image.shape[0] // 4, image.shape[1] // 4, 10) for image in images])
    lens = tuple(map(len, patches))
    mine = siglip.tower(params, cfg, siglip.embed(params, torch.cat(patches), index), cumulative(lens))
    for image, rows in zip(images, mine.split(lens), strict=True):
        pixels = image.permute(2, 0, 1)[None]
        mask = torch.ones(1, pixels.shape[2] // 4, pixels.shape[3] // 4, dtype=torch.bool)
        theirs = reference(pixels, patch_attention_mask=mask).last_hidden_state[0]
        torch.testing.assert_close(rows, theirs, atol=2e-5, rtol=2e-5)


@settings(deadline=None, max_examples=200)
@given(n=st.integers(1, 1100), side=st.sampled_from([7, 10, 70]))
def test_places_differ_from_exact_arithmetic_on_boundaries_only(n, side):
    places = siglip.table_places(n, side).tolist()
    exact = [i * side // n for i in range(n)]
    assert len(places) == n
    for i, (place, wanted) in enumerate(zip(places, exact, strict=True)):
        assert place == wanted or (place == wanted - 1 and i * side % n == 0), (i, place, wanted)


def test_places_on_boundaries_fall_as_the_published_code_has_them():
    """Recorded from transformers 4.46.3's Idefics2, whose formula MiniCPM-V 2.6 has: the patches one place below the exact one."""
    recorded = {
        25: [5, 10, 15, 20], 49: [7, 14, 35, 42], 50: [5, 10, 15, 20, 30, 40], 55: [11, 22, 33, 44], 58: [29], 70: [],
        77: [55], 98: [7, 14, 35, 42, 56, 70, 84], 100: [10, 20, 30, 40, 80],
    }  # fmt: skip
    moved = {n: [i for i, p in enumerate(siglip.table_places(n, 70).tolist()) if p != i * 70 // n] for n in recorded}
    assert moved == recorded


@pytest.mark.skipif(not IS_PUBLISHED_FORMULA, reason="transformers 5 rounds the fractions otherwise")
def test_places_equal_those_of_transformers_4():
    config = Idefics2VisionConfig(**{**CONFIG, "image_size": 70, "patch_size": 1})
    embeddings = Idefics2VisionTransformer(config).embeddings
    with torch.no_grad():
        for p in embeddings.patch_embedding.parameters():
            p.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(4900.0)[:, None].expand(-1, 24))
        for n in range(1, 150):
            found = embeddings(torch.zeros(1, 3, n, 1), patch_attention_mask=torch.ones(1, n, 1, dtype=torch.bool))[
                0, :, 0
            ]
            assert torch.equal(siglip.table_places(n, 70) * 70, found.long()), n


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 25), ("hidden_size", True), ("num_attention_heads", 0), ("num_channels", 1), ("patch_size", 41),
        ("hidden_act", "relu"), ("layer_norm_eps", float("nan")), ("num_hidden_layers", 2.0), ("image_size", None),
    ],
)  # fmt: skip
def test_config_names_the_wrong_key(key, value):
    with pytest.raises(CheckpointError, match=rf"vision_config\.{key}"):
        siglip.vision_config({**CONFIG, key: value})
