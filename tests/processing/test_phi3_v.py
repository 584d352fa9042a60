"""Phi-3.5-vision's crops, counts and prompts, against references written out by hand and transformers' tokenizer."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tests import invariants
from tests.golden_cases import load_model
from tests.pictures import about, picture
from tests.small_phi3_v import CROP, FOLDER, SIDE, small_model
from tests.versions import transformers_from
from vlmfx import LLM, CheckpointError, InvalidRequest, SamplingParams
from vlmfx.processing import phi3_v
from vlmfx.processing.inputs import MediaLayout
from vlmfx.processing.prompt import count_tokens, prepare

SIZES = st.tuples(st.integers(1, 900), st.integers(1, 900)).filter(lambda s: max(s) <= 200 * min(s))
SMALL_SIZES = SIZES.filter(lambda s: max(s) <= CROP * min(s))
IMAGE = "multi_modal_data.image"
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def settings_of(num_crops: int) -> phi3_v.Phi3VProcessing:
    """The published sizes: crops of 336 pixels, 12 rows of features a side."""
    return replace(load_model(FOLDER).processor.config, num_crops=num_crops)


def crops_by_hand(width: int, height: int, num_crops: int, unit: int) -> tuple[int, int]:
    """(columns, rows) of the padded image: tries every number of crops along the longer side."""
    if width < height:
        rows, columns = crops_by_hand(height, width, num_crops, unit)
        return columns, rows
    ratio, best = width / height, 0
    for along in range(1, num_crops + 1):
        if along * math.ceil(along / ratio) <= num_crops:
            best = along
    return best, math.ceil(int(best * unit / ratio) / unit)


@pytest.mark.parametrize(
    ("width", "height", "num_crops", "rows"),
    [
        (336, 336, 4, 757), (1, 1, 4, 757), (500, 500, 4, 757), (400, 100, 4, 745), (100, 400, 4, 781),
        (1000, 1000, 16, 2509), (640, 480, 16, 1921), (480, 640, 16, 1933), (1920, 1080, 16, 2353),
        (640, 480, 1, 313), (30, 30, 1024, 147_997),
    ],
)  # fmt: skip
def test_counts_of_known_sizes(width, height, num_crops, rows):
    """(crops + 1)·144 + 1 + (rows of crops + 1)·12; the first nine as the reference's own processor counts."""
    assert phi3_v.layout(settings_of(num_crops), (height, width)).num_rows == rows


@settings(deadline=None)
@given(size=SIZES, num_crops=st.integers(1, 60))
def test_counts_follow_the_formula(size, num_crops):
    (width, height), cfg = size, settings_of(num_crops)
    columns, rows = crops_by_hand(width, height, num_crops, 336)
    assert phi3_v.crop_grid(cfg, (height, width)) == (rows, columns)
    assert phi3_v.layout(cfg, (height, width)).num_rows == (rows * columns + 1) * 144 + 1 + (rows + 1) * 12
    assert rows * columns <= num_crops


@torch.no_grad()
@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(SMALL_SIZES, min_size=1, max_size=3), num_crops=st.integers(1, 20))
def test_counts_are_the_rows_that_encode_returns(sizes, num_crops):
    small = small_model()
    request = about(small, *[Image.new("RGB", size) for size in sizes])
    request |= {"mm_processor_kwargs": {"num_crops": num_crops}}
    inputs = prepare(small.processor, request)
    grids = [crops_by_hand(width, height, num_crops, CROP) for width, height in sizes]
    expected = sum((c * r + 1) * SIDE**2 + 1 + (r + 1) * SIDE for c, r in grids)
    assert inputs.vision is not None
    assert inputs.vision.row_index is not None
    assert len(inputs.vision.row_index) == inputs.num_features == expected
    assert small.functions.encode(small.params, small.config, inputs.vision).shape[0] == expected
    assert inputs.vision.num_segments == sum(c * r + 1 for c, r in grids)  # none is empty padding
    assert int((inputs.feature_index >= 0).sum()) == expected
    assert count_tokens(small.processor, request) == len(inputs.token_ids)


