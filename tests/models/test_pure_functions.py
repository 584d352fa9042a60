"""Model functions are pure: gradients pass through all of them, nothing is kept, and no layer object exists."""

from __future__ import annotations

import ast
import copy
import importlib
import pkgutil
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmfx
from tests import invariants
from tests.golden_cases import TINY, load_model
from tests.ops.kernels import HAS_TRITON
from tests.pictures import about, picture
from vlmfx import weights
from vlmfx.checkpoint import Model
from vlmfx.models.layers import Batch
from vlmfx.models.vision_inputs import cumulative
from vlmfx.processing.inputs import ModelInputs
from vlmfx.processing.prompt import prepare
from vlmfx.tree import items, leaves, tree_map


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> Model:
    return load_model(TINY[request.param])


def loss_of(params: Any, model: Model, inputs: ModelInputs) -> Tensor:
    """Next-token cross-entropy of a prompt with its image, from pixels on."""
    f = model.functions
    ids = torch.tensor(inputs.token_ids)
    features = f.encode(params, model.config, inputs.vision)
    x = f.merge(params, model.config, ids, features, inputs.feature_index)
    extras = f.extras(model.config, [len(ids)], [len(ids)], len(ids), features, inputs.feature_index)
    hidden, _ = f.forward(
        params, model.config, x, inputs.positions, None, Batch(cu_seqlens=cumulative([len(ids)])), extras
    )
    logits = f.logits(params, model.config, hidden)
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:])


def test_gradients_reach_every_weight(model):
    inputs = prepare(model.processor, about(model, picture(40, 60), picture(70, 30)))
    params = tree_map(lambda t: t.clone().requires_grad_(), model.params)
    loss_of(params, model, inputs).backward()
    for path, leaf in items(params):
        assert leaf.grad is not None, path
        assert bool(leaf.grad.isfinite().all()), path
        assert float(leaf.grad.abs().max()) > 0, path


@pytest.mark.skipif(torch.__version__ < "2.11", reason="torch 2.4's torch.func cannot read the lengths in a tensor")
def test_torch_func_agrees_with_autograd(model):
    inputs = prepare(model.processor, about(model, picture(40, 60)))
    params = tree_map(lambda t: t.clone().requires_grad_(), model.params)
    loss_of(params, model, inputs).backward()
    gradients, loss = torch.func.grad_and_value(loss_of)(model.params, model, inputs)
    assert loss > 0
    for (path, leaf), gradient in zip(items(params), leaves(gradients), strict=True):
        assert torch.allclose(gradient, leaf.grad, atol=1e-5, rtol=1e-4), path


def test_gradient_of_one_weight_is_the_difference_quotient(model):
    """In float64: what autograd says about one entry of three weights, against two evaluations."""
    inputs = prepare(model.processor, about(model, picture(40, 60)))
    params = tree_map(lambda t: t.double().requires_grad_(), model.params)
    loss_of(params, model, inputs).backward()
    named = dict(items(params))
    patch = next(path for path in named if path.startswith("vision.patch"))
    for path in (patch, "text.layers.0.qkv", f"text.layers.{model.config.text.num_layers - 1}.post_norm"):
        leaf = named[path]
        at = int(leaf.grad.abs().argmax())
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                flat = leaf.view(-1)
                flat[at] += step
                losses.append(float(loss_of(params, model, inputs)))
                flat[at] -= step
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(float(leaf.grad.view(-1)[at]), rel=2e-3)


@torch.no_grad()
def test_arguments_are_not_changed(model):
    inputs = prepare(model.processor, about(model, picture(40, 60)))
    before = copy.deepcopy((model.params, inputs))
    first = invariants.prompt_logits(model, inputs)
    assert torch.equal(first, invariants.prompt_logits(model, inputs))
    for old, new in zip(leaves(before[0]), leaves(model.params), strict=True):
        assert torch.equal(old, new)
    assert before[1].token_ids == inputs.token_ids
    assert before[1].vision is not None
    assert inputs.vision is not None
    assert torch.equal(before[1].vision.pixels, inputs.vision.pixels)
    assert torch.equal(before[1].feature_index, inputs.feature_index)


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(model):
    """Two prompts and padding in one pass, without a cache, give what each gives alone."""
    f = model.functions
    requests = [
        prepare(model.processor, about(model, picture(40, 60))),
        prepare(model.processor, "Some words"),
        prepare(model.processor, about(model, picture(60, 30), text="Why?")),
    ]
    alone = [invariants.prompt_logits(model, r) for r in requests]
    xs: list[Tensor] = []
    rows: list[Tensor] = []
    index: list[Tensor] = []
    for r in requests:
        features = f.encode(model.params, model.config, r.vision) if r.vision is not None else None
        xs.append(f.merge(model.params, model.config, torch.tensor(r.token_ids), features, r.feature_index))
        index.append(torch.where(r.feature_index >= 0, r.feature_index + sum(len(part) for part in rows), -1))
        rows += [features] if features is not None else []
    padding = 5
    x = torch.cat([*xs, torch.full((padding, xs[0].shape[1]), torch.nan)])
    feature_index = torch.cat([*index, torch.full((padding,), -1)])
    positions = torch.nn.functional.pad(torch.cat([r.positions for r in requests], -1), (0, padding))
    lengths = tuple(len(r.token_ids) for r in requests)
    extras = f.extras(model.config, lengths, lengths, len(x), torch.cat(rows), feature_index)
    hidden, _ = f.forward(model.params, model.config, x, positions, None, Batch(cu_seqlens=cumulative(lengths)), extras)
    together = f.logits(model.params, model.config, hidden[: sum(lengths)]).split(lengths)
    for mine, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


def test_init_is_random_by_seed_alone(model):
    specs = model.functions.param_specs(model.config)
    first, same, other = (weights.init(specs, seed=seed, std=0.1) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(leaves(first), leaves(same), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(leaves(first), leaves(other), strict=True))
    assert [t.shape for t in leaves(first)] == [t.shape for t in leaves(model.params)]
    assert {t.dtype for t in leaves(weights.init(specs, dtype=torch.bfloat16))} == {torch.bfloat16}


def test_there_is_no_module_object_anywhere():
    """No class of vlmfx derives from nn.Module, and no file names it outside compile/bind.py."""
    for found in pkgutil.walk_packages(vlmfx.__path__, "vlmfx."):
        if found.name.startswith(("vlmfx.server", "vlmfx.compile.bind", "vlmfx.__main__")):
            continue
        if found.name.startswith("vlmfx.ops.triton.") and not HAS_TRITON:
            continue
        module = importlib.import_module(found.name)
        for value in vars(module).values():
            assert not isinstance(value, torch.nn.Module), f"{found.name} holds a module"
            own = isinstance(value, type) and value.__module__ == found.name
            assert not (own and issubclass(value, torch.nn.Module)), f"{found.name}: {value}"
        assert module.__file__ is not None
        with open(module.__file__, encoding="utf-8") as file:
            names = {node.attr for node in ast.walk(ast.parse(file.read())) if isinstance(node, ast.Attribute)}
        assert "Module" not in names, found.name
