"""Every stage of every golden case, in float32: what an independent implementation computed, vlmfx computes too.

`pytest -s` prints the largest difference a stage."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from torch import Tensor

from tests import golden_cases, invariants
from tests.golden_cases import COMMITTED, SHARED, Case, Prompt, load_model
from vlmfx import LLM, SamplingParams, embed
from vlmfx.checkpoint import FAMILIES, Model
from vlmfx.engine import runner
from vlmfx.models import siglip
from vlmfx.models.pooling import normalize, pool
from vlmfx.models.vision_inputs import VisionInputs, cumulative
from vlmfx.processing.chat import load_chat_template
from vlmfx.processing.inputs import ModelInputs
from vlmfx.processing.prompt import prepare

# The README's tolerances are wider; these are the aim. Integers and ids are exact.
PIXELS = {"atol": 1e-6, "rtol": 0.0}
HIDDEN = {"atol": 1e-4, "rtol": 1e-4}
LOGITS = {"atol": 1e-4, "rtol": 1e-5}
VECTORS = {"atol": 1e-5, "rtol": 0.0}
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

COMMITTED_CASES = golden_cases.find(COMMITTED)
SHARED_CASES = golden_cases.find(SHARED)
NO_SHARED = pytest.param(
    None, id="shared", marks=pytest.mark.skip(reason=f"the larger set is not here: no ../{'/'.join(SHARED.parts[-2:])}")
)
CASES = [pytest.param(case, id=case.name) for case in COMMITTED_CASES]
CASES += [pytest.param(case, id=f"shared-{case.name}") for case in SHARED_CASES] or [NO_SHARED]
PROMPTS = [
    pytest.param(prompt, id=f"{param.id}-{prompt.prefix}".rstrip("-."))
    for param in CASES
    if isinstance(case := param.values[0], Case)
    for prompt in case.prompts()
] + [NO_SHARED] * (not SHARED_CASES)
EMBEDDINGS = [
    pytest.param(prompt, id=f"shared-{case.name}")
    for case in golden_cases.find_embeddings(SHARED)
    for prompt in case.prompts()
] or [NO_SHARED]


@pytest.fixture(scope="module")
def largest() -> Iterator[defaultdict[tuple[str, str], float]]:
    """(family, stage) → the largest difference seen, printed at the end."""
    seen: defaultdict[tuple[str, str], float] = defaultdict(float)
    yield seen
    print("\nlargest difference from the goldens")
    for (family, stage), value in sorted(seen.items()):
        print(f"  {family:10} {stage:24} {value:.1e}")


def test_every_family_has_a_committed_case():
    covered = {golden_cases.family_of(case.model_folder) for case in COMMITTED_CASES}
    assert set(FAMILIES.values()) - covered == set(), "add a case with tests/goldens/make.py"


def test_the_committed_part_stays_small():
    total = sum(path.stat().st_size for path in COMMITTED.rglob("*") if path.is_file())
    assert total < 3_000_000


@pytest.mark.parametrize("prompt", PROMPTS + EMBEDDINGS)
def test_stages(prompt: Prompt, largest):
    model = load_model(prompt.case.model_folder)
    inputs = prepare(model.processor, prompt.request())
    for stage, mine, tolerance in stages(model, inputs):
        if stage in prompt:
            family = golden_cases.family_of(prompt.case.model_folder)
            difference = prompt.difference(stage, mine, **tolerance)
            largest[str(family), stage] = max(largest[str(family), stage], difference)


@pytest.mark.parametrize("prompt", PROMPTS + EMBEDDINGS)
def test_every_golden_stage_is_compared(prompt: Prompt):
    model = load_model(prompt.case.model_folder)
    compared = {stage for stage, _, _ in stages(model, prepare(model.processor, prompt.request()))}
    rest = {name for name in prompt.case.tensors if name.startswith(prompt.prefix)} - {
        prompt.prefix + name for name in (*compared, "greedy_ids", "greedy_margins", "image_sizes_wh")
    }
    assert {name for name in rest if not name.startswith("padded.")} == set()


@pytest.mark.parametrize("prompt", PROMPTS + EMBEDDINGS)
def test_messages_give_the_same_request(prompt: Prompt):
    chats = prompt.chat_requests()
    if not chats:
        pytest.skip("the case starts from a bare prompt, it has no messages.json")
    processor = load_model(prompt.case.model_folder).processor
    if prompt.case.chat_template is not None:
        template = load_chat_template(prompt.case.model_folder, prompt.case.chat_template)
        processor = replace(processor, chat_template=template)
    plain = prepare(processor, prompt.request())
    for chatted in [prepare(processor, chat) for chat in chats]:
        assert chatted.prompt == prompt.text
        assert chatted.token_ids == plain.token_ids
        assert torch.equal(chatted.positions, plain.positions)
        if plain.vision is not None and chatted.vision is not None:
            assert torch.equal(chatted.vision.pixels, plain.vision.pixels)
        if plain.embeds is not None and chatted.embeds is not None:
            assert torch.equal(chatted.embeds, plain.embeds)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_alone(prompt: Prompt, largest):
    """The ids, the text and the margin of each step, through the cache."""
    model = load_model(prompt.case.model_folder)
    params = SamplingParams.greedy(max_tokens=len(prompt.greedy_ids), ignore_eos=True, logprobs=2)
    (output,) = LLM(model).generate(prompt.request(), params)
    assert list(output.outputs[0].token_ids) == prompt.greedy_ids
    assert output.outputs[0].text == prompt.greedy_text
    assert output.prompt_token_ids == prompt["input_ids"].flatten().tolist()
    assert output.outputs[0].logprobs is not None
    best = [sorted((c.logprob for c in step.values()), reverse=True) for step in output.outputs[0].logprobs]
    margins = torch.tensor([first - second for first, second, *_ in best])
    family = str(golden_cases.family_of(prompt.case.model_folder))
    # Rows of 1,500 in the mean leave more rounding: of phi3v-crops16, vlmfx in float64 is 2e-4 from vlmfx in float32.
    tolerance = {**LOGITS, "atol": 5e-4} if family == "phi3_v" else LOGITS
    largest[family, "greedy_margins"] = max(
        largest[family, "greedy_margins"], prompt.difference("greedy_margins", margins, **tolerance)
    )


@pytest.mark.parametrize("case", CASES)
def test_greedy_in_one_batch(case: Case):
    prompts = case.prompts()
    params = [SamplingParams.greedy(max_tokens=len(p.greedy_ids), ignore_eos=True) for p in prompts]
    outputs = LLM(load_model(case.model_folder)).generate([p.request() for p in prompts], params, use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [p.greedy_ids for p in prompts]
    assert [o.outputs[0].text for o in outputs] == [p.greedy_text for p in prompts]


@pytest.mark.parametrize("folder", sorted({case.model_folder for case in [*COMMITTED_CASES, *SHARED_CASES]}), ids=str)
def test_greedy_of_all_cases_of_a_model_in_one_batch(folder):
    prompts = [p for case in [*COMMITTED_CASES, *SHARED_CASES] if case.model_folder == folder for p in case.prompts()]
    params = [SamplingParams.greedy(max_tokens=len(p.greedy_ids), ignore_eos=True) for p in prompts]
    outputs = LLM(load_model(folder), max_num_seqs=3).generate([p.request() for p in prompts], params, use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [p.greedy_ids for p in prompts]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_bfloat16_is_near(prompt: Prompt, largest):
    """Logits within 2.5 percent of their range, where transformers' own depart by up to 2.1; the next token is the same wherever
    the margin allows a difference of that size."""
    model = load_model(prompt.case.model_folder, "bfloat16")
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        mine = invariants.prompt_logits(model, prepare(model.processor, prompt.request()))[-1].float()
    gold = prompt["last_logits"]
    sampled = prompt.case.meta["sampled"].get(f"{prompt.prefix}last_logits")
    assert sampled is None, "all of the vocabulary is kept, for the range"
    spread = float(gold.max() - gold.min())
    difference = float((mine - gold).abs().max()) / spread
    family = str(golden_cases.family_of(prompt.case.model_folder))
    largest[family, "bfloat16 (share of range)"] = max(largest[family, "bfloat16 (share of range)"], difference)
    assert difference < 0.025
    if float(prompt["greedy_margins"][0]) > 0.05 * spread:
        assert int(mine.argmax()) == prompt.greedy_ids[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prompt", EMBEDDINGS)
def test_embedding_alone(prompt: Prompt, dtype: str):
    """The vector; in bfloat16 its cosine, which transformers' own Phi-3 brings down to 0.998 in these cases."""
    llm = LLM(load_model(prompt.case.model_folder, dtype), task="embed")
    (output,) = llm.embed(prompt.request())
    if "image_sizes" not in prompt:  # Phi-3.5's goldens mark images by ids of their own
        assert output.prompt_token_ids == prompt["input_ids"].flatten().tolist()
    vector = torch.tensor(output.outputs.embedding)
    cosine = float(vector @ prompt["embedding"])
    assert cosine > (0.99999 if dtype == "float32" else 0.997)
    if dtype == "float32":
        prompt.difference("embedding", vector, **VECTORS)
        for dimensions in (32, 64):
            if f"embedding_{dimensions}" in prompt:
                cut = embed(llm, prompt.request(), dimensions)
                prompt.difference(f"embedding_{dimensions}", cut[0], **VECTORS)


