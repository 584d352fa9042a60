"""Videos through the whole of a model: as transformers has them, in any company, and what is refused."""

from __future__ import annotations

import base64
import inspect
import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vlmfx
from tests import invariants
from tests.golden_cases import TINY, load_model
from tests.pictures import about, encoded, mixed, picture
from tests.processing import references
from tests.versions import transformers_from
from tests.videos import about_video, container, noise, numbered
from vlmfx import LLM, InvalidRequest, SamplingParams
from vlmfx.checkpoint import read_preprocessor
from vlmfx.engine import runner
from vlmfx.errors import CheckpointError
from vlmfx.models.vision_inputs import concat
from vlmfx.processing import containers, qwen2_vl, video
from vlmfx.processing.inputs import MediaLayout
from vlmfx.processing.prompt import count_tokens, prepare
from vlmfx.processing.video import Sampling

GREEDY = SamplingParams.greedy(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return load_model(TINY["qwen2_vl"])


def video_inputs(cfg: qwen2_vl.Qwen2VLProcessing, frames: Any) -> Any:
    plan = video.probe(frames, Sampling())
    return qwen2_vl.video_inputs(cfg, plan, video.frames(frames, plan))


# ---- as transformers has them


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 5),
    height=st.integers(28, 130),
    width=st.integers(28, 130),
    limits=st.sampled_from([(56 * 56, 28 * 28 * 1280), (784, 20_000), (20_000, 60_000)]),
)
def test_patches_equal_those_of_transformers_images(count, height, width, limits):
    """A video's patch has a frame of each half: that half of the patch which transformers makes of the frame as an image."""
    model = load_model(TINY["qwen2_vl"])
    cfg = replace(model.processor.config, min_pixels=limits[0], max_pixels=limits[1])
    array = noise(count, height, width)
    reference = references.image_processor("qwen2_vl", TINY["qwen2_vl"])
    reference.min_pixels, reference.max_pixels = limits
    reference.size = {**dict(reference.size), "shortest_edge": limits[0], "longest_edge": limits[1]}
    expected = reference([Image.fromarray(frame) for frame in array], return_tensors="pt")
    frames = torch.as_tensor(expected["pixel_values"]).unflatten(0, (count, -1)).unflatten(-1, (3, 2, -1))[..., 0, :]
    frames = torch.cat([frames, frames[-1:]])[: count + count % 2]
    pairs = torch.stack([frames[0::2], frames[1::2]], -2)  # (t, patches, 3, 2, 14·14)
    inputs = video_inputs(cfg, array)
    pixels = inputs.patches(cfg.patch_size, torch.float32)
    torch.testing.assert_close(pixels, pairs.flatten(2).flatten(0, 1), atol=1e-6, rtol=0)
    grid = torch.as_tensor(expected["image_grid_thw"])[0].tolist()
    made = qwen2_vl.video_layout(cfg, video.probe(array, Sampling()))
    assert made.grid == (len(pairs), grid[1] // 2, grid[2] // 2)
    assert inputs.cu_seqlens.diff().tolist() == [grid[1] * grid[2]] * len(pairs)


@lru_cache
def reference_model() -> Any:
    """transformers' model with the weights of the tiny checkpoint."""
    transformers = transformers_from(4, 46, "is older than the oldest promised")
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(TINY["qwen2_vl"], attn_implementation="eager")
    return model.float().eval()


def types_of(cfg: qwen2_vl.Qwen2VLProcessing, ids: torch.Tensor) -> torch.Tensor:
    return (ids == cfg.image_token_id).int() + 2 * (ids == cfg.video_token_id).int()


@settings(max_examples=80, deadline=None)
@given(
    media=st.lists(st.tuples(st.booleans(), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)), max_size=4),
    text=st.integers(1, 4),
)
def test_positions_equal_transformers(media, text):
    cfg = load_model(TINY["qwen2_vl"]).processor.config
    theirs = reference_model() if hasattr(reference_model(), "get_rope_index") else reference_model().model
    ids, layouts, grids = [5] * text, {"image": [], "video": []}, {"image": [], "video": []}  # type: ignore[var-annotated]
    for is_video, t, h, w in media:
        name, token = ("video", cfg.video_token_id) if is_video else ("image", cfg.image_token_id)
        grid = (min(t, max(h, w)) if is_video else 1, h, w)  # of longer ones the test below
        layouts[name].append(MediaLayout(num_rows=math.prod(grid), grid=grid))
        grids[name].append([grid[0], 2 * h, 2 * w])
        ids += [reference_model().config.vision_start_token_id, *[token] * math.prod(grid), *[7] * text]
    mine, following = qwen2_vl.positions(cfg, ids, layouts)
    batch = torch.tensor([ids])
    options: dict[str, Any] = {f"{name}_grid_thw": torch.tensor(rows) if rows else None for name, rows in grids.items()}
    if "mm_token_type_ids" in inspect.signature(theirs.get_rope_index).parameters:
        options["mm_token_type_ids"] = types_of(cfg, batch)
    expected, deltas = theirs.get_rope_index(batch, attention_mask=torch.ones_like(batch), **options)
    assert torch.equal(mine, expected[:, 0])
    assert following - len(ids) == int(deltas.flatten()[0])


