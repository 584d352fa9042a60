"""The model's programs on the engine's batches: encode and prefill of new requests, one decode step of running ones.

This is the only file that knows how the cache is used: today row i of a batch owns block i, which is as long as the longest
sequence may get, so slots are row·length + position and no block table is needed. With a plan, the inputs of each program are padded to
its buckets; outputs do not show it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from vlmfx.checkpoint import Model
from vlmfx.compile import programs
from vlmfx.compile.buckets import Plan
from vlmfx.compile.padding import pad_decode, pad_prefill, pad_vision
from vlmfx.compile.programs import Sampling, Step
from vlmfx.models.layers import Batch, Cache
from vlmfx.models.vision_inputs import concat, cumulative
from vlmfx.ops.paged_decode_attention import TILE, DecodeWork, decode_work, num_items_for
from vlmfx.processing.inputs import ModelInputs
from vlmfx.tree import tree_map

ONEDNN = Lock()
MAX_TOKENS = 8192  # of the prompts that go through the model together; a longer one goes alone


def allocate(model: Model, num_rows: int, length: int) -> Cache:
    """The cache of num_rows sequences of at most `length` tokens: k and v a layer, (num_rows, kv_heads, length, head_dim), all zero."""
    text = model.config.text
    shape = (num_rows, text.num_kv_heads, length, text.head_dim)

    def zeros() -> Tensor:
        return torch.zeros(shape, dtype=model.dtype, device=model.device)

    return [(zeros(), zeros()) for _ in range(text.num_layers)]


def move_row(cache: Cache, source: int, target: int) -> None:
    """Copy a sequence's cached tokens to another row."""
    for k_and_v in cache:
        for rows in k_and_v:
            rows[target].copy_(rows[source])


def encode(model: Model, requests: Sequence[ModelInputs], plan: Plan | None = None) -> list[Tensor | None]:
    """Feature rows of each request, from one call for all images; ready embeddings pass through, None is text alone."""
    pixels = [r.vision for r in requests if r.vision is not None]
    encoded = iter(())
    if pixels:
        counts = [r.num_features for r in requests if r.vision is not None]
        inputs = concat(pixels)
        if plan is not None:
            size = plan.bucket("encode", len(inputs.position_ids))
            inputs = pad_vision(inputs, size, plan.max_segments, model.config.vision.patch_size)
        rows = programs.encode(model.functions, model.config, model.params, inputs.to(model.device))
        encoded = iter(rows[: sum(counts)].split(counts))
    return [
        next(encoded)
        if r.vision is not None
        else r.embeds.to(model.device, model.dtype)
        if r.embeds is not None
        else None
        for r in requests
    ]