@pytest.mark.parametrize(
    "prompts",
    [
        pytest.param(list(prompts), id=folder.name)
        for folder, prompts in groupby(
            (param.values[0] for param in EMBEDDINGS if isinstance(param.values[0], Prompt)),
            key=lambda prompt: prompt.case.model_folder,
        )
    ]
    or [NO_SHARED],
)
def test_embeddings_of_a_model_in_one_batch(prompts: list[Prompt]):
    """Each vector, and the cosine of each pair, to the six digits that the reference wrote."""
    llm = LLM(load_model(prompts[0].case.model_folder), task="embed")
    vectors = embed(llm, [p.request() for p in prompts], use_tqdm=False)
    torch.testing.assert_close(vectors, torch.stack([p["embedding"] for p in prompts]), atol=1e-5, rtol=0)
    family = prompts[0].case.name.partition("-")[0]
    gold = json.loads((SHARED / f"{family}-similarities.json").read_text(encoding="utf-8"))
    assert gold["names"] == [p.case.name for p in prompts]
    torch.testing.assert_close(vectors @ vectors.T, torch.tensor(gold["cosine"]), atol=2e-6, rtol=0)
    scores = llm.score(prompts[0].request(), [p.request() for p in prompts[1:]], use_tqdm=False)
    assert [s.outputs.score for s in scores] == pytest.approx(gold["cosine"][0][1:], abs=2e-6)