def pixels_by_hand(image: Image.Image, num_crops: int, unit: int) -> Tensor:
    """(1 + crops, 3, unit, unit), the whole image first: PIL for the size and a white canvas, a loop for the crops."""
    is_tall = image.width < image.height
    lying = image.transpose(Image.Transpose.TRANSPOSE) if is_tall else image
    columns, rows = crops_by_hand(*lying.size, num_crops, unit)
    new_height = int(columns * unit / (lying.width / lying.height))
    canvas = Image.new("RGB", (columns * unit, rows * unit), "white")
    resized = lying.resize((columns * unit, new_height), Image.Resampling.BILINEAR)
    canvas.paste(resized, (0, int((rows * unit - new_height) / 2)))
    if is_tall:
        canvas, columns, rows = canvas.transpose(Image.Transpose.TRANSPOSE), rows, columns
    scaled = torch.from_numpy(np.asarray(canvas, dtype=np.float32) / np.float32(255))
    x = ((scaled - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1).contiguous()
    views = [F.interpolate(x[None], size=(unit, unit), mode="bicubic")[0]]
    for top in range(0, rows * unit, unit):
        views += [x[:, top : top + unit, left : left + unit] for left in range(0, columns * unit, unit)]
    return torch.stack(views)


def views_of(cfg: phi3_v.Phi3VProcessing, image: Image.Image) -> Tensor:
    """The packed patches put back together."""
    inputs = phi3_v.vision_inputs(cfg, [image])
    side, p = cfg.crop_size // cfg.patch_size, cfg.patch_size
    x = inputs.pixels.view(-1, side, side, 3, p, p).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(-1, 3, cfg.crop_size, cfg.crop_size)


@settings(max_examples=40, deadline=None)
@given(size=st.tuples(st.integers(1, 300), st.integers(1, 300)), num_crops=st.integers(1, 20), seed=st.integers(0, 99))
def test_pixels_equal_a_naive_transform(size, num_crops, seed):
    assume(max(size) <= CROP * min(size))
    cfg = replace(small_model().processor.config, num_crops=num_crops)
    image = picture(size[0], size[1], seed)
    torch.testing.assert_close(views_of(cfg, image), pixels_by_hand(image, num_crops, CROP), atol=1e-6, rtol=0)


def test_padding_is_white_and_half_of_it_before():
    """336 × 100 in one crop: 236 lines are missing, 118 above; 99 lines: 118 above and 119 below."""
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    for height, above in ((100, 118), (99, 118)):
        for is_tall in (False, True):
            image = Image.new("RGB", (336, height))
            crop = views_of(settings_of(1), image.transpose(Image.Transpose.TRANSPOSE) if is_tall else image)[1]
            is_white = (crop.transpose(1, 2) if is_tall else crop).isclose(white[:, None, None]).all(2).all(0)
            assert is_white.tolist() == [True] * above + [False] * height + [True] * (336 - above - height)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 2), (10, 2000)])
@pytest.mark.parametrize("num_crops", [1, 4])
def test_small_and_thin_images_pass(size, num_crops):
    cfg = settings_of(num_crops)
    inputs = phi3_v.vision_inputs(cfg, [picture(*size)])
    assert inputs.row_index is not None
    assert len(inputs.row_index) == phi3_v.layout(cfg, size[::-1]).num_rows
    assert bool(inputs.pixels.isfinite().all())


