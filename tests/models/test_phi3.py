"""Phi-3's text model and its long rope, against transformers' Phi3ForCausalLM: on either side of the switch, and when a request could
cross it."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests import invariants, rows
from tests.golden_cases import load_model
from tests.small_phi3_v import FOLDER
from tests.versions import transformers_from
from vlmfx import LLM, CheckpointError, SamplingParams
from vlmfx.checkpoint import Model
from vlmfx.models import phi3
from vlmfx.models.rope import rope, row_factors
from vlmfx.ops.rotary import rotary_table
from vlmfx.processing.prompt import prepare

ORIGINAL = 512  # original_max_position_embeddings of the folder


@lru_cache
def config_json() -> dict[str, Any]:
    return dict(json.loads((FOLDER / "config.json").read_text(encoding="utf-8")))


@lru_cache
def reference() -> Any:
    """transformers' model of the folder's text half, in float32."""
    transformers = importlib.import_module("transformers")
    hf = config_json()
    keys: tuple[str, ...] = (
        "vocab_size",
        "rms_norm_eps",
        "max_position_embeddings",
        "original_max_position_embeddings",
    )
    keys += ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    keys += ("pad_token_id",)
    config = transformers.Phi3Config(
        **{key: hf[key] for key in keys},
        rope_theta=hf["rope_theta"],
        rope_scaling={**hf["rope_scaling"], "type": "longrope"},
        attn_implementation="eager",
    )
    model = transformers.Phi3ForCausalLM(config).eval()
    stored = load_file(FOLDER / "model.safetensors")
    stored = {name: value.float() for name, value in stored.items() if "vision_embed_tokens" not in name}
    model.load_state_dict(stored)
    return model


@torch.no_grad()
def reference_logits(ids: list[int]) -> Tensor:
    """(tokens, vocab) of one pass over the whole sequence: its length alone decides on the factors."""
    logits: Tensor = reference()(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 400, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def generate(model: Model, lengths: list[tuple[int, int]], **options: Any) -> list[list[int]]:
    """The greedy ids of prompts of (length, max_tokens)."""
    prompts = [{"prompt_token_ids": prompt(length, seed=length)} for length, _ in lengths]
    params = [SamplingParams.greedy(max_tokens=n, ignore_eos=True) for _, n in lengths]
    return invariants.token_ids(LLM(model, **options).generate(prompts, params, use_tqdm=False))


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 40, ORIGINAL, ORIGINAL + 1, 700])
def test_logits_equal_transformers(length):
    """40 and 512 tokens take the short factors, 513 and 700 the long ones, for every position."""
    model = load_model(FOLDER)
    mine = invariants.prompt_logits(model, prepare(model.processor, {"prompt_token_ids": prompt(length)}))
    torch.testing.assert_close(mine, reference_logits(prompt(length)), atol=5e-4, rtol=1e-4)


def test_the_two_kinds_differ_by_more_than_the_tolerance():
    """Else the test above could not tell them apart."""
    ids = prompt(ORIGINAL + 1)
    short, long = reference_logits(ids[:-1]), reference_logits(ids)[:-1]
    assert float((short - long).abs().max()) > 1.0


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(500, 12), (500, 13), (500, 30), (ORIGINAL, 5), (30, 20)])
def test_a_generation_that_could_cross_is_long_from_its_first_token(prompt_len, max_tokens):
    """Every id is transformers' choice in one pass, without a cache, over prompt and answer and whatever makes its length that of the
    longest sequence: 500 + 12 is short throughout, 500 + 13 long throughout."""
    ids = prompt(prompt_len, seed=prompt_len)
    (answer,) = generate(load_model(FOLDER), [(prompt_len, max_tokens)])
    assert len(answer) == max_tokens
    logits = reference_logits([*ids, *answer])[prompt_len - 1 : -1]
    best = logits.topk(2).values
    assert float((best[:, 0] - best[:, 1]).min()) > 1e-3, "too near to tell; take other ids"
    assert answer == logits.argmax(-1).tolist()


@torch.no_grad()
def test_a_request_that_could_cross_has_the_long_logits_at_its_first_step():
    """Through the runner, to the number: prefill of 500 tokens, of which up to 513 may come."""
    model = load_model(FOLDER)
    inputs = prepare(model.processor, {"prompt_token_ids": prompt(500)})
    following = reference_logits([*prompt(500), *prompt(100, seed=1)])[499], reference_logits(prompt(500))[-1]
    for max_len, expected in zip((ORIGINAL + 1, ORIGINAL), following, strict=True):
        mine = rows.prefill(model, [inputs], [max_len], rows.paged(model, 1, max_len))[1][0]
        torch.testing.assert_close(mine, expected, atol=5e-4, rtol=1e-4)


@settings(max_examples=6, deadline=None)
@given(order=st.permutations([(500, 13), (500, 12), (20, 6), (600, 7), (508, 4), (509, 4)]), rows=st.integers(2, 6))
def test_batch_mates_of_both_kinds_do_not_show(order, rows):
    model = load_model(FOLDER)
    assert generate(model, order, max_num_seqs=rows) == [alone(request) for request in order]


@lru_cache
def alone(request: tuple[int, int]) -> list[int]:
    return generate(load_model(FOLDER), [request])[0]


def test_decoding_equals_recomputing():
    """The cache of a request that crosses holds keys of one kind: what it gives is what a pass without it gives."""
    model = load_model(FOLDER)
    inputs = prepare(model.processor, {"prompt_token_ids": prompt(500, seed=500)})
    (answer,) = generate(model, [(500, 30)])
    logits = invariants.recomputed(model, inputs, [*answer, 0])  # the pass is over 530 tokens
    assert logits[:-1].argmax(-1).tolist() == answer


def test_which_tokens_are_long():
    cfg = load_model(FOLDER).config.text
    extras = phi3.long_extras(cfg, [512, 513, 4096], [3, 2, 1], 8)
    short, long = (torch.tensor(f) for f in (cfg.long_rope.short_factor, cfg.long_rope.long_factor))
    assert not torch.equal(short, long)
    assert torch.equal(extras["factors"], torch.stack([short] * 3 + [long] * 3 + [short] * 2))
    assert phi3.long_extras(replace(cfg, long_rope=None), [512, 513], [1, 1], 2) == ()


@pytest.mark.parametrize("is_long", [False, True])
def test_the_table_is_the_references_to_the_bit(is_long):
    """With the published lengths, up to the last position; in bfloat16 it is the float32 table, rounded once."""
    transformers = transformers_from(5, 0, "has the table in a class of another form")
    phi3_code = importlib.import_module("transformers.models.phi3.modeling_phi3")
    lengths = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    hf = {**config_json(), **lengths}
    scaling = {**hf["rope_scaling"], "type": "longrope"}
    heads = {"hidden_size": hf["hidden_size"], "num_attention_heads": hf["num_attention_heads"]}
    module = phi3_code.Phi3RotaryEmbedding
    config = transformers.Phi3Config(**heads, **lengths, rope_theta=10000.0, rope_scaling=scaling)
    cfg = phi3.text_config(hf)
    positions = torch.arange(131072 if is_long else 4096)
    cos, sin = module(config)(torch.zeros(1, 1, 1), positions[None])
    assert cfg.long_rope is not None
    factors = row_factors(cfg.long_rope, torch.full(positions.shape, is_long))
    mine, rounded = (rope(cfg, positions, dtype, factors) for dtype in (torch.float32, torch.bfloat16))
    half = cfg.head_dim // 2
    assert torch.equal(mine.cos, cos[0])
    assert torch.equal(mine.sin[:, half:], sin[0, :, half:])
    assert torch.equal(mine.sin[:, :half], -sin[0, :, :half])
    assert torch.equal(rounded.cos, cos[0].bfloat16())
    assert torch.equal(rounded.sin[:, half:], sin[0, :, half:].bfloat16())


def test_the_scale_of_the_published_lengths():
    """s = 131072 / 4096 = 32: sqrt(1 + ln 32 / ln 4096) = sqrt(1 + 5/12)."""
    hf = {**config_json(), "max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    long_rope = phi3.text_config(hf).long_rope
    assert long_rope is not None
    assert long_rope.scale == pytest.approx((17 / 12) ** 0.5)
    same = phi3.text_config({**hf, "original_max_position_embeddings": 131072}).long_rope
    assert same is not None
    assert same.scale == 1.0


def test_a_config_without_rope_scaling_has_plain_rope():
    cfg = phi3.text_config({**config_json(), "rope_scaling": None})
    assert cfg.long_rope is None
    positions = torch.tensor([0, 1, 7])
    exact = positions[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])  # 10000^(−2i/8)
    torch.testing.assert_close(rope(cfg, positions, torch.float32).cos, rotary_table(exact, torch.float32).cos)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"sliding_window": 2047}, "sliding_window is 2047, expected null or at least max_position_embeddings, 8192"),
        ({"sliding_window": "x"}, "sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor"),
        ({"original_max_position_embeddings": 8193}, "original_max_position_embeddings is 8193"),
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings is None"),
        ({"original_max_position_embeddings": 1}, "original_max_position_embeddings is 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling type is 'yarn'"),
        ({"rope_scaling": {"type": "su"}}, "rope_scaling.short_factor is None, expected 4 numbers"),
        ({"rope_scaling": {"type": "su", "short_factor": [1] * 4, "long_factor": [1] * 3}}, "long_factor"),
        ({"rope_scaling": {"type": "su", "short_factor": [1, 1, 0, 1], "long_factor": [1] * 4}}, "short_factor is 0"),
        ({"rope_scaling": {"type": "su", "short_factor": [1] * 4, "long_factor": [1, 1, 1, "1"]}}, "long_factor"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
    ],
)
def test_a_config_that_is_not_implemented_is_refused(changed, says):
    with pytest.raises(CheckpointError, match=says) as caught:
        phi3.text_config({**config_json(), **changed})
    assert invariants.is_one_sentence(caught.value)
