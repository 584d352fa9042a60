"""The model's programs on the engine's batches: encode and prefill of new requests, one decode step of running ones.

This is the only file that knows how the cache is used: today row i of a batch owns block i, which is as long as the longest
sequence may get, so slots are row·length + position and no block table is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from vlmfx.checkpoint import Model
from vlmfx.models.layers import Batch, Cache
from vlmfx.models.vision_inputs import concat, cumulative
from vlmfx.ops.paged_decode_attention import TILE, DecodeWork, decode_work, num_items_for
from vlmfx.processing.inputs import ModelInputs
from vlmfx.tree import Tree

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


def encode(model: Model, requests: Sequence[ModelInputs]) -> list[Tensor | None]:
    """Feature rows of each request, from one call for all images; ready embeddings pass through, None is text alone."""
    pixels = [r.vision for r in requests if r.vision is not None]
    encoded = iter(())
    if pixels:
        counts = [r.num_features for r in requests if r.vision is not None]
        inputs = concat(pixels).to(model.device)
        encoded = iter(model.functions.encode(model.params, model.config, inputs).split(counts))
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
    bucket: int = 1,
) -> Tensor:
    """Logits (n, vocab) of the token after each prompt; the prompts' keys and values are in rows first_row, first_row + 1, ...

    max_lens: the most tokens each sequence may ever have. Tokens are padded to a multiple of bucket."""
    x, positions, extras = pack(model, requests, max_lens, bucket)
    lengths, length = [len(r.token_ids) for r in requests], cache[0][0].shape[2]
    slots = torch.full((len(x),), -1, dtype=torch.int32)
    slots[: sum(lengths)] = torch.cat(
        [torch.arange(n, dtype=torch.int32) + row * length for row, n in enumerate(lengths, start=first_row)]
    )
    batch = Batch(cu_seqlens=cumulative(lengths).to(model.device), slot_mapping=slots.to(model.device))
    hidden, _ = model.functions.forward(model.params, model.config, x, positions, cache, batch, extras)
    last = torch.tensor(lengths).cumsum(0) - 1
    return model.functions.logits(model.params, model.config, hidden[last.to(model.device)])


def pack(
    model: Model, requests: Sequence[ModelInputs], max_lens: Sequence[int], bucket: int = 1
) -> tuple[Tensor, Tensor, Tree]:
    """What `forward` takes of whole prompts, packed one after another: merged embeddings (tokens, hidden), positions, extras.

    max_lens: the most tokens each sequence may ever have. Tokens are padded to a multiple of bucket."""
    features = encode(model, requests)
    present = [f for f in features if f is not None]
    lengths = [len(r.token_ids) for r in requests]
    padding = -sum(lengths) % bucket
    index, offset = [], 0
    for request, rows in zip(requests, features, strict=True):
        index.append(torch.where(request.feature_index >= 0, request.feature_index + offset, -1))
        offset += 0 if rows is None else len(rows)

    def padded(values: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(values, (0, padding), value=fill).to(model.device)

    ids = padded(torch.tensor([i for r in requests for i in r.token_ids]), 0)
    merged = torch.cat(present) if present else None
    feature_index = padded(torch.cat(index), -1) if present else None
    x = model.functions.merge(model.params, model.config, ids, merged, feature_index)
    extras = model.functions.extras(model.config, max_lens, lengths, len(x), merged, feature_index)
    return x, padded(torch.cat([r.positions for r in requests], -1), 0), extras


def decode(
    model: Model,
    ids: Tensor,
    positions: Sequence[int],
    context_lens: Sequence[int],
    max_lens: Sequence[int],
    cache: Cache,
) -> Tensor:
    """Logits (n, vocab) after one more token of rows 0..n−1.

    ids (n,) is that token; positions its position; context_lens the tokens of each row, this one included; max_lens as in `prefill`."""
    n, length, device = len(positions), cache[0][0].shape[2], model.device
    lens = torch.tensor(context_lens, dtype=torch.int32)
    slots = torch.arange(n, dtype=torch.int32) * length + lens - 1
    position_ids = torch.tensor(positions, device=device)
    if model.config.text.mrope_section:
        position_ids = position_ids.expand(3, -1)
    batch = Batch(context_lens=lens.to(device), slot_mapping=slots.to(device), work=_decode_work(model, context_lens))
    extras = model.functions.extras(model.config, max_lens, [1] * n, n, None, None)
    with matmul_backend(model, n):
        x = model.functions.merge(model.params, model.config, ids, None, None)
        hidden, _ = model.functions.forward(model.params, model.config, x, position_ids, cache, batch, extras)
        return model.functions.logits(model.params, model.config, hidden)


def _decode_work(model: Model, context_lens: Sequence[int]) -> DecodeWork | None:
    """The contexts cut into as many pieces as fill the GPU; a CPU takes them whole."""
    if model.device.type != "cuda":
        return None
    num_sms = torch.cuda.get_device_properties(model.device).multi_processor_count
    num_items = num_items_for(len(context_lens), model.config.text.num_kv_heads, num_sms)
    return DecodeWork(*(t.to(model.device) for t in decode_work(context_lens, num_items, tile=TILE)))


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
