"""The model's programs on the engine's batches: encode and prefill of new requests, one decode step of running ones.

This is the only file that knows how the cache is used: today row i of a batch owns block i, which is as long as the longest
sequence may get, or where the executor's cache is paged as many blocks in a row; so slots are row·length + position. Inputs are padded
to the executor's buckets; outputs do not show it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from vlmfx.checkpoint import Model
from vlmfx.compile.executor import Executor, moved
from vlmfx.compile.layout import CacheLayout
from vlmfx.compile.padding import pad_decode, pad_prefill, pad_vision
from vlmfx.compile.programs import Sampling, Step
from vlmfx.models.layers import Batch, Cache
from vlmfx.models.vision_inputs import concat, cumulative
from vlmfx.ops.paged_decode_attention import TILE, DecodeWork, decode_work, num_items_for
from vlmfx.processing.inputs import ModelInputs

ONEDNN = Lock()
MAX_TOKENS = 8192  # of the prompts that go through the model together; a longer one goes alone


def move_row(cache: Cache, layout: CacheLayout | None, source: int, target: int) -> None:
    """Copy a sequence's cached tokens to another row."""
    size = 1 if layout is None else layout.max_blocks
    for k_and_v in cache:
        for blocks in k_and_v:
            blocks[target * size : (target + 1) * size].copy_(blocks[source * size : (source + 1) * size])


def encode(model: Model, requests: Sequence[ModelInputs], executor: Executor | None = None) -> list[Tensor | None]:
    """Feature rows of each request, from one call for all images, or from as few as a plan allows; ready embeddings pass through, None is
    text alone."""
    executor = executor or model.executor
    rows: list[Tensor] = []
    for group in _encode_groups([r for r in requests if r.vision is not None], executor):
        inputs = concat([r.vision for r in group if r.vision is not None])
        size = executor.bucket("encode", len(inputs.position_ids), inputs.num_segments)
        if size is not None and executor.plan is not None:
            inputs = pad_vision(inputs, size, executor.plan.max_segments, model.config.vision.patch_size)
        counts = [r.num_features for r in group]
        made = executor.encode(inputs)[: sum(counts)]
        # A program may write its next rows where these are.
        rows += (made if executor.plan is None else made.clone()).split(counts)
    encoded = iter(rows)
    return [
        next(encoded)
        if r.vision is not None
        else r.embeds.to(model.device, model.dtype)
        if r.embeds is not None
        else None
        for r in requests
    ]


def _encode_groups(requests: Sequence[ModelInputs], executor: Executor) -> Iterator[list[ModelInputs]]:
    """The requests in order, in groups whose images a plan's largest bucket holds; one that is larger is alone."""
    plan, size, segments = executor.plan, 0, 0
    group: list[ModelInputs] = []
    most = (plan.encode[-1], plan.max_segments) if plan is not None and plan.encode else (2**62, 2**62)
    for request in requests:
        assert request.vision is not None
        more = len(request.vision.position_ids), request.vision.num_segments
        if group and (size + more[0] > most[0] or segments + more[1] > most[1]):
            yield group
            group, size, segments = [], 0, 0
        group.append(request)
        size, segments = size + more[0], segments + more[1]
    if group:
        yield group


def prefill(
    model: Model,
    requests: Sequence[ModelInputs],
    max_lens: Sequence[int],
    cache: Cache,
    first_row: int,
    sampling: Sampling | None = None,
    executor: Executor | None = None,
) -> tuple[Tensor, Tensor]:
    """The token after each prompt (n,) and its logits (n, vocab); the prompts' keys and values are in rows first_row, first_row + 1, ...

    max_lens: the most tokens each sequence may ever have. sampling, on the host: None for greedy."""
    executor = executor or model.executor
    lengths = [len(r.token_ids) for r in requests]
    bucket = executor.bucket("prefill", sum(lengths), len(requests))  # refused, if at all, before images are encoded
    rows, layout = range(first_row, first_row + len(requests)), executor.layout
    length = cache[0][0].shape[2] if layout is None else layout.max_len
    slots = [torch.arange(n, dtype=torch.int32) + row * length for row, n in zip(rows, lengths, strict=True)]
    inputs = replace(
        pack(requests, encode(model, requests, executor)),
        last=torch.tensor(lengths).cumsum(0) - 1,
        sampling=sampling,
    )
    batch = replace(inputs.batch, slot_mapping=torch.cat(slots))
    if layout is not None:
        no_prefix = torch.zeros(len(requests), dtype=torch.int32)
        batch = replace(batch, block_table=_block_table(rows, layout), prefix_lens=no_prefix)
    inputs = replace(inputs, batch=batch)
    inputs = _padded(model, inputs, bucket, executor)
    inputs = replace(inputs, extras=_extras(model, inputs, max_lens, lengths))
    ids, logits = executor.step(inputs, cache)
    return ids[: len(requests)], logits[: len(requests)]