def test_what_follows_a_long_video_is_after_its_last_frame():
    """As the published code counts (transformers up to 4.57: one more than the largest so far), by hand.

    transformers 5.23 looks at height and width alone, and gives the text behind a long video positions that its frames have."""
    cfg = load_model(TINY["qwen2_vl"]).processor.config
    ids = [5, *[cfg.video_token_id] * 6, 7, 8]
    mine, following = qwen2_vl.positions(cfg, ids, {"video": [MediaLayout(num_rows=6, grid=(3, 1, 2))]})
    assert mine.tolist() == [
        [0, 1, 1, 2, 2, 3, 3, 4, 5],
        [0, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 2, 1, 2, 1, 2, 4, 5],
    ]
    assert following == 6


IMAGE, VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.mark.parametrize(
    ("prompt", "images", "videos"),
    [
        (f"{VIDEO}What happens?", 0, [4]),
        (f"{VIDEO}What happens?", 0, [3]),
        (f"{VIDEO}What happens?", 0, [1]),
        (f"See {IMAGE} and {VIDEO}: which is longer?", 1, [5]),
        (f"See {VIDEO} and {IMAGE}: which is longer?", 1, [2]),
        (f"{VIDEO} {IMAGE} {VIDEO} then {IMAGE}", 2, [3, 2]),
    ],
)
@torch.no_grad()
def test_logits_equal_transformers(model, prompt, images, videos):
    """Whichever of them comes first in the prompt; transformers takes our pixels and positions, which the tests above compare."""
    cfg = model.processor.config
    pictures = [picture(60 + 30 * i, 90, i) for i in range(images)]
    clips = [noise(count, 60, 80 + 28 * i, i) for i, count in enumerate(videos)]
    inputs = prepare(
        model.processor, {"prompt": prompt, "multi_modal_data": {"image": pictures, "video": clips or None}}
    )
    ids = torch.tensor([inputs.token_ids])
    options: dict[str, Any] = {}
    for name, key, vision in (
        ("image", "pixel_values", qwen2_vl.vision_inputs(cfg, pictures) if pictures else None),
        ("video", "pixel_values_videos", concat([video_inputs(cfg, clip) for clip in clips])),
    ):
        if vision is not None:
            options[key] = vision.patches(model.config.vision.patch_size, torch.float32)
            plans = [video.probe(clip, Sampling()) for clip in clips]
            made = [qwen2_vl.video_layout(cfg, plan) for plan in plans]
            if name == "image":
                made = [qwen2_vl.layout(cfg, (image.height, image.width)) for image in pictures]
            options[f"{name}_grid_thw"] = torch.tensor([[t, 2 * h, 2 * w] for t, h, w in (item.grid for item in made)])
    theirs = reference_model()
    if "mm_token_type_ids" in inspect.signature(theirs.forward).parameters:
        options["mm_token_type_ids"] = types_of(cfg, ids)
    options |= {
        "position_ids": inputs.positions[:, None],
        "use_cache": False,
    }  # 4.46 counts no positions of its own here
    expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits[0]
    torch.testing.assert_close(invariants.prompt_logits(model, inputs), expected, atol=2e-4, rtol=1e-4)


# ---- one truth for placeholders


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 120), st.integers(1, 120)), min_size=1, max_size=2),
    limits=st.sampled_from([None, (784, 3136), (10_000, 12_000)]),
)
def test_the_count_equals_the_rows_of_encode(sizes, limits):
    model = load_model(TINY["qwen2_vl"])
    clips = [noise(t, h, w) for t, h, w in sizes]
    keys: dict[str, Any] = (
        {} if limits is None else {"mm_processor_kwargs": {"min_pixels": limits[0], "max_pixels": limits[1]}}
    )
    request = about_video(model, *clips, **keys)
    inputs = prepare(model.processor, request)
    (features,) = runner.encode(model, [inputs])
    assert features is not None
    assert len(features) == inputs.num_features == inputs.token_ids.count(model.config.video_token_id)
    assert count_tokens(model.processor, request) == len(inputs.token_ids)


