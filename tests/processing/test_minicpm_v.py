"""minicpm_v: the text of images and slices, where their rows go, sizes and ready embeddings, what a request may set."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden_cases import COMMITTED, load_model
from tests.pictures import picture
from vlmfx.checkpoint import load_only_processor
from vlmfx.errors import CheckpointError, InvalidRequest
from vlmfx.models import minicpm_v as model_functions
from vlmfx.processing import minicpm_v
from vlmfx.processing.prompt import count_tokens, prepare

FOLDER = COMMITTED / "models" / "minicpmv-tiny"
MARK = "(<image>./</image>)"
WHOLE, SLICE = "<image>" + "<unk>" * 64 + "</image>", "<slice>" + "<unk>" * 64 + "</slice>"
SIDE = st.integers(1, 300)


def processor() -> Any:
    return load_model(FOLDER).processor


def small(**settings: int) -> minicpm_v.MiniCPMVProcessing:
    """Cuts already at sides of 56, so that many slices are quick to encode."""
    return replace(processor().config, scale_resolution=56, **settings)


def request(text: str, *images: Any, **settings: Any) -> dict[str, Any]:
    return {"prompt": text, "multi_modal_data": {"image": list(images)}, "mm_processor_kwargs": settings}


def ids_of(text: str) -> list[int]:
    return processor().tokenizer.encode(text)


def test_text_of_images_and_slices():
    """A wide image in 2 slices, a tall one in 1 × 2, a small one: numbers from 0, rows of slices on lines of their own."""
    text = f"A {MARK}\nB {MARK}{MARK} C"
    inputs = prepare(processor(), request(text, picture(640, 480), picture(400, 800), picture(50, 50)))
    assert inputs.prompt == text
    assert inputs.token_ids == ids_of(
        f"A <image_id>0</image_id>{WHOLE}{SLICE}{SLICE}\n"
        f"B <image_id>1</image_id>{WHOLE}{SLICE}\n{SLICE}"
        f"<image_id>2</image_id>{WHOLE} C"
    )
    assert inputs.num_features == 64 * 7
    unk = torch.tensor(inputs.token_ids) == processor().tokenizer.token_to_id("<unk>")
    assert torch.equal(inputs.feature_index >= 0, unk)
    assert torch.equal(inputs.feature_index[unk], torch.arange(64 * 7))
    assert torch.equal(inputs.positions, torch.arange(len(inputs.token_ids)))
    assert inputs.next_position == len(inputs.token_ids)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"use_image_id": False}, WHOLE + SLICE + SLICE),
        ({"use_image_id": 0, "max_slice_nums": 1}, WHOLE),
        ({"use_image_id": True, "max_slice_nums": 2}, f"<image_id>0</image_id>{WHOLE}{SLICE}{SLICE}"),
    ],
)
def test_settings_of_a_request(settings, expected):
    inputs = prepare(processor(), request(MARK, picture(640, 480), **settings))
    assert inputs.token_ids == ids_of(expected)
    assert inputs.vision is not None
    assert inputs.vision.num_segments == inputs.num_features // 64


@pytest.mark.parametrize(
    "settings",
    [{"max_slice_nums": 0}, {"max_slice_nums": True}, {"use_image_id": 2}, {"use_image_id": "no"}, {"num_crops": 4}],
)
def test_wrong_settings(settings):
    with pytest.raises(InvalidRequest, match=r"mm_processor_kwargs"):
        prepare(processor(), request(MARK, picture(20, 20), **settings))


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=3), max_slices=st.integers(1, 12))
@torch.no_grad()
def test_rows_are_what_encode_returns(sizes, max_slices):
    cfg, model = small(max_slice_nums=max_slices), load_model(FOLDER)
    sizes = [(w, h) for w, h in sizes if max(w, h) <= cfg.max_aspect_ratio * min(w, h)] or [(1, 1)]
    layouts = [minicpm_v.layout(cfg, (height, width)) for width, height in sizes]
    vision = minicpm_v.vision_inputs(cfg, [picture(*size) for size in sizes])
    rows = model_functions.encode(model.params, model.config, vision)
    expanded = minicpm_v.expand(cfg, processor().tokenizer, MARK * len(sizes), {"image": layouts})
    assert len(rows) == sum(item.num_rows for item in layouts) == int((expanded.feature_index >= 0).sum())
    assert vision.row_stride is not None
    assert vision.cu_seqlens[-1] == len(vision.row_stride) == len(vision.position_ids)
    assert 64 * vision.num_segments == len(rows)
    assert all(1 <= item.num_rows // 64 <= 1 + max_slices for item in layouts)


@settings(deadline=None, max_examples=10)
@given(size=st.tuples(st.integers(40, 300), st.integers(40, 300)), other=st.tuples(SIDE, SIDE))
@torch.no_grad()
def test_rows_do_not_depend_on_other_images(size, other):
    cfg, model = small(), load_model(FOLDER)
    images = [picture(*size), picture(max(other), max(other) // 2 + 1, 1)]
    encode = [minicpm_v.vision_inputs(cfg, chosen) for chosen in ([images[0]], images, images[::-1])]
    alone, first, last = (model_functions.encode(model.params, model.config, inputs) for inputs in encode)
    torch.testing.assert_close(first[: len(alone)], alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last[-len(alone) :], alone, atol=1e-4, rtol=1e-4)


def test_positions_of_patches():
    """2 × 3 patches on a table of 4 × 4: rows 0 and 2, columns 0, 1 and 2 (of 0, 1/3 and 2/3)."""
    assert minicpm_v.patch_positions(2, 3, 4).tolist() == [
        [0, 0, 0], [1, 0, 1], [2, 0, 2],
        [8, 1, 0], [9, 1, 1], [10, 1, 2],
    ]  # fmt: skip


@pytest.mark.parametrize("size", [(1, 1), (1, 1024), (1024, 1), (3, 2000)])
def test_smallest_and_thinnest_images(size):
    inputs = prepare(processor(), request(MARK, picture(*size)))
    assert inputs.vision is not None
    assert inputs.vision.cu_seqlens.diff().max() <= 1100


@pytest.mark.parametrize("size", [(1, 1025), (2050, 2)])
def test_thinner_images_are_refused(size):
    with pytest.raises(InvalidRequest, match="a ratio over 1024; crop it"):
        prepare(processor(), request(MARK, picture(*size)))


def test_ids_that_are_expanded_already_pass():
    images = [picture(640, 480), picture(50, 50)]
    inputs = prepare(processor(), request(f"{MARK}\n{MARK} Compare.", *images))
    again = prepare(processor(), {"prompt_token_ids": inputs.token_ids, "multi_modal_data": {"image": images}})
    assert again.token_ids == inputs.token_ids
    assert torch.equal(again.feature_index, inputs.feature_index)


def test_ids_of_placeholders_become_what_the_text_becomes():
    text = f"Look:\n{MARK}\nWhat is it?"
    inputs = prepare(processor(), request(text, picture(640, 480)))
    ids = {"prompt_token_ids": ids_of(text), "multi_modal_data": {"image": picture(640, 480)}}
    assert prepare(processor(), ids).token_ids == inputs.token_ids


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        (WHOLE, [(640, 480)]),  # its slices are missing
        (WHOLE + SLICE, [(640, 480)]),
        (SLICE + SLICE + WHOLE, [(640, 480)]),
        (WHOLE + WHOLE + SLICE + SLICE, [(640, 480), (50, 50)]),  # the order of images is another
        (WHOLE, []),
        (WHOLE.replace("<unk>", "", 1), [(50, 50)]),
        ("no image", [(50, 50)]),
    ],
)
def test_ids_that_do_not_fit_the_images(text, sizes):
    images = [picture(*size) for size in sizes]
    with pytest.raises(InvalidRequest, match=r"images and \d+ slices filled with 64 <unk>"):
        prepare(processor(), {"prompt_token_ids": ids_of(text), "multi_modal_data": {"image": images}})


@pytest.mark.parametrize(("text", "count"), [("no mark", 1), (MARK, 2), (MARK * 3, 2), (MARK, 0)])
def test_placeholders_and_images_must_be_as_many(text, count):
    with pytest.raises(InvalidRequest, match=rf"it has {text.count(MARK)} image placeholders? but {count} image"):
        prepare(processor(), request(text, *[picture(20, 20)] * count))


def test_marks_that_a_user_writes_stay_text():
    inputs = prepare(processor(), request(f"<image> <unk> </slice> {MARK} <unk></image><slice>", picture(20, 20)))
    at = inputs.token_ids.index(processor().tokenizer.token_to_id("</image_id>")) + 2
    assert (inputs.feature_index >= 0).nonzero().flatten().tolist() == list(range(at, at + 64))
    assert (prepare(processor(), "<image> and <unk>").feature_index < 0).all()
    with pytest.raises(InvalidRequest, match="2 images and 0 slices"):
        prepare(processor(), request(WHOLE + MARK, picture(20, 20)))


EMBEDS = torch.randn(4 * 64, 128, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "value",
    [
        {"image_embeds": EMBEDS, "image_size_list": [(640, 480), (50, 50)]},
        {"image_embeds": EMBEDS.view(4, 64, 128), "image_size_list": [[640, 480], [50, 50]]},
        {"image_embeds": EMBEDS[None], "image_sizes": torch.tensor([[640, 480], [50, 50]])},
        {"image_embeds": [EMBEDS[:192].view(3, 64, 128), EMBEDS[192:]], "image_sizes": [(640, 480), (50, 50)]},
        [
            {"image_embeds": EMBEDS[:192], "image_size_list": [(640, 480)]},
            {"image_embeds": EMBEDS[192:], "image_size_list": (50, 50)},
        ],
    ],
    ids=["rows", "slices", "batch", "a tensor an image", "a dict an image"],
)
def test_forms_of_ready_embeddings(value):
    images = [picture(640, 480), picture(50, 50)]
    plain = prepare(processor(), request(f"{MARK}{MARK}?", *images))
    inputs = prepare(processor(), {"prompt": f"{MARK}{MARK}?", "multi_modal_data": {"image": value}})
    assert inputs.token_ids == plain.token_ids
    assert torch.equal(inputs.feature_index, plain.feature_index)
    assert inputs.embeds is not None
    assert torch.equal(inputs.embeds, EMBEDS)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"image_embeds": EMBEDS, "image_size_list": [(640, 480)]}, "256 rows but image_size_list .* asks for 192"),
        ({"image_embeds": EMBEDS, "image_sizes": [(480, 6400)]}, "256 rows but image_sizes .* asks for 640"),
        ({"image_embeds": EMBEDS[:64], "image_size_list": [(0, 5)]}, "expected positive integers"),
        ({"image_embeds": EMBEDS[:64], "image_size_list": [(-4, -5)]}, "expected positive integers"),
        ({"image_embeds": EMBEDS[:64], "image_size_list": [(50.0, 50.0)]}, "expected positive integers"),
        ({"image_embeds": EMBEDS[:64], "image_size_list": [(1, 2, 3)]}, "expected positive integers"),
        ({"image_embeds": EMBEDS[:64], "image_size_list": [(10**30, 10**30)]}, "expected positive integers"),
        ({"image_embeds": EMBEDS[:64], "image_size_list": []}, "expected positive integers"),
        ({"image_embeds": EMBEDS[:0], "image_size_list": None}, "expected positive integers"),
        ({"image_embeds": EMBEDS[:64], "image_size_list": [(1, 2**62)]}, "a ratio over 1024"),
        ({"image_embeds": EMBEDS[:64, :4], "image_size_list": [(50, 50)]}, "shape"),
        ({"image_embeds": EMBEDS[:64] / 0, "image_size_list": [(50, 50)]}, "not finite"),
        ({"image_embeds": EMBEDS[:64]}, "without the sizes"),
        ({"image_size_list": [(50, 50)]}, "without the sizes"),
        (EMBEDS[:64], "without the sizes"),
    ],
)
def test_wrong_ready_embeddings(value, message):
    with pytest.raises(InvalidRequest, match=message):
        prepare(processor(), {"prompt": MARK, "multi_modal_data": {"image": value}})


def test_chat_numbers_images_through_the_conversation():
    """Parts are joined by line breaks; the template adds its own system message."""
    image = {"type": "image", "image": picture(20, 20)}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [{"type": "text", "text": "And"}, image, image]},
    ]
    inputs = prepare(processor(), {"messages": messages})
    assert inputs.prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{MARK}\nOne?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        f"<|im_start|>user\nAnd\n{MARK}\n{MARK}<|im_end|>\n<|im_start|>assistant\n"
    )
    numbered = iter([f"<image_id>{i}</image_id>{WHOLE}" for i in range(3)])
    first, *rest = inputs.prompt.split(MARK)
    assert inputs.token_ids == ids_of(first + "".join(next(numbered) + part for part in rest))


def test_tokens_are_counted_without_pixels(tmp_path):
    path = tmp_path / "large.png"
    picture(1344, 1344).save(path)
    assert count_tokens(processor(), request(MARK, path)) == len(ids_of(f"<image_id>0</image_id>{WHOLE}")) + 9 * 66 + 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patch_size", 16), ("image_feature_size", 96), ("version", 2.5), ("slice_mode", False), ("unk", "<pad>"),
        ("scale_resolution", 13), ("scale_resolution", "448"), ("max_slice_nums", 0), ("use_image_id", "yes"),
        ("norm_mean", [0.5]), ("norm_std", [0.5, 0, 0.5]),
    ],
)  # fmt: skip
def test_preprocessor_names_the_wrong_key(tmp_path, key, value):
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json: {key}"):
        load_only_processor(folder)


def test_a_tokenizer_without_the_marks_is_refused(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("<slice>", "<other>"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: <slice> are not in the model's vocabulary"):
        load_only_processor(folder)