@pytest.mark.parametrize("num_crops", [1, 2, 1024])
@pytest.mark.parametrize(("unit", "ratio"), [(336, 200), (56, 56)])
def test_at_the_largest_ratio_the_resized_image_has_a_line(num_crops, unit, ratio):
    cfg = replace(settings_of(num_crops), crop_size=unit)
    assert min(phi3_v.hd_size(cfg, 1, ratio)) >= 1
    assert min(phi3_v.hd_size(cfg, ratio, 1)) >= 1
    with pytest.raises(InvalidRequest, match=f"its sides are {ratio + 1} x 1, a ratio over {ratio}; crop it"):
        phi3_v.hd_size(cfg, 1, ratio + 1)


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("What is it?", []),
        ("<|image_1|>", [1]),
        ("<|image_1|>\nWhat is it?", [1]),
        ("<|user|>\n<|image_1|>\n<|image_2|>\nCompare.<|end|>\n<|assistant|>\n", [1, 2]),
        ("First <|image_2|> then<|image_1|>", [2, 1]),
        ("<|image_1|><|image_2|> and again <|image_1|>", [1, 2, 1]),
        ("<|image_01|> é ü <|image|> <|image_x|>", [1]),
    ],
)
def test_ids_are_those_of_each_chunk_alone(text, order):
    """Chunks by transformers' tokenizer, each with its bos; a number that comes twice shows the same rows twice."""
    transformers = transformers_from(4, 46, "is older than the oldest promised")
    tokenizer, processor = transformers.AutoTokenizer.from_pretrained(FOLDER), load_model(FOLDER).processor
    counts = {1: 3, 2: 5}
    rows = {1: [0, 1, 2], 2: [3, 4, 5, 6, 7]}
    chunks, rest = [], text
    for _ in order:
        before, rest = rest.split("<|image_", 1)
        chunks.append(before)
        rest = rest.split("|>", 1)[1]
    ids, index = [], []
    for number, chunk in zip([*order, None], [*chunks, rest], strict=True):
        ids += (found := tokenizer(chunk)["input_ids"])
        index += [-1] * len(found)
        if number is not None:
            ids += [431] * counts[number]  # <|image|>
            index += rows[number]
    layouts = {"image": [MediaLayout(num_rows=counts[n], grid=(1, 1, counts[n])) for n in sorted(set(order))]}
    expanded = phi3_v.expand(processor.config, processor.tokenizer, text, layouts)
    assert expanded.token_ids == ids
    assert expanded.feature_index.tolist() == index
    assert ids.count(1) == len(order) + 1


def test_a_text_that_begins_with_bos_gets_no_second_one():
    """As a template that writes it; the chunks after an image have theirs all the same."""
    small = small_model()
    image = picture(30, 30)
    plain, written = (
        prepare(small.processor, {"prompt": f"{bos}<|image_1|> Why?", "multi_modal_data": {"image": image}})
        for bos in ("", "<s>")
    )
    assert written.token_ids == plain.token_ids
    assert plain.token_ids[0] == 1
    assert plain.token_ids.count(1) == 2


@torch.no_grad()
def test_an_image_named_twice_is_encoded_once():
    small = small_model()
    prompt = "<|image_1|> or <|image_1|>?"
    inputs = prepare(small.processor, {"prompt": prompt, "multi_modal_data": {"image": picture(60, 60)}})
    logits = invariants.prompt_logits(small, inputs)
    twice = {"prompt": "<|image_1|> or <|image_2|>?", "multi_modal_data": {"image": [picture(60, 60)] * 2}}
    other = prepare(small.processor, twice)
    assert other.num_features == 2 * inputs.num_features
    torch.testing.assert_close(logits, invariants.prompt_logits(small, other))


def test_ids_may_hold_one_token_an_image_or_all():
    small = small_model()
    images = {"image": [picture(60, 40), picture(40, 90)]}
    counts = [phi3_v.layout(small.processor.config, size).num_rows for size in ((40, 60), (90, 40))]
    single = prepare(small.processor, {"prompt_token_ids": [1, 431, 7, 431, 8], "multi_modal_data": images})
    assert single.token_ids == [1, *[431] * counts[0], 7, *[431] * counts[1], 8]
    assert single.feature_index[single.feature_index >= 0].tolist() == list(range(sum(counts)))
    again = prepare(small.processor, {"prompt_token_ids": single.token_ids, "multi_modal_data": images})
    assert again.token_ids == single.token_ids
    assert torch.equal(again.feature_index, single.feature_index)


def test_parts_and_tags_in_a_message_give_the_same_prompt():
    """A template of strings: a part that has no tag in the text gets the next one."""
    small = small_model()
    images = [{"type": "image", "image": picture(60, 40)}, {"type": "image", "image": picture(40, 40)}]
    parts = [*images, {"type": "text", "text": "Compare."}]
    tagged = [*images, {"type": "text", "text": "<|image_1|>\n<|image_2|>\nCompare."}]
    answers = [prepare(small.processor, {"messages": [{"role": "user", "content": c}]}) for c in (parts, tagged)]
    assert answers[0].prompt == "<|user|>\n<|image_1|>\n<|image_2|>\nCompare.<|end|>\n<|assistant|>\n"
    assert answers[1].prompt == answers[0].prompt
    assert answers[1].token_ids == answers[0].token_ids


