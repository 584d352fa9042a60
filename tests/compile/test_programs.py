"""programs: each traces as one graph without a sync, for every family; a layered step is the whole one, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch

from tests import rows
from tests.golden_cases import TINY, load_model
from tests.pictures import about, picture
from vlmfx.checkpoint import Model
from vlmfx.compile import programs
from vlmfx.compile.layered import LayeredStep
from vlmfx.engine.request import SamplingParams
from vlmfx.engine.sampler import state
from vlmfx.processing.prompt import prepare
from vlmfx.tree import leaves, tree_map

HAS_COMPILER = torch.__version__ >= "2.11"
LENGTH = 400


@dataclass(frozen=True)
class Calls:
    """What the runner gave the programs of a model for two prompts: arguments without functions and config."""

    model: Model
    encode: tuple[Any, ...]
    prefill: tuple[Any, ...]
    decode: tuple[Any, ...]


@pytest.fixture(params=TINY, scope="module")
def calls(request: pytest.FixtureRequest) -> Calls:
    """Of a prompt with an image, greedy, and of one without, drawn."""
    model = load_model(TINY[request.param])
    found: dict[str, list[Any]] = {"encode": [], "step": []}
    patch = pytest.MonkeyPatch()
    for name in found:
        original = getattr(programs, name)

        def remembered(
            functions: Any, config: Any, *args: Any, run: Callable[..., Any] = original, seen: list[Any] = found[name]
        ) -> Any:
            seen.append(cloned(args))
            return run(functions, config, *args)

        patch.setattr(programs, name, remembered)
    requests = [prepare(model.processor, about(model, picture(70, 40))), prepare(model.processor, "Some words")]
    params = [SamplingParams.greedy(), SamplingParams(temperature=1.0, top_p=0.9)]
    executor, cpu = rows.paged(model, 2, LENGTH), torch.device("cpu")
    lens = [len(r.token_ids) for r in requests]
    with torch.no_grad():
        ids, _ = rows.prefill(model, requests, [LENGTH] * 2, executor, state(params, [1, 2], lens, cpu))
        positions = [r.next_position for r in requests]
        rows.decode(
            model, ids, positions, [n + 1 for n in lens], [LENGTH] * 2, executor, state(params, [1, 2], lens, cpu)
        )
    patch.undo()
    return Calls(model, found["encode"][0], found["step"][0], found["step"][1])


def cloned(args: Any) -> Any:
    return tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, args)


def assert_equal(mine: Any, theirs: Any) -> None:
    for a, b in zip(leaves(mine), leaves(theirs), strict=True):
        assert a is b is None or torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_layered_step_is_the_whole_one(calls, name):
    whole, layered = cloned(getattr(calls, name)), cloned(getattr(calls, name))
    model = calls.model
    expected = programs.step(model.functions, model.config, *whole)
    assert_equal(LayeredStep(model.functions, model.config)(*layered), expected)
    assert_equal(layered[1], whole[1])  # the caches
    assert any(not torch.equal(a, b) for a, b in zip(leaves(whole[1]), leaves(getattr(calls, name)[1]), strict=True))


@pytest.mark.skipif(not HAS_COMPILER, reason="compile and export want torch 2.11")
@pytest.mark.parametrize("name", ["encode", "prefill", "decode", "pool"])
def test_each_program_is_one_graph_without_a_sync(calls, name):
    functions, config = calls.model.functions, calls.model.config
    program: Callable[..., Any]
    if name == "encode":
        program, args = partial(programs.encode, functions, config), calls.encode
    elif name == "pool":
        params, _, inputs = calls.prefill
        inputs = replace(inputs, last=None, sampling=None, batch=replace(inputs.batch, slot_mapping=None))
        program, args = partial(programs.pool, functions, config, "mean"), (params, inputs)
    else:
        program, args = partial(programs.step, functions, config), getattr(calls, name)
    mine, theirs = cloned(args), cloned(args)
    torch.compiler.reset()
    with torch.no_grad():
        expected = program(*theirs)
        assert_equal(torch.compile(program, fullgraph=True, dynamic=False, backend="eager")(*mine), expected)
    assert_equal(mine[1:], theirs[1:])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["last", "mean", "cls"])
def test_pooling_is_that_of_lengths(calls, kind):
    """Padding sequences and tokens too, which change nothing."""
    model, (params, _, inputs) = calls.model, calls.prefill
    lens = inputs.batch.cu_seqlens.diff().tolist()
    inputs = replace(inputs, last=None, sampling=None, batch=replace(inputs.batch, slot_mapping=None))
    x = model.functions.merge(params, model.config, inputs.ids, inputs.features, inputs.feature_index)
    hidden, _ = model.functions.forward(params, model.config, x, inputs.positions, None, inputs.batch, inputs.extras)
    pooled = programs.pool(model.functions, model.config, kind, params, inputs)
    pick = {"last": lambda rows: rows[-1], "cls": lambda rows: rows[0], "mean": lambda rows: rows.mean(0)}[kind]
    expected = torch.stack([pick(rows) for rows in hidden[: sum(lens)].split(lens)])
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)