def test_counting_converts_no_frame(model, monkeypatch, tmp_path):
    (tmp_path / "a.mp4").write_bytes(container(numbered(20)))
    request = about_video(model, tmp_path / "a.mp4", media_io_kwargs={"video": {"num_frames": 5}})
    expected = len(prepare(model.processor, request).token_ids)
    monkeypatch.setattr(video, "frames", None)
    monkeypatch.setattr(containers, "to_image", None)
    assert vlmfx.count_tokens(model, request) == expected
    assert expected - len(prepare(model.processor, "What happens?").token_ids) == 3 * 2 * 3 + 2  # 5 frames of 56 x 84


def test_how_a_file_is_sampled(model):
    clip = container(numbered(40), rate=10)
    per_pair = 2 * 3  # merged patches of 56 x 84

    def pairs(llm: LLM, **keys: Any) -> float:
        ids = prepare(llm.model.processor, about_video(model, clip, **keys)).token_ids
        return ids.count(model.config.video_token_id) / per_pair

    assert pairs(LLM(model)) == 16
    assert pairs(LLM(model), media_io_kwargs={"video": {"num_frames": 9}}) == 5
    assert pairs(LLM(model), media_io_kwargs={"video": {"fps": 2}}) == 4
    assert pairs(LLM(model), media_io_kwargs={"video": {"num_frames": -1}}) == 20
    sampling = LLM(model, media_io_kwargs={"video": {"num_frames": 4}})
    assert pairs(sampling) == 2
    assert pairs(sampling, media_io_kwargs={"video": {"num_frames": 6}}) == 3
    with pytest.raises(InvalidRequest, match="num_frames: it is 0"):
        LLM(model, media_io_kwargs={"video": {"num_frames": 0}})


def test_a_file_gives_the_frames_that_it_holds(model):
    """A file, and what it decodes to, are one video to the model."""
    clip = container(numbered(6))
    plan = video.probe(clip, Sampling())
    frames = np.stack([np.asarray(frame) for frame in video.frames(clip, plan)])
    prompts = [about_video(model, source) for source in (clip, frames, [Image.fromarray(frame) for frame in frames])]
    vision = [prepare(model.processor, prompt).vision for prompt in prompts]
    assert all(v is not None and vision[0] is not None and torch.equal(v.pixels, vision[0].pixels) for v in vision)


# ---- limits of a video's own


def test_a_checkpoint_with_limits_for_videos(model, tmp_path):
    image = {"min_pixels": 3136, "max_pixels": 1_003_520}

    def made(config: dict[str, Any]) -> qwen2_vl.Qwen2VLProcessing:
        return qwen2_vl.config({**image, "video_processor": config}, model.config, model.processor.tokenizer)

    plan = video.probe(noise(2, 280, 280), Sampling())
    assert qwen2_vl.video_layout(made({}), plan).grid == (1, 10, 10)
    small = made({"size": {"shortest_edge": 784, "longest_edge": 28 * 28 * 4}})
    assert qwen2_vl.video_layout(small, plan).grid == (1, 2, 2)
    assert qwen2_vl.layout(small, (280, 280)).grid == (1, 10, 10)
    asked = qwen2_vl.request_config(small, max_pixels=28 * 28 * 9)
    assert qwen2_vl.video_layout(asked, plan).grid == qwen2_vl.layout(asked, (280, 280)).grid == (1, 3, 3)
    defaults = made({"video_processor_type": "Qwen2VLVideoProcessor"})
    assert qwen2_vl.video_layout(defaults, plan).grid == (1, 12, 12)  # 128 patches of 28 x 28 at least
    for wrong in ({"temporal_patch_size": 4}, {"image_mean": [0, 0, 0]}, {"min_pixels": 9, "max_pixels": 8}):
        with pytest.raises(CheckpointError, match=r"video_preprocessor_config\.json: .*; restore"):
            made(wrong)


def test_where_the_limits_are_read(tmp_path):
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"a": 1}, "video_processor": {"b": 2}}')
    assert read_preprocessor(tmp_path) == {"a": 1, "video_processor": {"b": 2}}
    (tmp_path / "preprocessor_config.json").write_text('{"c": 3}')
    (tmp_path / "video_preprocessor_config.json").write_text('{"d": 4}')
    assert read_preprocessor(tmp_path) == {"c": 3, "video_processor": {"d": 4}}