def prefill(
    model: Model,
    requests: Sequence[ModelInputs],
    max_lens: Sequence[int],
    cache: Cache,
    first_row: int,
    sampling: Sampling | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """The token after each prompt (n,) and its logits (n, vocab); the prompts' keys and values are in rows first_row, first_row + 1, ...

    max_lens: the most tokens each sequence may ever have. sampling, on the host: None for greedy."""
    lengths, length = [len(r.token_ids) for r in requests], cache[0][0].shape[2]
    rows = range(first_row, first_row + len(requests))
    slots = [torch.arange(n, dtype=torch.int32) + row * length for row, n in zip(rows, lengths, strict=True)]
    inputs = replace(
        pack(requests, encode(model, requests, plan)),
        last=torch.tensor(lengths).cumsum(0) - 1,
        sampling=sampling,
    )
    inputs = replace(inputs, batch=replace(inputs.batch, slot_mapping=torch.cat(slots)))
    if plan is not None:
        size = plan.bucket("prefill", len(inputs.ids))
        inputs = pad_prefill(inputs, size, plan.max_seqs, size)
    inputs = with_extras(model, inputs, max_lens, lengths)
    ids, logits = programs.step(model.functions, model.config, model.params, inputs, cache)
    return ids[: len(requests)], logits[: len(requests)]


def pack(requests: Sequence[ModelInputs], features: Sequence[Tensor | None]) -> Step:
    """Whole prompts, one after another, as a step without a cache; features are the rows of each request."""
    present = [f for f in features if f is not None]
    index, offset = [], 0
    for request, rows in zip(requests, features, strict=True):
        index.append(torch.where(request.feature_index >= 0, request.feature_index + offset, -1))
        offset += 0 if rows is None else len(rows)
    return Step(
        ids=torch.tensor([i for r in requests for i in r.token_ids]),
        positions=torch.cat([r.positions for r in requests], -1),
        batch=Batch(cu_seqlens=cumulative(len(r.token_ids) for r in requests)),
        features=torch.cat(present) if present else None,
        feature_index=torch.cat(index) if present else None,
    )


def with_extras(model: Model, inputs: Step, max_lens: Sequence[int], seq_lens: Sequence[int]) -> Step:
    """The inputs, padded already, on the model's device, with what the family wants beyond the common ones.

    max_lens: the most tokens each sequence may ever have; seq_lens: its tokens in this step."""
    inputs = tree_map(lambda t: None if t is None else t.to(model.device), inputs)
    extras = model.functions.extras(
        model.config, max_lens, seq_lens, len(inputs.ids), inputs.features, inputs.feature_index
    )
    return replace(inputs, extras=tree_map(lambda t: t.to(model.device), extras))


def decode(
    model: Model,
    ids: Tensor,
    positions: Sequence[int],
    context_lens: Sequence[int],
    max_lens: Sequence[int],
    cache: Cache,
    sampling: Sampling | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """The token after one more token of rows 0..n−1, (n,), and its logits (n, vocab).

    ids (n,) is that one more token; positions its position; context_lens the tokens of each row, this one included; max_lens and sampling
    as in `prefill`."""
    n, length = len(positions), cache[0][0].shape[2]
    lens, place = torch.tensor(context_lens, dtype=torch.int32), torch.tensor(positions)
    inputs = Step(
        ids=ids,
        positions=place.expand(3, -1) if model.config.text.mrope_section else place,
        batch=Batch(context_lens=lens, slot_mapping=torch.arange(n, dtype=torch.int32) * length + lens - 1),
        sampling=sampling,
    )
    if plan is not None:
        inputs = pad_decode(inputs, plan.bucket("decode", n))
        context_lens = [*context_lens, *[0] * (len(inputs.ids) - n)]
    inputs = replace(inputs, batch=replace(inputs.batch, work=_decode_work(model, context_lens)))
    inputs = with_extras(model, inputs, max_lens, [1] * n)
    with matmul_backend(model, len(inputs.ids)):
        next_ids, logits = programs.step(model.functions, model.config, model.params, inputs, cache)
    return next_ids[:n], logits[:n]


def _decode_work(model: Model, context_lens: Sequence[int]) -> DecodeWork | None:
    """The contexts cut into as many pieces as fill the GPU; a CPU takes them whole."""
    if model.device.type != "cuda":
        return None
    num_sms = torch.cuda.get_device_properties(model.device).multi_processor_count
    num_items = num_items_for(len(context_lens), model.config.text.num_kv_heads, num_sms)
    return decode_work(context_lens, num_items, tile=TILE)


@contextmanager
def matmul_backend(model: Model, num_rows: int) -> Iterator[None]:
    """The setting under which a decode step of num_rows is fastest: for one row of a small bfloat16 model, CPU without oneDNN.

    oneDNN packs the weight anew on each call, which for small matrices costs more than the product. The setting is the process's:
    the lock lets one thread at a time change it and put it back, others go on with what they find, which only changes speed."""
    # Where it was measured; on torch 2.4 it is the slower way.
    small = model.config.text.hidden_size <= 512 and torch.__version__ >= "2.13"
    wanted = num_rows == 1 and small and model.dtype == torch.bfloat16 and model.device.type == "cpu"
    if not wanted or not ONEDNN.acquire(blocking=False):
        yield
        return
    mkldnn: Any = torch.backends.mkldnn  # a module whose `enabled` is a property, which its stub does not tell
    before = mkldnn.enabled
    try:
        mkldnn.enabled = False
        yield
    finally:
        mkldnn.enabled = before
        ONEDNN.release()
