"""llava: pixels, placeholders and ids as transformers' processor makes them, for images of any size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden_cases import SHARED, TINY, load_model
from tests.pictures import about, picture
from tests.processing import references
from tests.versions import transformers_from
from vlmfx.checkpoint import load_processor
from vlmfx.errors import CheckpointError, InvalidRequest
from vlmfx.models.llava import LlavaConfig
from vlmfx.processing import llava
from vlmfx.processing.prompt import prepare


def pixels_of(inputs, cfg: llava.LlavaProcessing) -> torch.Tensor:
    """Normalised patches put back together, (n, 3, S, S)."""
    x = inputs.patches(cfg.patch_size, torch.float32)
    n, p, side = inputs.num_segments, cfg.patch_size, cfg.image_size // cfg.patch_size
    images = x.view(n, side, side, 3, p, p).permute(0, 3, 1, 4, 2, 5)
    return images.reshape(n, 3, cfg.image_size, cfg.image_size)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 260), st.integers(1, 260)), min_size=1, max_size=3),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P", "CMYK"]),
)
def test_pixels_equal_transformers(sizes, mode):
    cfg = load_model(TINY["llava"]).processor.config
    sizes = [(w, h) for w, h in sizes if max(w, h) <= 60 * min(w, h)] or [(5, 6)]
    if not references.takes_thin_images():
        sizes = [(max(w, 4), max(h, 4)) for w, h in sizes]
    images = [picture(w, h, seed, mode).convert("RGB") for seed, (w, h) in enumerate(sizes)]
    reference = references.image_processor("llava", TINY["llava"])
    expected = torch.as_tensor(reference(images, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(pixels_of(llava.vision_inputs(cfg, images), cfg), expected, atol=1e-6, rtol=0)


@settings(max_examples=10, deadline=None)
@given(width=st.integers(100, 900), height=st.integers(100, 900))
def test_pixels_of_the_published_size_equal_transformers(width, height):
    processor = load_processor(TINY["llava"], "llava", load_model(TINY["llava"]).config).config
    cfg = replace(processor, image_size=336)
    reference = references.image_processor("llava", TINY["llava"])
    reference.size, reference.crop_size = {"shortest_edge": 336}, {"height": 336, "width": 336}
    image = picture(width, height)
    expected = torch.as_tensor(reference([image], return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(pixels_of(llava.vision_inputs(cfg, [image]), cfg), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("words", "sizes"), [("Hi", []), ("What?", [(30, 40)]), ("Compare. \n", [(9, 9), (100, 20)])])
def test_ids_equal_transformers(words, sizes):
    """One placeholder an image becomes 36 (84 / 14 squared), as in transformers' LlavaProcessor; bos comes once."""
    transformers = transformers_from(4, 46, "is older than the oldest promised")
    processor = load_model(TINY["llava"]).processor
    images = [picture(w, h) for w, h in sizes]
    request = about(load_model(TINY["llava"]), *images, text=words)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY["llava"])
    expected = tokenizer(request["prompt"].replace("<image>", "<image>" * 36))["input_ids"]
    inputs = prepare(processor, request)
    assert inputs.token_ids == expected
    assert inputs.positions.tolist() == list(range(len(expected)))
    assert inputs.next_position == len(expected)


def test_576_tokens_an_image_of_336_pixels():
    folder = SHARED / "models" / "llava-a"
    if not folder.exists():
        pytest.skip("the larger golden set is not here: no ../shared/goldens")
    inputs = prepare(load_model(folder).processor, about(load_model(folder), picture(30, 40)))
    assert int((inputs.feature_index >= 0).sum()) == 576


def test_a_long_line_is_refused_before_it_is_resized():
    cfg = load_model(TINY["llava"]).processor.config
    llava.layout(cfg, (1, 64))
    for size in ((65, 1), (1, 65), (1_000_000, 2)):
        with pytest.raises(InvalidRequest, match="a ratio over 64; crop it"):
            llava.layout(cfg, size)


def test_a_crop_that_is_not_the_towers_size_is_refused():
    loaded = load_model(TINY["llava"])
    model, tokenizer = loaded.config, loaded.processor.tokenizer
    assert isinstance(model, LlavaConfig)
    assert llava.config({"crop_size": 84}, model, tokenizer).image_size == 84
    assert llava.config({}, model, tokenizer).image_size == 84
    with pytest.raises(CheckpointError, match=r"crop_size is 336 but config\.json has image_size 84"):
        llava.config({"crop_size": {"height": 336, "width": 336}}, model, tokenizer)
