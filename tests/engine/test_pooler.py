"""The pooler: passes by tokens, and vectors that do not depend on who shares a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import invariants
from tests.golden_cases import EVERY, TINY, load_model
from tests.invariants import overwriting
from tests.pictures import mixed
from vlmfx.checkpoint import Model
from vlmfx.compile import executor
from vlmfx.compile.buckets import Plan
from vlmfx.compile.executor import EagerExecutor, PlannedExecutor
from vlmfx.compile.layout import CacheLayout
from vlmfx.engine import pooler, runner
from vlmfx.engine.drain import drain
from vlmfx.engine.embedding import EmbeddingRequestOutput
from vlmfx.engine.encoder_clock import EncoderClock
from vlmfx.engine.engine import Engine
from vlmfx.engine.request import SamplingParams
from vlmfx.engine.sequence import Request
from vlmfx.errors import InternalError
from vlmfx.processing.inputs import ModelInputs
from vlmfx.processing.prompt import prepare


@pytest.fixture(params=EVERY)
def model(request: pytest.FixtureRequest) -> Model:
    return load_model(EVERY[request.param])


def prepared(model: Model) -> list[ModelInputs]:
    return [prepare(model.processor, item) for item in mixed(model)]


def run(model: Model, requests: Sequence[ModelInputs], max_tokens: int = 8192) -> list[EmbeddingRequestOutput]:
    """The outputs of an engine, which takes so many tokens in a pass."""
    programs = EagerExecutor(model.program_set, model.params, layout=CacheLayout.of(1, 16))
    made = Engine(model, programs, max_num_seqs=16, max_num_batched_tokens=max_tokens)
    asked = [replace(Request.ready(i, r, SamplingParams.greedy(), 0.0), pools=True) for i, r in enumerate(requests)]
    outputs: list[Any] = list(drain(made, asked, lambda number, text: None))
    assert [o.request_id for o in outputs] == [str(i) for i in range(len(requests))]
    return outputs


def vectors(model: Model, requests: Sequence[ModelInputs], max_tokens: int = 8192) -> torch.Tensor:
    outputs = run(model, requests, max_tokens)
    return torch.tensor([o.outputs.embedding for o in outputs if o.error is None])


@pytest.mark.parametrize("kind", ["last", "mean", "cls"])
def test_a_vector_is_the_pooled_states_of_its_prompt_alone(model, kind):
    requests = prepared(model)
    expected = []
    with torch.no_grad():
        for r in requests:
            hidden = invariants.prompt_hidden(model, r).double()
            row = {"last": hidden[-1], "cls": hidden[0], "mean": hidden.mean(0)}[kind]
            expected.append(row / row.square().sum().sqrt())
    mine = vectors(replace(model, pooling=kind), requests)
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine.double(), torch.stack(expected), atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=15)
@given(order=st.permutations(range(7)), max_tokens=st.sampled_from([1, 40, 200, 10_000]))
def test_batch_mates_never_show(order, max_tokens):
    model = load_model(TINY["qwen2_vl"])
    requests = prepared(model)
    alone = torch.cat([vectors(model, [r]) for r in requests])
    together = vectors(model, [requests[i] for i in order], max_tokens=max_tokens)
    torch.testing.assert_close(together, alone[list(order)], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [(10, [[4, 6], [1, 5, 2], [30], [3]]), (100, [[4, 6, 1, 5, 2, 30, 3]]), (1, [[4], [6], [1], [5], [2], [30], [3]])],
)
def test_passes_hold_so_many_tokens(monkeypatch, max_tokens, expected):
    model = load_model(TINY["llava"])
    some = prepare(model.processor, {"prompt_token_ids": [5] * 30})
    requests = [
        replace(some, token_ids=some.token_ids[:n], positions=some.positions[:n], feature_index=some.feature_index[:n])
        for n in (4, 6, 1, 5, 2, 30, 3)
    ]
    passes: list[list[int]] = []
    pack = runner.pack

    def counted(requests, features):
        passes.append([len(r.token_ids) for r in requests])
        return pack(requests, features)

    monkeypatch.setattr(runner, "pack", counted)
    run(model, requests, max_tokens)
    assert passes == expected


def test_no_cache_is_made_and_no_gradient_kept(model, monkeypatch):
    monkeypatch.setattr(executor, "empty_cache", lambda *args, **kwargs: pytest.fail("a cache was allocated"))
    model = replace(model, params=torch.utils._pytree.tree_map(lambda t: t.clone().requires_grad_(), model.params))
    clock = EncoderClock(model.device)
    for vector in pooler.vectors(model, prepared(model)[:2], [None, 3], model.executor, clock):
        assert isinstance(vector, torch.Tensor)
        assert not vector.requires_grad
    run(model, prepared(model)[:2])
    assert torch.is_grad_enabled()


def test_nothing_in_nothing_out():
    assert run(load_model(TINY["llava"]), []) == []


def test_a_pass_that_fails_for_one_request_fails_it_alone(model, monkeypatch):
    requests, pool = prepared(model), runner.pool
    expected = vectors(model, [*requests[:2], *requests[3:]])
    bad = requests[2]

    def fail(model: Any, batch: Any, *args: Any) -> torch.Tensor:
        if any(r is bad for r in batch):
            raise RuntimeError("out of memory")
        return pool(model, batch, *args)

    monkeypatch.setattr(runner, "pool", fail)
    found = run(model, requests)
    assert isinstance(found[2].error, InternalError)
    assert "out of memory" in str(found[2].error)
    torch.testing.assert_close(vectors(model, requests), expected, atol=1e-6, rtol=0)


def test_a_plan_of_embeddings_alone_pads_and_does_not_show(model):
    requests = prepared(model)
    multiple = model.config.vision.patch_multiple
    most = max(len(item.vision.position_ids) for r in requests for item in r.media)
    longest = max(len(r.token_ids) for r in requests)
    plan = Plan(encode=(-(-most // multiple) * multiple,), pool=(longest + 7,), max_segments=64, max_seqs=3)
    planned = PlannedExecutor(
        model.program_set, model.params, plan=plan, layout=CacheLayout.of(1, 16), make=overwriting, strict=True
    )
    made = Engine(model, planned, max_num_seqs=16)
    asked = [replace(Request.ready(i, r, SamplingParams.greedy(), 0.0), pools=True) for i, r in enumerate(requests)]
    outputs: list[Any] = list(drain(made, asked, lambda number, text: None))
    assert [o.error for o in outputs] == [None] * len(requests)
    found = torch.tensor([o.outputs.embedding for o in outputs])
    torch.testing.assert_close(found, vectors(model, requests), atol=1e-6, rtol=0)
