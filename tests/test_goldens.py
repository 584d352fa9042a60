"""Every stage of every golden case, in float32: what an independent implementation computed, vlmfx computes too.

`pytest -s` prints the largest difference a stage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests import golden_cases, invariants
from tests.golden_cases import COMMITTED, SHARED, Case, Prompt, load_model
from vlmfx import LLM, SamplingParams
from vlmfx.checkpoint import FAMILIES, Model
from vlmfx.engine import runner
from vlmfx.ops.patches import normalize_patches
from vlmfx.processing.inputs import ModelInputs
from vlmfx.processing.prompt import prepare

# The README's tolerances are wider; these are the aim. Integers and ids are exact.
PIXELS = {"atol": 1e-6, "rtol": 0.0}
HIDDEN = {"atol": 1e-4, "rtol": 1e-4}
LOGITS = {"atol": 1e-4, "rtol": 1e-5}

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


@pytest.mark.parametrize("prompt", PROMPTS)
def test_stages(prompt: Prompt, largest):
    model = load_model(prompt.case.model_folder)
    inputs = prepare(model.processor, prompt.request())
    for stage, mine, tolerance in stages(model, inputs):
        if stage in prompt:
            family = golden_cases.family_of(prompt.case.model_folder)
            difference = prompt.difference(stage, mine, **tolerance)
            largest[str(family), stage] = max(largest[str(family), stage], difference)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_golden_stage_is_compared(prompt: Prompt):
    model = load_model(prompt.case.model_folder)
    compared = {stage for stage, _, _ in stages(model, prepare(model.processor, prompt.request()))}
    rest = {name for name in prompt.case.tensors if name.startswith(prompt.prefix)} - {
        prompt.prefix + name for name in (*compared, "greedy_ids", "greedy_margins")
    }
    assert {name for name in rest if not name.startswith("padded.")} == set()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_messages_give_the_same_request(prompt: Prompt):
    chat = prompt.chat_request()
    if chat is None:
        pytest.skip("the case starts from a bare prompt, it has no messages.json")
    processor = load_model(prompt.case.model_folder).processor
    plain, chatted = prepare(processor, prompt.request()), prepare(processor, chat)
    assert chatted.prompt == prompt.text
    assert chatted.token_ids == plain.token_ids
    assert torch.equal(chatted.positions, plain.positions)
    if plain.vision is not None and chatted.vision is not None:
        assert torch.equal(chatted.vision.patches, plain.vision.patches)
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
    largest[family, "greedy_margins"] = max(
        largest[family, "greedy_margins"], prompt.difference("greedy_margins", margins, **LOGITS)
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
    """Logits within 2 percent of their range; the next token is the same wherever the margin allows a difference of that size."""
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
    assert difference < 0.02
    if float(prompt["greedy_margins"][0]) > 0.04 * spread:
        assert int(mine.argmax()) == prompt.greedy_ids[0]


@torch.no_grad()
def stages(model: Model, inputs: ModelInputs) -> Iterator[tuple[str, Tensor, dict[str, float]]]:
    """(golden name, what vlmfx has there, tolerance) of one request; a family adds its own names here."""
    f, exact = model.functions, {"atol": 0.0, "rtol": 0.0}
    yield "input_ids", torch.tensor([inputs.token_ids]), exact
    if f.__name__.endswith("qwen2_vl"):
        yield "position_ids", inputs.positions[:, None], exact
        yield "rope_deltas", torch.tensor([[inputs.next_position - len(inputs.token_ids)]]), exact
    if inputs.vision is not None:
        vision = inputs.vision
        pixels = normalize_patches(vision.patches, vision.mean, vision.std, torch.float32)
        hidden = f.vision_hidden(model.params, model.config, vision)
        embeds = f.encode(model.params, model.config, vision)
        torch.testing.assert_close(f.project(model.params, model.config, hidden), embeds, rtol=0, atol=0)
        if f.__name__.endswith("llava"):
            n, side = len(vision.seq_lens), model.config.vision.image_size // model.config.vision.patch_size
            patch = model.config.vision.patch_size
            images = pixels.view(n, side, side, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
            yield "pixel_values", images.reshape(n, 3, side * patch, side * patch), PIXELS
            yield "vision_selected_hidden", hidden.unflatten(0, (n, -1)), HIDDEN
            yield "image_embeds", embeds.unflatten(0, (n, -1)), HIDDEN
        else:
            yield "pixel_values", pixels, PIXELS
            yield "image_vision_hidden", hidden, HIDDEN
            yield "image_embeds", embeds, HIDDEN
            ends = torch.tensor(vision.seq_lens).cumsum(0) - 1  # an image's last patch lies in its lower right corner
            yield "image_grid_thw", torch.cat([torch.ones(len(ends), 1), vision.position_ids[ends] + 1], 1), exact
    elif inputs.embeds is not None and f.__name__.endswith("qwen2_vl"):
        grid = inputs.positions[:, inputs.feature_index >= 0]  # of one image: the positions span its merged grid
        span = (grid.amax(1) - grid.amin(1) + 1) * torch.tensor([1, *[model.config.vision.merge_size] * 2])
        yield "image_grid_thw", span[None], exact
    (features,) = runner.encode(model, [inputs])
    ids = torch.tensor(inputs.token_ids)
    x = f.merge(model.params, model.config, ids, features, inputs.feature_index)
    yield "inputs_embeds", x[None], HIDDEN
    logits = invariants.prompt_logits(model, inputs)
    yield "prompt_logits", logits, LOGITS
    yield "last_logits", logits[-1], LOGITS
