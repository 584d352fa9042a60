"""Bound: a function of trees as a module of its tensors, and its result as a tree again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.compile.functions import Config
from vlmfx.compile.argument import Argument
from vlmfx.compile.bind import Bound
from vlmfx.models.layers import Batch


def fn(params: dict[str, Tensor], cfg: Config, batch: Batch, cache: list[Tensor]) -> dict[str, Any]:
    assert batch.slot_mapping is not None
    cache[0][:1] = params["w"][:1]
    twice = params["w"] * cfg.num_heads
    return {"cache": cache, "twice": (twice, twice), "count": 2, "none": batch.mask, "slots": batch.slot_mapping + 1}


def test_the_module_takes_and_gives_tensors_alone():
    params, slots, cache = {"w": torch.ones(2)}, torch.tensor([5]), [torch.zeros(2)]
    batch = Batch(slot_mapping=slots)
    arguments = [Argument.of("params", params), Argument.of("batch", batch), Argument.of("cache", cache)]
    bound = Bound(fn, {1: Config(num_heads=3)}, arguments)
    tensors = [params["w"], slots, *cache]
    out = bound(*tensors)
    assert [t.tolist() for t in out] == [[3, 3], [6]]  # not the cache, and once what is there twice
    result = bound.outputs.tree(tensors, out)
    assert result["cache"][0] is cache[0]
    assert cache[0].tolist() == [1, 0]
    assert result["twice"] == (out[0], out[0])
    assert (result["count"], result["none"], result["slots"]) == (2, None, out[1])