def test_images_are_numbered_through_a_conversation():
    def user(seed):
        image = {"type": "image", "image": picture(40, 40, seed)}
        return {"role": "user", "content": [image, {"type": "text", "text": "Hm?"}]}

    messages = [user(0), {"role": "assistant", "content": "Well."}, user(1)]
    inputs = prepare(small_model().processor, {"messages": messages})
    assert inputs.prompt is not None
    assert inputs.prompt.count("<|image_1|>") == inputs.prompt.count("<|image_2|>") == 1
    assert inputs.feature_index.max() == inputs.num_features - 1


@torch.no_grad()
def test_ready_embeddings_answer_as_their_images():
    small = small_model()
    request = about(small, picture(60, 40), picture(40, 60))
    inputs = prepare(small.processor, request)
    assert inputs.vision is not None
    rows = small.functions.encode(small.params, small.config, inputs.vision)
    counts = [phi3_v.layout(small.processor.config, size).num_rows for size in ((40, 60), (60, 40))]
    params = SamplingParams.greedy(max_tokens=6, ignore_eos=True)
    expected = LLM(small).generate(request, params)[0].outputs[0].token_ids
    ready = {**request, "multi_modal_data": {"image": list(rows.split(counts))}}
    assert LLM(small).generate(ready, params)[0].outputs[0].token_ids == expected


@pytest.mark.parametrize(
    ("shapes", "counts"),
    [([(7, 32)], [7]), ([(2, 7, 32)], [7, 7]), ([(7, 32), (9, 32)], [7, 9]), ([(1, 7, 32), (2, 4, 32)], [7, 4, 4])],
)
def test_forms_of_ready_embeddings(shapes, counts):
    """2-D is one image, 3-D as many as its first dimension, a list either of each."""
    values = [torch.randn(shape) for shape in shapes]
    rows, layouts = phi3_v.embed_inputs(load_model(FOLDER).processor.config, values if len(values) > 1 else values[0])
    assert [item.num_rows for item in layouts] == counts
    assert torch.equal(rows, torch.cat([v.reshape(-1, 32) for v in values]))


def tags(*numbers: object, images: int) -> dict[str, object]:
    text = "".join(f"<|image_{n}|>" for n in numbers)
    return {"prompt": f"{text}Why?", "multi_modal_data": {"image": [picture(40, 40)] * images}}