def pool(model: Model, requests: Sequence[ModelInputs], executor: Executor | None = None) -> Tensor:
    """One vector a request (n, hidden) float32, not yet of unit length."""
    executor = executor or model.executor
    lengths = [len(r.token_ids) for r in requests]
    bucket = executor.bucket("pool", sum(lengths), len(requests))
    inputs = _padded(model, pack(requests, encode(model, requests, executor)), bucket, executor)
    return executor.pool(replace(inputs, extras=_extras(model, inputs, lengths, lengths)))[: len(requests)]


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


def _padded(model: Model, inputs: Step, bucket: int | None, executor: Executor) -> Step:
    """Prefill inputs of a bucket; a program of one always takes feature rows, be they none."""
    if bucket is None or executor.plan is None:
        return inputs
    if inputs.features is None and executor.layout is not None:
        none = torch.empty(0, model.program_set.row_size, dtype=model.dtype, device=model.device)
        inputs = replace(inputs, features=none, feature_index=torch.full_like(inputs.ids, -1))
    return pad_prefill(inputs, bucket, executor.plan.max_seqs, bucket)


def with_extras(model: Model, inputs: Step, max_lens: Sequence[int], seq_lens: Sequence[int]) -> Step:
    """The inputs, padded already, on the model's device, with what the family wants beyond the common ones.

    max_lens: the most tokens each sequence may ever have; seq_lens: its tokens in this step."""
    return moved(replace(inputs, extras=_extras(model, inputs, max_lens, seq_lens)), model.device)


def _extras(model: Model, inputs: Step, max_lens: Sequence[int], seq_lens: Sequence[int]) -> Any:
    return model.functions.extras(
        model.config, max_lens, seq_lens, len(inputs.ids), inputs.features, inputs.feature_index
    )


def decode(
    model: Model,
    ids: Tensor,
    positions: Sequence[int],
    context_lens: Sequence[int],
    max_lens: Sequence[int],
    cache: Cache,
    sampling: Sampling | None = None,
    executor: Executor | None = None,
) -> tuple[Tensor, Tensor]:
    """The token after one more token of rows 0..n−1, (n,), and its logits (n, vocab).

    ids (n,) is that one more token; positions its position; context_lens the tokens of each row, this one included; max_lens and sampling
    as in `prefill`."""
    executor = executor or model.executor
    n, layout = len(positions), executor.layout
    length = cache[0][0].shape[2] if layout is None else layout.max_len
    lens, place = torch.tensor(context_lens, dtype=torch.int32), torch.tensor(positions)
    inputs = Step(
        ids=ids,
        positions=place.expand(3, -1) if model.config.text.mrope_section else place,
        batch=Batch(
            context_lens=lens,
            slot_mapping=torch.arange(n, dtype=torch.int32) * length + lens - 1,
            block_table=None if layout is None else _block_table(range(n), layout),
        ),
        sampling=sampling,
    )
    bucket = executor.bucket("decode", n)
    if bucket is not None:
        inputs = pad_decode(inputs, bucket)
        context_lens = [*context_lens, *[0] * (bucket - n)]
    inputs = replace(inputs, batch=replace(inputs.batch, work=_decode_work(model, context_lens)))
    inputs = replace(inputs, extras=_extras(model, inputs, max_lens, [1] * n))
    with matmul_backend(model, len(inputs.ids)):
        next_ids, logits = executor.step(inputs, cache)
    # A captured program's outputs lie where another program may write before the ids are used.
    return next_ids[:n].clone() if bucket is not None else next_ids[:n], logits[:n]


def _block_table(rows: Sequence[int], layout: CacheLayout) -> Tensor:
    """(num rows, max_blocks) int32: the blocks of each row, one after another."""
    return torch.tensor(rows, dtype=torch.int32)[:, None] * layout.max_blocks + torch.arange(
        layout.max_blocks, dtype=torch.int32
    )


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
