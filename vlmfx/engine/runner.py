"""The model's programs on the engine's batches: encode of new images, prefill of parts of prompts, decode of one token each.

Inputs are padded to the executor's buckets; outputs do not show it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmfx.checkpoint import Model
from vlmfx.compile.executor import Executor, moved
from vlmfx.compile.layout import CacheLayout
from vlmfx.compile.padding import pad_decode, pad_prefill, pad_vision
from vlmfx.compile.programs import Sampling, Step
from vlmfx.device import num_cores
from vlmfx.models.layers import Batch, Cache
from vlmfx.models.vision_inputs import VisionInputs, concat, cumulative
from vlmfx.ops.paged_decode_attention import TILE, DecodeWork, decode_work, num_items_for
from vlmfx.processing.inputs import ModelInputs

ONEDNN = Lock()
MAX_TOKENS = 8192  # of the prompts that go through the model together; a longer one goes in parts


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """New tokens of one sequence, of which `start` are in the cache already.

    positions (n,) or (3, n); feature_index (n,): the row of features (F, row) that replaces a token, −1 for text. blocks: those of the
    sequence, for these tokens too. max_len: the most tokens that it may ever have. num_draws: how many tokens to draw after its last."""

    token_ids: Sequence[int]
    positions: Tensor
    feature_index: Tensor
    features: Tensor | None
    blocks: Sequence[int]
    max_len: int
    start: int = 0
    num_draws: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """A sequence that gets one more token: the newest one's position, how many there are with it, blocks and max_len as a Chunk's."""

    position: int
    context_len: int
    blocks: Sequence[int]
    max_len: int


def copy_blocks(cache: Cache, copies: Sequence[tuple[int, int]]) -> None:
    """(source, target): all of a block of the cache; no target is a source."""
    if not copies:
        return
    sources, targets = moved(torch.tensor(copies).T.contiguous(), cache[0][0].device)
    for k_and_v in cache:
        for blocks in k_and_v:
            blocks.index_copy_(0, targets, blocks.index_select(0, sources))


def encode(model: Model, requests: Sequence[ModelInputs], executor: Executor | None = None) -> list[Tensor | None]:
    """Feature rows of each request; ready embeddings pass through, None is text alone."""
    items = [item for request in requests for item in request.media]
    encoded = iter(
        encode_items(model, [i.vision for i in items], [i.num_rows for i in items], executor or model.executor)
    )
    rows: list[Tensor | None] = []
    for request in requests:
        mine = [next(encoded) for _ in request.media]
        ready = None if request.embeds is None else request.embeds.to(model.device, model.dtype)
        rows.append((mine[0] if len(mine) == 1 else torch.cat(mine)) if mine else ready)
    return rows


def encode_items(
    model: Model, inputs: Sequence[VisionInputs], num_rows: Sequence[int], executor: Executor
) -> list[Tensor]:
    """The feature rows of each image or video, from one call for all, or from as few as a plan allows."""
    rows: list[Tensor] = []
    counts = iter(num_rows)
    for group in _encode_groups(inputs, executor):
        joined = concat(group)
        size = executor.bucket("encode", len(joined.position_ids), joined.num_segments)
        if size is not None and executor.plan is not None:
            joined = pad_vision(joined, size, executor.plan.max_segments, model.config.vision.patch_size)
        lengths = [next(counts) for _ in group]
        made = executor.encode(joined)[: sum(lengths)]
        # A program may write its next rows where these are.
        rows += (made if executor.plan is None else made.clone()).split(lengths)
    return rows


def _encode_groups(inputs: Sequence[VisionInputs], executor: Executor) -> Iterator[list[VisionInputs]]:
    """Images in order, in groups that a plan's largest bucket holds; one that is larger is alone."""
    plan, size, segments = executor.plan, 0, 0
    group: list[VisionInputs] = []
    most = (plan.encode[-1], plan.max_segments) if plan is not None and plan.encode else (2**62, 2**62)
    for one in inputs:
        more = len(one.position_ids), one.num_segments
        if group and (size + more[0] > most[0] or segments + more[1] > most[1]):
            yield group
            group, size, segments = [], 0, 0
        group.append(one)
        size, segments = size + more[0], segments + more[1]
    if group:
        yield group