BAD = {
    "a gap": (tags(1, 3, images=2), "prompt", "have the numbers 1, 3, expected 1 to 2 without gaps"),
    "numbers from 0": (tags(0, 1, images=2), "prompt", "have the numbers 0, 1, expected 1 to 2 without gaps"),
    "a number beyond any integer": (tags("9" * 5000, images=1), "prompt", "expected 1 to 1 without gaps"),
    "many numbers": (tags(*range(2, 42), images=40), "prompt", "7, 8, 9, …, expected 1 to 40"),
    "too few placeholders": (tags(1, images=2), "prompt", "it has 1 image placeholder but 2 images were given"),
    "the same one for two images": (tags(1, 1, images=2), "prompt", "1 image placeholder but 2 images were given"),
    "too many placeholders": (tags(1, 2, images=1), "prompt", "it has 2 image placeholders but 1 image was given"),
    "placeholders alone": (tags(1, images=0), "prompt", "it has 1 image placeholder but 0 images were given"),
    "another family's placeholder": (
        {"prompt": "<image>Why?", "multi_modal_data": {"image": picture(9, 9)}},
        "prompt",
        "it has 0 image placeholders but 1 image was given; add a placeholder",
    ),
    "ids without the image": (
        {"prompt_token_ids": [1, 5], "multi_modal_data": {"image": picture(9, 9)}},
        "prompt",
        "it has 0 image placeholders",
    ),
    "a thin image": (
        {"prompt": "<|image_1|>", "multi_modal_data": {"image": Image.new("RGB", (2001, 10))}},
        IMAGE,
        "its sides are 2001 x 10, a ratio over 56; crop it",
    ),
    "no crops": (
        tags(1, images=1) | {"mm_processor_kwargs": {"num_crops": 0}},
        "mm_processor_kwargs.num_crops",
        "it is 0; use an integer from 1 to 1024",
    ),
    "a billion crops": (
        tags(1, images=1) | {"mm_processor_kwargs": {"num_crops": 10**9}},
        "mm_processor_kwargs.num_crops",
        "use an integer from 1 to 1024",
    ),
    "more crops than the context holds": (
        tags(*range(1, 9), images=8) | {"mm_processor_kwargs": {"num_crops": 1024}},
        "prompt",
        "use fewer or smaller images",
    ),
    "crops that are a word": (
        tags(1, images=1) | {"mm_processor_kwargs": {"num_crops": "4"}},
        "mm_processor_kwargs.num_crops",
        "use an integer",
    ),
    "embeddings without rows": (
        {"prompt": "<|image_1|>", "multi_modal_data": {"image": torch.empty(1, 0, 32)}},
        IMAGE,
        "embeddings of an image have 0 rows; pass all rows",
    ),
    "embeddings of another width": (
        {"prompt": "<|image_1|>", "multi_modal_data": {"image": torch.ones(1, 9, 31)}},
        IMAGE,
        "expected (rows, 32)",
    ),
    "embeddings with a NaN": (
        {"prompt": "<|image_1|>", "multi_modal_data": {"image": torch.full((9, 32), torch.nan)}},
        IMAGE,
        "not finite",
    ),
    "embeddings of two images for one place": (
        {"prompt": "<|image_1|>", "multi_modal_data": {"image": torch.ones(2, 9, 32)}},
        "prompt",
        "it has 1 image placeholder but 2 images were given",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_is_refused_before_any_compute(name):
    request, field, says = BAD[name]
    small = small_model()
    with pytest.raises(InvalidRequest) as caught:
        prepare(small.processor, request)
    assert says in str(caught.value)
    assert caught.value.field == field
    assert invariants.is_one_sentence(caught.value)
    assert len(str(caught.value)) < 400


def test_others_of_the_batch_are_not_harmed():
    small = small_model()
    params = SamplingParams.greedy(max_tokens=5, ignore_eos=True)
    good = [about(small, picture(60, 40)), "Hello", about(small, picture(1, 1), picture(90, 200))]
    bad = [request for request, _, _ in BAD.values()]
    with pytest.warns(UserWarning, match=f"{len(bad)} of {len(bad) + len(good)} prompts failed"):
        outputs = LLM(small).generate([*bad[::2], *good, *bad[1::2]], params, use_tqdm=False)
    at = len(bad[::2])
    expected = invariants.token_ids(LLM(small).generate(good, params, use_tqdm=False))
    assert invariants.token_ids(outputs[at : at + len(good)]) == expected
    assert all(isinstance(o.error, InvalidRequest) for o in [*outputs[:at], *outputs[at + len(good) :]])


def test_num_crops_of_a_request_is_its_own():
    small = small_model()
    square = tags(1, images=1)
    requests = [square, square | {"mm_processor_kwargs": {"num_crops": 16}}, square]
    lengths = [len(prepare(small.processor, request).token_ids) for request in requests]
    assert lengths[0] == lengths[2]
    assert lengths[1] - lengths[0] == 12 * SIDE**2 + 2 * SIDE  # 4 × 4 crops in place of 2 × 2


@pytest.mark.parametrize(
    ("preprocessor", "says"),
    [
        ({"num_crops": 0}, "num_crops is 0, expected an integer from 1 to 1024"),
        ({"num_crops": 4.0}, "num_crops is 4.0"),
        ({"num_img_tokens": 256}, "num_img_tokens is 256"),
        ({"resample": 3}, "resample is 3, expected 2"),
        ({"do_normalize": False}, "do_normalize"),
        ({"image_std": [0, 1, 1]}, "image_std"),
    ],
)
def test_a_preprocessor_config_that_is_not_implemented_is_refused(preprocessor, says):
    model = load_model(FOLDER)
    with pytest.raises(CheckpointError, match=says) as caught:
        phi3_v.config(preprocessor, model.config, model.processor.tokenizer)
    assert invariants.is_one_sentence(caught.value)


def test_a_tokenizer_without_the_image_token_is_refused():
    model = load_model(FOLDER)
    bare = replace(model.processor.tokenizer, backend=type(model.processor.tokenizer.backend).from_str(VOCABULARY))
    with pytest.raises(CheckpointError, match=r"it has no <\|image\|> token; restore"):
        phi3_v.config({}, model.config, bare)


VOCABULARY = '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "added_tokens": []}'


def test_without_a_preprocessor_config_there_is_one_crop():
    """The default of the reference's image processor."""
    model = load_model(FOLDER)
    assert phi3_v.config({}, model.config, model.processor.tokenizer).num_crops == 1
