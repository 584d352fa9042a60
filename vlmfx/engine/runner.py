"""The model's programs on the engine's batches: encode and prefill of new requests, one decode step of running ones.

This is the only file that knows how the cache is laid out: today row i of a batch owns block i, which is as long as the longest
sequence may get, so slots are row·block_size + position and no block table is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmfx.checkpoint import Model
from vlmfx.models.layers import Batch, Cache
from vlmfx.models.vision_inputs import concat
from vlmfx.ops.attention import resolve_slots
from vlmfx.processing.inputs import ModelInputs

TOKEN_BUCKET = 16  # prefill lengths are padded to a multiple of this


def allocate(model: Model, num_rows: int, length: int) -> Cache:
    """A cache of num_rows sequences of at most `length` tokens, all zero."""
    text = model.config.text
    shape = (num_rows, text.num_kv_heads, length, text.head_dim)

    def zeros() -> Tensor:
        return torch.zeros(shape, dtype=model.dtype, device=model.device)

    return [(zeros(), zeros()) for _ in range(text.num_layers)]


def move_row(cache: Cache, source: int, target: int) -> None:
    """Copy a sequence's cached tokens to another row."""
    for k, v in cache:
        k[target].copy_(k[source])
        v[target].copy_(v[source])


def encode(model: Model, requests: Sequence[ModelInputs]) -> list[Tensor | None]:
    """Feature rows of each request, from one call for all images; ready embeddings pass through, None is text alone."""
    pixels = [r.vision for r in requests if r.vision is not None]
    encoded = iter(())
    if pixels:
        counts = [_num_rows(r) for r in requests if r.vision is not None]
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
    model: Model, requests: Sequence[ModelInputs], cache: Cache, first_row: int, bucket: int = TOKEN_BUCKET
) -> Tensor:
    """Logits (n, vocab) of the token after each prompt; the prompts' keys and values are in rows first_row, first_row + 1, ...

    What these rows held before is cleared: a masked slot weighs 0, but 0·NaN is NaN."""
    for k, v in cache:
        k[first_row : first_row + len(requests)].zero_()
        v[first_row : first_row + len(requests)].zero_()
    features = encode(model, requests)
    present = [f for f in features if f is not None]
    lengths = [len(r.token_ids) for r in requests]
    total = sum(lengths)
    padding = -total % bucket
    ids, index, slots, offset = [], [], [], 0
    block_size = cache[0][0].shape[2]
    for row, (request, rows) in enumerate(zip(requests, features, strict=True), start=first_row):
        ids.extend(request.token_ids)
        index.append(torch.where(request.feature_index >= 0, request.feature_index + offset, -1))
        slots.append(torch.arange(row * block_size, row * block_size + len(request.token_ids)))
        offset += 0 if rows is None else len(rows)
    positions = torch.cat([r.positions for r in requests], -1)

    def padded(values: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(values, (0, padding), value=fill).to(model.device)

    x = model.functions.merge(
        model.params,
        model.config,
        padded(torch.tensor(ids), 0),
        torch.cat(present) if present else None,
        padded(torch.cat(index), -1) if present else None,
    )
    batch = Batch(seq_lens=tuple(lengths), slots=resolve_slots(padded(torch.cat(slots), -1), block_size))
    hidden, _ = model.functions.forward(model.params, model.config, x, padded(positions, 0), cache, batch, ())
    last = torch.tensor(lengths).cumsum(0) - 1
    return model.functions.logits(model.params, model.config, hidden[last.to(model.device)])


def decode(model: Model, ids: Tensor, positions: Sequence[int], context_lens: Sequence[int], cache: Cache) -> Tensor:
    """Logits (n, vocab) after one more token of rows 0..n−1.

    ids (n,) is that token; positions its position; context_lens the tokens of each row, this one included."""
    n, longest = len(positions), max(context_lens)
    lens = torch.tensor(context_lens, device=model.device)
    mask = None
    if min(context_lens) != longest:
        mask = (torch.arange(longest, device=model.device) < lens[:, None])[:, None, None]
    slots = torch.arange(n, device=model.device) * cache[0][0].shape[2] + lens - 1
    batch = Batch(
        seq_lens=(1,) * n, slots=resolve_slots(slots, cache[0][0].shape[2]), max_context_len=longest, mask=mask
    )
    position_ids = torch.tensor(positions, device=model.device)
    if model.config.text.mrope_section:
        position_ids = position_ids.expand(3, -1)
    x = model.functions.merge(model.params, model.config, ids, None, None)
    hidden, _ = model.functions.forward(model.params, model.config, x, position_ids, cache, batch, ())
    return model.functions.logits(model.params, model.config, hidden)


def _num_rows(request: ModelInputs) -> int:
    return int((request.feature_index >= 0).sum())
