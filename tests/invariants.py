"""What must not change an answer, written once: batch mates, their order, rows, buckets, the cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor

from tests import rows
from vlmfx.checkpoint import Model
from vlmfx.compile.buckets import Plan
from vlmfx.compile.executor import EagerExecutor, Executor, PlannedExecutor
from vlmfx.compile.layout import CacheLayout
from vlmfx.engine import runner
from vlmfx.engine.request import RequestOutput
from vlmfx.models.layers import Batch
from vlmfx.models.vision_inputs import cumulative
from vlmfx.processing.inputs import ModelInputs


def prompt_hidden(model: Model, inputs: ModelInputs) -> Tensor:
    """Hidden states (tokens, hidden) after the final norm, of every token of a prompt, without a cache."""
    f = model.functions
    (features,) = runner.encode(model, [inputs])
    x = f.merge(model.params, model.config, torch.tensor(inputs.token_ids), features, inputs.feature_index)
    batch = Batch(cu_seqlens=cumulative([len(inputs.token_ids)]))
    n = len(inputs.token_ids)
    extras = f.extras(model.config, [n], [n], n, features, inputs.feature_index)
    hidden: Tensor
    hidden, cache = f.forward(model.params, model.config, x, inputs.positions, None, batch, extras)
    assert cache is None
    return hidden


def prompt_logits(model: Model, inputs: ModelInputs) -> Tensor:
    """Logits (tokens, vocab) after every token of a prompt, without a cache."""
    logits: Tensor = model.functions.logits(model.params, model.config, prompt_hidden(model, inputs))
    return logits


def extended(inputs: ModelInputs, ids: Sequence[int]) -> ModelInputs:
    """The request whose prompt ends in `ids`, text that follows inputs."""
    n = len(ids)
    following = torch.arange(inputs.next_position, inputs.next_position + n).expand(*inputs.positions.shape[:-1], n)
    return replace(
        inputs,
        token_ids=[*inputs.token_ids, *ids],
        positions=torch.cat([inputs.positions, following], -1),
        next_position=inputs.next_position + n,
        feature_index=torch.cat([inputs.feature_index, torch.full((n,), -1)]),
    )


@torch.no_grad()
def recomputed(model: Model, inputs: ModelInputs, ids: Sequence[int]) -> Tensor:
    """Logits (n, vocab) that choose each of ids, from one pass over prompt and ids without a cache."""
    return prompt_logits(model, extended(inputs, ids[:-1]))[-len(ids) :]


def token_ids(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    """The generated ids of each output; an output with an error fails here."""
    for output in outputs:
        assert output.error is None, output.error
    return [list(output.outputs[0].token_ids) for output in outputs]


def without_compute(model: Model) -> Model:
    """The model with functions that fail when they are called: whatever it raises was found before any compute."""

    def reached(name: str) -> Callable[..., NoReturn]:
        def fail(*args: Any, **kwargs: Any) -> NoReturn:
            raise AssertionError(f"{name} was reached")

        return fail

    functions: Any = SimpleNamespace(
        **{
            name: reached(name)
            for name in ("vision_hidden", "project", "encode", "merge", "extras", "text_inputs", "forward", "logits")
        }
    )
    return replace(model, functions=functions)


def plan_with_slack(model: Model, requests: Sequence[ModelInputs], slack: int) -> Plan:
    """A plan whose buckets are larger than what these requests need by `slack` units of each program, images and sequences."""
    seen = [r.vision for r in requests if r.vision is not None]
    return Plan(
        encode=(sum(len(v.position_ids) for v in seen) + max(slack, not seen) * model.config.vision.patch_multiple,),
        prefill=(sum(len(r.token_ids) for r in requests) + slack,),
        decode=(len(requests) + slack,),
        max_segments=sum(v.num_segments for v in seen) + max(slack, 1),
        max_seqs=len(requests) + slack,
    )


def planned(model: Model, requests: Sequence[ModelInputs], slack: int, length: int, is_eager: bool) -> Executor:
    """The functions themselves behind buckets with this slack, by either executor."""
    plan, layout = plan_with_slack(model, requests, slack), CacheLayout.of(len(requests) + slack, length)
    if is_eager:
        return EagerExecutor(model.program_set, model.params, plan, layout)
    return PlannedExecutor(
        model.program_set, model.params, plan=plan, layout=layout, make=uncompiled, strict=True, chains_sampling=True
    )


def uncompiled(name: str, size: int, fn: Any, bound: Any, inputs: Any) -> Any:
    """What makes a program of a function by leaving it as it is."""
    return partial(fn, *bound)


def overwriting(name: str, size: int, fn: Any, bound: Any, inputs: Any) -> Any:
    """As a captured program: its outputs are the same tensors at each call, which the next one overwrites, but for their first values."""
    kept: list[Tensor] = []

    def run(inputs: Any) -> Any:
        out = fn(*bound, inputs)
        found, structure = torch.utils._pytree.tree_flatten(out)
        if not kept:
            kept.extend(found)
        for mine, value in zip(kept, found, strict=True):
            mine.copy_(value)
        return torch.utils._pytree.tree_unflatten(kept, structure)

    return run


@torch.no_grad()
def greedy_through_cache(
    model: Model, requests: Sequence[ModelInputs], n: int, *, slack: int | None = None, is_eager: bool = True
) -> list[list[int]]:
    """n greedy ids of each request, from the runner's programs alone, padded to buckets with this slack; None: not padded."""
    max_lens = [len(r.token_ids) + n for r in requests]
    executor: Executor = rows.paged(model, len(requests), max(max_lens))
    if slack is not None:
        executor = planned(model, requests, slack, max(max_lens), is_eager)
    ids, _ = rows.prefill(model, requests, max_lens, executor)
    steps = [ids]
    for step in range(1, n):
        positions = [r.next_position + step - 1 for r in requests]
        lens = [len(r.token_ids) + step for r in requests]
        ids, _ = rows.decode(model, ids, positions, lens, max_lens, executor)
        steps.append(ids)
    return torch.stack(steps, 1).tolist()


def is_one_sentence(error: Exception) -> bool:
    """Whether a message is one line, one sentence, says after a semicolon or comma what to do, and tells nothing of the process."""
    message = str(error)
    inside = re.sub(r"\b(e\.g|i\.e|etc)\. ", "", message[:-1])
    leaks = re.search(r"0x[0-9a-f]{6,}|Errno|<[^<>]* object|<_io\.", message)
    is_single = "\n" not in message and ". " not in inside and leaks is None
    return message.endswith(".") and not message.endswith("..") and is_single and ("; " in message or ", " in message)