# ---- in company, and in messages


def test_batch_mates_do_not_matter(model):
    prompts = [
        about_video(model, noise(3, 60, 90)),
        *mixed(model),
        about_video(model, noise(1, 56, 56), noise(6, 56, 84, 1)),
        {
            "prompt": f"{VIDEO}{IMAGE}Both?",
            "multi_modal_data": {"image": picture(60, 60), "video": noise(2, 40, 40)},
        },
    ]
    llm = LLM(model, max_num_seqs=3)
    alone = invariants.token_ids([llm.generate(prompt, GREEDY)[0] for prompt in prompts])
    assert invariants.token_ids(llm.generate(prompts, GREEDY, use_tqdm=False)) == alone
    assert invariants.token_ids(LLM(model).generate(prompts[::-1], GREEDY, use_tqdm=False)) == alone[::-1]


def test_frames_of_a_video_do_not_see_each_other(model):
    """The features of a temporal patch stay as they were when another frame changes; in an image of that height they would not."""
    cfg, array = model.processor.config, noise(4, 56, 56)
    changed = array.copy()
    changed[3] = 0
    first, second = (model.functions.encode(model.params, model.config, video_inputs(cfg, a)) for a in (array, changed))
    assert torch.equal(first[:4], second[:4])
    assert not torch.allclose(first[4:], second[4:])


def url(blob: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(blob).decode()}"


def test_the_forms_of_a_video_in_a_message(model, tmp_path):
    clip = container(numbered(6), format="mp4")
    (tmp_path / "a.mp4").write_bytes(clip)
    frames = [np.asarray(f) for f in video.frames(clip, video.probe(clip, Sampling()))]
    paths = []
    for i, frame in enumerate(frames):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(frame).save(paths[-1])
    jpegs = [encoded(Image.fromarray(frame), "JPEG", quality=100, subsampling=0) for frame in frames]
    parts: list[dict[str, Any]] = [
        {"type": "video", "video": str(tmp_path / "a.mp4")},
        {"type": "video", "video": clip},
        {"type": "video", "video": np.stack(frames)},
        {"type": "video", "video": [Image.fromarray(frame) for frame in frames]},
        {"type": "video", "video": paths},
        {"type": "video", "path": str(tmp_path / "a.mp4")},
        {"type": "video_url", "video_url": {"url": url(clip)}},
        {"type": "video_url", "video_url": url(clip)},
    ]
    text = {"type": "text", "text": "What happens?"}
    expected = prepare(model.processor, {"messages": [{"role": "user", "content": [parts[0], text]}]})
    assert expected.prompt is not None
    assert expected.prompt.count(VIDEO) == 1
    assert expected.vision is not None
    for part in parts:
        inputs = prepare(model.processor, {"messages": [{"role": "user", "content": [part, text]}]})
        assert inputs.token_ids == expected.token_ids
        assert inputs.vision is not None
        assert torch.equal(inputs.vision.pixels, expected.vision.pixels)
    joined = url(b"", "video/jpeg") + ",".join(base64.b64encode(blob).decode() for blob in jpegs)
    part = {"type": "video_url", "video_url": {"url": joined}}
    inputs = prepare(model.processor, {"messages": [{"role": "user", "content": [part, text]}]})
    assert inputs.token_ids == expected.token_ids
    (output,) = LLM(model).chat(
        [{"role": "user", "content": [parts[0], text]}], GREEDY, media_io_kwargs={"video": {"num_frames": 2}}
    )
    assert output.prompt_token_ids.count(model.config.video_token_id) == 2 * 3


def test_a_server_reads_no_path_within_a_video(model, tmp_path):
    picture(9, 9).save(tmp_path / "0.png")
    strict = replace(model, processor=replace(model.processor, media=replace(model.processor.media, allow_paths=False)))
    for source in (str(tmp_path / "0.png"), [str(tmp_path / "0.png")], [str(tmp_path / "0.png")] * 2):
        with pytest.raises(InvalidRequest, match="it is a path, which is not read here"):
            prepare(strict.processor, {"messages": [{"role": "user", "content": [{"type": "video", "video": source}]}]})


def test_images_as_frames_through_chat(model):
    """The page's own way: many images, said to be of one video."""
    frames = [picture(60, 40, seed) for seed in range(4)]
    content: list[dict[str, Any]] = [{"type": "text", "text": "Consider the frames to be a part of the same video."}]
    for frame in frames:
        content.append({"type": "image_url", "image_url": {"url": url(encoded(frame, "JPEG"), "image/jpeg")}})
    llm = LLM(model, limit_mm_per_prompt={"image": 4})
    (output,) = llm.chat([{"role": "user", "content": content}], GREEDY)
    assert output.error is None
    assert output.prompt_token_ids.count(model.config.image_token_id) == 4 * 2 * 3
    with pytest.raises(InvalidRequest, match="limit_mm_per_prompt allows 4"):
        llm.chat([{"role": "user", "content": [*content, content[-1]]}], GREEDY)