@torch.no_grad()
def stages(model: Model, inputs: ModelInputs) -> Iterator[tuple[str, Tensor, dict[str, float]]]:
    """(golden name, what vlmfx has there, tolerance) of one request; a family adds its own names here."""
    f, exact = model.functions, {"atol": 0.0, "rtol": 0.0}
    yield "input_ids", torch.tensor([inputs.token_ids]), exact
    if f.__name__.endswith(QWEN):
        yield "position_ids", inputs.positions[:, None], exact
        yield "rope_deltas", torch.tensor([[inputs.next_position - len(inputs.token_ids)]]), exact
    if f.__name__.endswith("minicpm_v"):
        yield "image_bound", image_bound(inputs, model.config.resampler.num_queries), exact
    if inputs.vision is not None:
        vision = inputs.vision
        pixels = vision.patches(model.config.vision.patch_size, torch.float32)
        hidden = f.vision_hidden(model.params, model.config, vision)
        embeds = f.encode(model.params, model.config, vision)
        torch.testing.assert_close(f.project(model.params, model.config, hidden, vision), embeds, rtol=0, atol=0)
        if f.__name__.endswith("minicpm_v"):
            yield from slice_stages(model, vision, pixels, hidden)
            yield "image_embeds", embeds.unflatten(0, (vision.num_segments, -1)), HIDDEN
        elif f.__name__.endswith("phi3_v"):
            yield from crop_stages(model, vision, pixels, hidden, embeds)
        elif f.__name__.endswith("llava"):
            n, side = vision.num_segments, model.config.vision.image_size // model.config.vision.patch_size
            patch = model.config.vision.patch_size
            images = pixels.view(n, side, side, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
            yield "pixel_values", images.reshape(n, 3, side * patch, side * patch), PIXELS
            yield "vision_selected_hidden", hidden.unflatten(0, (n, -1)), HIDDEN
            yield "image_embeds", embeds.unflatten(0, (n, -1)), HIDDEN
        else:
            # A golden case with a video has that one only, and no image.
            is_video = getattr(model.config, "video_token_id", None) in inputs.token_ids
            name = "video" if is_video else "image"
            yield "pixel_values_videos" if is_video else "pixel_values", in_image_order(model, vision, pixels), PIXELS
            yield f"{name}_vision_hidden", hidden[:, : model.config.vision.hidden_size], HIDDEN
            rows, *deepstack = embeds.split(model.config.text.hidden_size, -1)
            yield f"{name}_embeds", rows, HIDDEN
            if deepstack:
                yield "deepstack_embeds", torch.stack(deepstack), HIDDEN
            ends = vision.cu_seqlens[1:].long() - 1  # a segment's last patch lies in its lower right corner
            grids = torch.cat([torch.ones(len(ends), 1), vision.position_ids[ends, :2] + 1], 1)
            yield f"{name}_grid_thw", grids[:1] * torch.tensor([len(ends), 1, 1]) if is_video else grids, exact
    elif inputs.embeds is not None and f.__name__.endswith(QWEN):
        grid = inputs.positions[:, inputs.feature_index >= 0]  # of one image: the positions span its merged grid
        span = (grid.amax(1) - grid.amin(1) + 1) * torch.tensor([1, *[model.config.vision.merge_size] * 2])
        yield "image_grid_thw", span[None], exact
    (features,) = runner.encode(model, [inputs])
    ids = torch.tensor(inputs.token_ids)
    x = f.merge(model.params, model.config, ids, features, inputs.feature_index)
    yield "inputs_embeds", x[None], near(x) if f.__name__.endswith("phi3_v") else HIDDEN
    logits = invariants.prompt_logits(model, inputs)
    yield "prompt_logits", logits, LOGITS
    yield "last_logits", logits[-1], LOGITS
    pooled = pool(invariants.prompt_hidden(model, inputs), cumulative([len(ids)]), "last")
    yield "last_hidden_state_last_token", pooled[0], HIDDEN
    yield "pooled", pooled[0], HIDDEN
    yield "embedding", normalize(pooled)[0], VECTORS
    for dimensions in (32, 64):
        yield f"embedding_{dimensions}", normalize(pooled, dimensions)[0], VECTORS


def in_image_order(model: Model, vision: VisionInputs, patches: Tensor) -> Tensor:
    """Patches of Qwen2.5-VL, which go through its tower window by window, as the image has them; of the others as they are."""
    if vision.row_index is None:
        return patches
    return patches.unflatten(0, (-1, model.config.vision.merge_size**2))[vision.row_index].flatten(0, 1)


def image_bound(inputs: ModelInputs, num_queries: int) -> Tensor:
    """(slices, 2): where the rows of each image and slice of MiniCPM-V begin and end in the prompt."""
    places = (inputs.feature_index >= 0).nonzero().view(-1, num_queries)
    assert torch.equal(inputs.feature_index[places].flatten(), torch.arange(places.numel()))
    assert bool((places.diff(dim=1) == 1).all())
    return torch.stack((places[:, 0], places[:, -1] + 1), 1)


def slice_stages(
    model: Model, vision: VisionInputs, pixels: Tensor, hidden: Tensor
) -> Iterator[tuple[str, Tensor, dict[str, float]]]:
    """What MiniCPM-V's goldens hold of each image and slice."""
    patch = model.config.vision.patch_size
    embedded = siglip.embed(model.params["vision"], pixels, vision.position_ids[:, 0])
    ends = vision.cu_seqlens[1:].long() - 1
    yield "tgt_sizes", vision.position_ids[ends, 1:] + 1, {"atol": 0.0, "rtol": 0.0}
    for k, parts in enumerate(
        zip(*(t.split(vision.cu_seqlens.diff().tolist()) for t in (pixels, embedded, hidden)), strict=True)
    ):
        rows = parts[0].view(-1, 3, patch, patch).permute(1, 2, 0, 3)
        yield f"slice{k}.pixel_values", rows.reshape(3, patch, -1), PIXELS
        yield f"slice{k}.patch_plus_position", parts[1], HIDDEN
        yield f"slice{k}.vision_hidden", parts[2], HIDDEN


def crop_stages(
    model: Model, vision: VisionInputs, pixels: Tensor, hidden: Tensor, embeds: Tensor
) -> Iterator[tuple[str, Tensor, dict[str, float]]]:
    """What Phi-3.5's goldens hold of each image: the whole and its crops, and the rows, whose order tells how the crops lie."""
    assert vision.row_index is not None
    patch, size = model.config.vision.patch_size, model.config.vision.image_size
    side, start, view = size // patch, 0, 0
    views = pixels.view(-1, side, side, 3, patch, patch).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, size, size)
    sizes = []
    for k, end in enumerate((vision.row_index == -1).nonzero().flatten().tolist()):
        lines = int((vision.row_index[start:end] == -2).sum())
        columns = (end - start) // lines - 1
        sizes.append([lines * 2 * patch, columns * 2 * patch])
        n, stop = 1 + lines * columns * 4 // side**2, end + 1 + side // 2 * (side // 2 + 1)
        yield f"image{k}.pixel_values", views[view : view + n], PIXELS
        selected = hidden.unflatten(0, (len(views), -1))[view : view + n]
        yield f"image{k}.vision_selected_hidden", selected, near(selected)
        yield f"image{k}.image_embeds", embeds[start:stop], near(embeds[start:stop])
        start, view = stop, view + n
    assert (start, view) == (len(embeds), len(views))
    yield "image_sizes", torch.tensor(sizes), {"atol": 0.0, "rtol": 0.0}


def near(x: Tensor) -> dict[str, float]:
    """HIDDEN for values that are far from 1: those of Phi-3.5's tiny tower are 30, its rows 1,500 in the mean, and in float64 the
    references prove to be as far from the exact ones as vlmfx is, up to 2e-4 of the mean."""
    return {"atol": max(HIDDEN["atol"], 2e-4 * float(x.abs().mean())), "rtol": HIDDEN["rtol"]}
