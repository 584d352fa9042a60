"""Taps: the values that transformers and the goldens have, each prompt's own, and no more compute than they need."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmfx
from tests import golden_cases, invariants
from tests.golden_cases import COMMITTED, EVERY, TINY, Prompt, load_model
from tests.invariants import token_ids
from tests.pictures import about, mixed, picture
from tests.processing import references
from tests.versions import transformers_from
from vlmfx import LLM, InvalidRequest, SamplingParams
from vlmfx.checkpoint import FAMILIES, Model
from vlmfx.engine.taps import names_of, tap
from vlmfx.models import decoder
from vlmfx.processing.prompt import prepare

ONE_TOKEN = SamplingParams.greedy(max_tokens=1, ignore_eos=True)


@pytest.fixture(params=EVERY)
def model(request: pytest.FixtureRequest) -> Model:
    return load_model(EVERY[request.param])


def tapped(model: Model, prompts: Any, taps: Any, **options: Any) -> list[dict[str, Tensor]]:
    outputs = vlmfx.generate(model, prompts, ONE_TOKEN, taps=taps, use_tqdm=False, **options)
    assert [o.error for o in outputs] == [None] * len(outputs)
    return [o.taps for o in outputs if o.taps is not None]


# What others have there


RUN_BY_TRANSFORMERS = [name for name in TINY if name != "minicpm_v"]  # the code of the others comes with the checkpoint


@torch.no_grad()
def theirs(family: str, ids: list[int], images: list[Any]) -> tuple[list[Tensor], list[Tensor], Any]:
    """transformers' hidden_states of a prompt, what each of its layers and its last norm was called with, and that norm."""
    transformers = transformers_from(4, 57, "lacks a family of these")
    kind = next(architecture for architecture, name in FAMILIES.items() if name == family)
    reference = getattr(transformers, kind).from_pretrained(
        TINY[family], dtype=torch.float32, attn_implementation="eager"
    )
    batch = torch.tensor([ids])
    inputs: dict[str, Any] = {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
    if images:
        pixels = references.image_processor(family, TINY[family])(images, return_tensors="pt")
        inputs |= {name: torch.as_tensor(value) for name, value in pixels.items()}
    if "mm_token_type_ids" in inspect.signature(reference.forward).parameters:
        inputs["mm_token_type_ids"] = (batch == reference.config.image_token_id).int()
    text, entered = reference.model.language_model, []
    for module in (*text.layers, text.norm):
        module.register_forward_pre_hook(lambda module, args: entered.append(args[0][0].clone()))
    states = reference(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    return [state[0] for state in states], entered, text.norm


# From the pixels on: a tower's values reach 16, and 1.2e-4 was seen of the rows it makes.
assert_close = partial(torch.testing.assert_close, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", [[(40, 60)], [(90, 30), (50, 50)], []], ids=["one", "two", "none"])
@pytest.mark.parametrize("family", RUN_BY_TRANSFORMERS)
def test_layers_are_the_hidden_states_of_transformers(family, sizes):
    model = load_model(TINY[family])
    images, n = [picture(*size) for size in sizes], model.config.text.num_layers
    request = about(model, *images, text="What is shown?")
    layers = [f"layer.{i}" for i in range(n)]
    (mine,) = tapped(model, request, ["merged", *layers, "hidden"])
    states, entered, norm = theirs(family, prepare(model.processor, request).token_ids, images)
    assert len(states) == len(entered) == n + 1 > 2
    for i, name in enumerate(["merged", *layers]):
        assert_close(mine[name], entered[i])
    assert_close(mine["hidden"], states[n])
    with torch.no_grad():
        assert_close(norm(mine[layers[-1]]), states[n])
    # transformers records a layer's own output, to which Qwen3-VL adds its deepstack rows only afterwards.
    added = len(model.config.vision.deepstack_layers) if family == "qwen3_vl" and images else 0
    for i in range(added, n - 1):
        assert_close(mine[f"layer.{i}"], states[i + 1])


def projected_goldens(prompt: Prompt) -> list[str]:
    """The names of a prompt's feature rows: one for all its images, or one an image."""
    names = [name.removeprefix(prompt.prefix) for name in prompt.case.tensors if name.startswith(prompt.prefix)]
    return sorted(name for name in names if name.endswith(("image_embeds", "video_embeds")))


@pytest.mark.parametrize("case", golden_cases.find(COMMITTED), ids=lambda case: case.name)
def test_values_are_the_goldens(case):
    """The prompts of a case in one call: each has its own values."""
    model, prompts = load_model(case.model_folder), case.prompts()
    values = tapped(model, [p.request() for p in prompts], ["projected", "merged", "logits"])
    for prompt, mine in zip(prompts, values, strict=True):
        prompt.difference("inputs_embeds", mine["merged"][None], atol=1e-4)
        prompt.difference("last_logits", mine["logits"][-1], atol=1e-4, rtol=1e-5)
        if "prompt_logits" in prompt:
            prompt.difference("prompt_logits", mine["logits"], atol=1e-4, rtol=1e-5)
        names = projected_goldens(prompt)
        assert ("projected" in mine) == bool(names or prompt.embeds is not None)
        if not names:
            continue
        rows, *deepstack = mine["projected"].split(model.config.text.hidden_size, -1)
        for name in names:
            shape = case.meta["sampled"].get(prompt.prefix + name, {"shape": prompt[name].shape})["shape"]
            part, rows = rows.split([prod(shape[:-1]), len(rows) - prod(shape[:-1])])
            prompt.difference(name, part.view(*shape), atol=1e-4)
        assert len(rows) == 0
        if deepstack:
            prompt.difference("deepstack_embeds", torch.stack(deepstack), atol=1e-4)


# Whose they are, and what they do not change


@torch.no_grad()
def test_each_value_is_that_of_the_plain_functions(model):
    f = model.functions
    for request in (about(model, picture(60, 40)), "Some words"):
        inputs = prepare(model.processor, request)
        mine = tap(model, inputs, names_of(model))
        rows = None
        if inputs.vision is not None:
            rows = f.encode(model.params, model.config, inputs.vision)
            assert torch.equal(mine["vision"], f.vision_hidden(model.params, model.config, inputs.vision))
            assert torch.equal(mine["projected"], rows)
        ids = torch.tensor(inputs.token_ids)
        assert torch.equal(mine["merged"], f.merge(model.params, model.config, ids, rows, inputs.feature_index))
        assert torch.equal(mine["hidden"], invariants.prompt_hidden(model, inputs))
        assert torch.equal(mine["logits"], invariants.prompt_logits(model, inputs))


def test_batch_mates_do_not_show(model):
    taps, prompts = names_of(model), mixed(model)
    together = tapped(model, prompts, taps, max_num_seqs=3)
    seen = set()
    for prompt, mine in zip(prompts, together, strict=True):
        (alone,) = tapped(model, prompt, taps)
        has_pixels = isinstance(prompt, dict) and "multi_modal_data" in prompt
        assert list(mine) == list(alone) == (taps if has_pixels else taps[2:])
        for name, value in mine.items():
            assert torch.equal(value, alone[name]), name
        inputs = prepare(model.processor, prompt)
        assert mine["logits"].shape == (len(inputs.token_ids), model.config.text.vocab_size)
        assert mine["layer.0"].shape == (len(inputs.token_ids), model.config.text.hidden_size)
        assert not has_pixels or len(mine["projected"]) == inputs.num_features
        seen.add(float(mine["merged"].sum()))
    assert len(seen) == len(prompts), "prompts that one could take for each other"


@pytest.mark.parametrize("params", [SamplingParams.greedy(max_tokens=8), SamplingParams(seed=3, max_tokens=8)])
def test_tokens_are_the_same_without(model, params):
    llm = LLM(model, max_num_seqs=2)
    plain = llm.generate(mixed(model), params, use_tqdm=False)
    with_taps = llm.generate(mixed(model), params, use_tqdm=False, taps=names_of(model))
    assert token_ids(with_taps) == token_ids(plain)
    assert [o.taps for o in plain] == [None] * len(plain)


def test_ready_embeddings_are_what_is_projected():
    model = load_model(TINY["llava"])
    rows = torch.randn(36, model.config.text.hidden_size, generator=torch.Generator().manual_seed(0))
    (mine,) = tapped(model, {"prompt": "<image>What?", "multi_modal_data": {"image": rows}}, ["vision", "projected"])
    assert list(mine) == ["projected"]
    assert torch.equal(mine["projected"], rows)


def test_chat_gives_them_too():
    model = load_model(TINY["qwen2_vl"])
    part = {"type": "image", "image": picture(60, 40)}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    (chat,) = LLM(model).chat(messages, ONE_TOKEN, use_tqdm=False, taps=["merged"])
    (mine,) = tapped(model, {"messages": messages}, ["merged"])
    assert chat.taps is not None
    assert torch.equal(chat.taps["merged"], mine["merged"])


@pytest.mark.parametrize("max_tokens", [4, 40])
def test_rope_factors_are_those_of_the_answer(max_tokens):
    """480 tokens and 40 more are beyond Phi-3.5's original context, here 512: its first token and its logits are of long factors."""
    model = load_model(EVERY["phi3_v"])
    params = SamplingParams.greedy(max_tokens=max_tokens, ignore_eos=True, logprobs=0)
    prompt = {"prompt_token_ids": [5 + i % 300 for i in range(480)]}
    (output,) = LLM(model).generate(prompt, params, use_tqdm=False, taps=["logits"])
    assert output.taps is not None
    assert output.outputs[0].logprobs is not None
    ((token, expected),) = output.outputs[0].logprobs[0].items()
    assert output.taps["logits"][-1].log_softmax(-1)[token].item() == pytest.approx(expected.logprob, abs=1e-4)
    short = tap(model, prepare(model.processor, prompt), ["logits"])["logits"]
    assert torch.allclose(output.taps["logits"], short, atol=1e-3) == (max_tokens == 4)


def test_values_have_the_models_dtype_and_no_gradient():
    model = load_model(TINY["qwen2_vl"], "bfloat16")
    params = torch.utils._pytree.tree_map(lambda t: t.clone().requires_grad_(), model.params)
    (mine,) = tapped(replace(model, params=params), about(model, picture(60, 40)), names_of(model))
    for value in mine.values():
        assert (value.dtype, value.device.type, value.requires_grad) == (torch.bfloat16, "cpu", False)


# What is computed for them


@pytest.mark.parametrize(
    ("names", "towers", "blocks"),
    [
        (["vision"], 1, 0),
        (["vision", "projected", "merged"], 1, 0),
        (["layer.0"], 1, 1),
        (["layer.1", "merged", "layer.0"], 1, 2),
        (["layer.LAST"], 1, None),
        (["hidden"], 1, None),
        (["vision", "logits"], 1, None),
        ([], 0, 0),
    ],
)
def test_no_more_layers_run_than_are_needed(model, names, towers, blocks, monkeypatch):
    last = model.config.text.num_layers - 1
    names = [name.replace("LAST", str(last)) for name in names]
    if blocks == 2 and last == 0:
        names, blocks = ["layer.0", "merged"], 1
    calls = {"vision_hidden": 0, "block": 0, "merge": 0, "logits": 0}

    def count(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(decoder, "block")
    for name in ("vision_hidden", "merge", "logits"):
        count(model.functions, name)
    mine = tap(model, prepare(model.processor, about(model, picture(60, 40))), names)
    num_layers = last + 1 if blocks is None else blocks
    has_text = bool({*names} - {"vision", "projected"})
    assert calls == {"vision_hidden": towers, "block": num_layers, "merge": has_text, "logits": "logits" in names}
    assert set(mine) == set(names)


def test_nothing_is_computed_for_values_that_a_prompt_has_not(model):
    inputs = prepare(model.processor, "Some words")
    assert tap(invariants.without_compute(model), inputs, ["projected", "vision"]) == {}


# Names


@pytest.mark.parametrize(
    "taps",
    [["visions"], ["merged", "layer"], ["layer.99"], ["layer.-1"], ["layer.00"], ["layer.1 "], [""], [3], "vision", 5],
)
@pytest.mark.parametrize("is_list", [False, True])
def test_a_wrong_name_is_told_before_any_compute(model, taps, is_list):
    prompts = ["Some words", about(model, picture(60, 40))] if is_list else "Some words"
    with pytest.raises(InvalidRequest) as caught:
        LLM(invariants.without_compute(model)).generate(prompts, use_tqdm=False, taps=taps)
    found = taps[-1] if isinstance(taps, list) else taps
    assert (caught.value.field, caught.value.found) == ("taps", found)
    assert caught.value.expected == tuple(names_of(model))
    assert invariants.is_one_sentence(caught.value), str(caught.value)
    last = model.config.text.num_layers - 1
    assert f'"vision", "projected", "merged", "layer.0" to "layer.{last}", "hidden" or "logits"' in str(caught.value)


def test_the_first_layer_that_is_not_there_is_refused(model):
    n = model.config.text.num_layers
    (mine,) = tapped(model, "x", [f"layer.{n - 1}"])
    assert list(mine) == [f"layer.{n - 1}"]
    with pytest.raises(InvalidRequest, match=rf"^taps: found 'layer\.{n}'"):
        tapped(model, "x", [f"layer.{n}"])


def test_a_failed_prompt_has_none():
    model = load_model(TINY["llava"])
    with pytest.warns(UserWarning, match="1 of 2 prompts failed"):
        failed, fine = LLM(model).generate(
            [{"prompt": "<image>"}, "x"], ONE_TOKEN, use_tqdm=False, taps=("hidden", "hidden")
        )
    assert failed.error is not None
    assert failed.taps is None
    assert fine.taps is not None
    assert list(fine.taps) == ["hidden"]