# ---- what is refused


def bad_prompts(model: Any) -> list[tuple[dict[str, Any], str]]:
    clip = container(numbered(8))
    return [
        (about_video(model, clip[: clip.index(b"moov")]), "multi_modal_data.video: the video cannot be read"),
        (about_video(model, clip[: len(clip) // 2]), "the file is not whole; send all"),
        (about_video(model, b"<html>" * 99), "multi_modal_data.video: the video cannot be read"),
        (about_video(model, "no/such.mp4"), "is not a file; give the path"),
        (about_video(model, []), "it has 0 frames; give at least one"),
        (about_video(model, noise(0, 28, 28)), "it has 0 frames; give at least one"),
        (about_video(model, noise(2, 1, 300)), "multi_modal_data.video: its sides are 300 x 1, a ratio over 200"),
        (about_video(model, noise(600, 100, 100)), "tokens long, expected"),
        (about_video(model, noise(2, 28, 28), media_io_kwargs={"video": {"num_frames": 0}}), "it is 0; use an integer"),
        (about_video(model, noise(2, 28, 28), media_io_kwargs=[1]), "media_io_kwargs: it is [1]; pass"),
        ({"prompt": VIDEO}, "1 video placeholder but 0 videos were given; add a video or remove a placeholder"),
        (
            {"prompt": "x", "multi_modal_data": {"video": noise(1, 28, 28)}},
            "0 video placeholders but 1 video was given; add a placeholder or remove a video",
        ),
        ({"prompt": IMAGE, "multi_modal_data": {"video": noise(1, 28, 28)}}, "placeholder"),
        (
            {
                "prompt": IMAGE + VIDEO,
                "multi_modal_data": {
                    "image": {"image_embeds": torch.ones(1, 48), "image_grid_thw": [[1, 2, 2]]},
                    "video": noise(1, 28, 28),
                },
            },
            "both image embeddings and a video; pass",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "video_url", "video_url": {"url": url(b"<html>" * 9)}}]}
                ]
            },
            "the video cannot be read",
        ),
    ]


def test_bad_videos_are_refused_before_any_compute_and_alone(model):
    model = replace(model, processor=replace(model.processor, max_model_len=2048))
    bad = bad_prompts(model)
    llm = LLM(invariants.without_compute(model))
    for prompt, says in bad:
        with pytest.raises(InvalidRequest) as caught:
            llm.generate(prompt)
        assert says in str(caught.value)
        assert invariants.is_one_sentence(caught.value)
    good = [about_video(model, noise(3, 56, 56)), "Hello"]
    expected = invariants.token_ids(LLM(model).generate(good, GREEDY, use_tqdm=False))
    with pytest.warns(UserWarning, match=f"{len(bad)} of {len(bad) + 2} prompts failed"):
        outputs = LLM(model).generate([good[0], *(prompt for prompt, _ in bad), good[1]], GREEDY, use_tqdm=False)
    assert invariants.token_ids([outputs[0], outputs[-1]]) == expected
    assert all(isinstance(output.error, InvalidRequest) for output in outputs[1:-1])


def test_a_limit_of_videos(model):
    llm = LLM(model, limit_mm_per_prompt={"video": 1})
    llm.generate(about_video(model, noise(1, 28, 28)), GREEDY)
    with pytest.raises(InvalidRequest, match=r"2 were given but limit_mm_per_prompt allows 1 video a prompt; remove"):
        llm.generate(about_video(model, noise(1, 28, 28), noise(1, 28, 28)), GREEDY)


def test_a_family_without_videos_says_so():
    llava = load_model(TINY["llava"])
    request = {**about(llava, picture(30, 30)), "multi_modal_data": {"image": picture(30, 30), "video": noise(2, 8, 8)}}
    with pytest.raises(InvalidRequest, match="this model takes no videos; pass some of its frames as images") as caught:
        LLM(llava).generate(request)
    assert caught.value.field == "multi_modal_data.video"
    with pytest.raises(InvalidRequest, match="takes no video"):
        LLM(llava).generate({"messages": [{"role": "user", "content": [{"type": "video", "video": noise(2, 8, 8)}]}]})