def prefill(
    model: Model, chunks: Sequence[Chunk], cache: Cache, sampling: Sampling | None, executor: Executor
) -> tuple[Tensor, Tensor]:
    """The tokens that the chunks draw (draws,), in order, and their logits (draws, vocab); keys and values of the new tokens go to the
    cache. sampling, a row a draw and on the host: None for greedy."""
    lengths, layout = [len(c.token_ids) for c in chunks], _layout(executor)
    bucket = executor.bucket("prefill", sum(lengths), len(chunks))
    ends = np.cumsum(lengths)
    last = np.repeat(ends - 1, [c.num_draws for c in chunks])
    present = [c.features for c in chunks if c.features is not None]
    starts = np.cumsum([0, *(0 if c.features is None else len(c.features) for c in chunks)])[:-1].tolist()
    index = [torch.where(c.feature_index >= 0, c.feature_index + n, -1) for c, n in zip(chunks, starts, strict=True)]
    places = [np.arange(c.start, c.start + n) for c, n in zip(chunks, lengths, strict=True)]
    slots = [_slots(c.blocks, p, layout.block_size) for c, p in zip(chunks, places, strict=True)]
    # Where nothing is padded, attention may be told that no sequence has a prefix.
    has_prefix = bucket is not None or any(c.start for c in chunks)
    inputs = Step(
        ids=torch.tensor([i for c in chunks for i in c.token_ids]),
        positions=torch.cat([c.positions for c in chunks], -1),
        batch=Batch(
            cu_seqlens=cumulative(lengths),
            slot_mapping=torch.from_numpy(np.concatenate(slots)),
            prefix_lens=torch.tensor([c.start for c in chunks], dtype=torch.int32) if has_prefix else None,
            block_table=_block_table([c.blocks for c in chunks], layout, bucket) if has_prefix else None,
        ),
        features=torch.cat(present) if present else None,
        feature_index=torch.cat(index) if present else None,
        last=torch.from_numpy(last),
        sampling=sampling,
    )
    inputs = _padded(model, inputs, bucket, executor)
    inputs = replace(inputs, extras=_extras(model, inputs, [c.max_len for c in chunks], lengths))
    ids, logits = executor.step(inputs, cache)
    return _kept(ids[: len(last)], bucket), logits[: len(last)]


def pool(
    model: Model,
    requests: Sequence[ModelInputs],
    executor: Executor | None = None,
    features: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """One vector a request (n, hidden) float32, not yet of unit length. features: what `encode` gives, where that is done already."""
    executor = executor or model.executor
    features = encode(model, requests, executor) if features is None else features
    lengths = [len(r.token_ids) for r in requests]
    bucket = executor.bucket("pool", sum(lengths), len(requests))
    inputs = _padded(model, pack(requests, features), bucket, executor)
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
    if inputs.features is None:
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
    model: Model, ids: Tensor, rows: Sequence[Row], cache: Cache, sampling: Sampling | None, executor: Executor
) -> tuple[Tensor, Tensor]:
    """The token after the newest one of each row (n,), and its logits (n, vocab).

    ids (n,): the newest tokens. sampling as in `prefill`."""
    n, layout = len(rows), _layout(executor)
    context_lens = [row.context_len for row in rows]
    bucket = executor.bucket("decode", n)
    place = torch.tensor([row.position for row in rows])
    lens = np.array(context_lens, np.int32)
    blocks = np.array([row.blocks[(row.context_len - 1) // layout.block_size] for row in rows], np.int32)
    inputs = Step(
        ids=ids,
        positions=place.expand(3, -1) if model.config.text.mrope_section else place,
        batch=Batch(
            context_lens=torch.from_numpy(lens),
            slot_mapping=torch.from_numpy(blocks * layout.block_size + (lens - 1) % layout.block_size),
            block_table=_block_table([row.blocks for row in rows], layout, bucket),
        ),
        sampling=sampling,
    )
    if bucket is not None:
        inputs = pad_decode(inputs, bucket)
        context_lens = [*context_lens, *[0] * (bucket - n)]
    inputs = replace(inputs, batch=replace(inputs.batch, work=_decode_work(model, context_lens)))
    inputs = replace(inputs, extras=_extras(model, inputs, [row.max_len for row in rows], [1] * n))
    with matmul_backend(model, len(inputs.ids)):
        next_ids, logits = executor.step(inputs, cache)
    return _kept(next_ids[:n], bucket), logits[:n]


def _kept(ids: Tensor, bucket: int | None) -> Tensor:
    """The ids, elsewhere where a captured program made them: the next call of it, or of another, may come before they are used."""
    return ids if bucket is None else ids.clone()


def _layout(executor: Executor) -> CacheLayout:
    assert executor.layout is not None, "an executor without a cache runs no steps"
    return executor.layout


def _slots(blocks: Sequence[int], places: np.ndarray, block_size: int) -> np.ndarray:
    """Where the tokens at these places of a sequence lie in the cache, int32."""
    return np.asarray(blocks, np.int32)[places // block_size] * block_size + (places % block_size).astype(np.int32)


def _block_table(rows: Sequence[Sequence[int]], layout: CacheLayout, bucket: int | None) -> Tensor:
    """(num rows, max_blocks) int32, or where nothing is padded as many blocks as the longest row has."""
    table = np.zeros((len(rows), layout.max_blocks if bucket is not None else max(map(len, rows))), np.int32)
    for at, blocks in zip(table, rows, strict=True):
        at[: len(blocks)] = np.frombuffer(blocks, np.int32) if isinstance(blocks, array) else blocks
    return torch.from_numpy(table)


def _decode_work(model: Model, context_lens: Sequence[int]) -> DecodeWork | None:
    """The contexts cut into as many pieces as fill the device; a CPU takes them whole."""
    cores = num_cores(model.device)
    if cores is None:
        return None
    num_items = num_items_for(len(context_lens), model.config.text.num_kv_heads, cores)
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
