"""Inputs of a program brought to the shapes of a bucket. Padding never shows: it writes nowhere, and no sequence or image sees it.

Extras are made of what is padded already."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfx.compile.programs import Sampling, Step
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.ops.pack_patches import CHANNELS


def pad_vision(inputs: VisionInputs, num_patches: int, num_segments: int, patch_size: int) -> VisionInputs:
    """Inputs of num_patches patches in num_segments segments, with as many windows and feature rows as so many patches can have.

    Feature rows of padding come last and mean nothing."""
    patches, num_pixels = num_patches - len(inputs.position_ids), num_patches
    if inputs.patch_offsets is not None:
        num_pixels *= inputs.patch_offsets.shape[1] * CHANNELS * patch_size**2

    def segments(starts: Tensor, num: int) -> Tensor:
        return _extended(starts, num + 1 - len(starts), int(starts[-1]))

    return replace(
        inputs,
        pixels=_extended(inputs.pixels, num_pixels - len(inputs.pixels), 0),
        position_ids=_extended(inputs.position_ids, patches, 0),
        cu_seqlens=segments(inputs.cu_seqlens, num_segments),
        patch_offsets=None if inputs.patch_offsets is None else _extended(inputs.patch_offsets, patches, -1),
        row_stride=None if inputs.row_stride is None else _extended(inputs.row_stride, patches, 0),
        cu_window_seqlens=None if inputs.cu_window_seqlens is None else segments(inputs.cu_window_seqlens, num_patches),
        position_weights=None if inputs.position_weights is None else _extended(inputs.position_weights, patches, 0),
        row_index=None
        if inputs.row_index is None
        else _extended(inputs.row_index, num_patches - len(inputs.row_index), 0),
    )


def pad_prefill(inputs: Step, num_tokens: int, num_seqs: int, num_features: int) -> Step:
    """A step of num_tokens packed tokens in num_seqs sequences, which draw as many tokens, and of num_features feature rows where there are
    any. Sequences and draws may be fewer by different numbers."""
    tokens, batch = num_tokens - len(inputs.ids), inputs.batch
    assert batch.cu_seqlens is not None, "prefill knows where sequences end"
    seqs = num_seqs + 1 - len(batch.cu_seqlens)
    draws = num_seqs - len(inputs.last) if inputs.last is not None else seqs

    def by_sequence(values: Tensor | None, fill: int) -> Tensor | None:
        return None if values is None else _extended(values, seqs, fill)

    return replace(
        _by_token(inputs, tokens),
        batch=replace(
            batch,
            cu_seqlens=_extended(batch.cu_seqlens, seqs, int(batch.cu_seqlens[-1])),
            prefix_lens=by_sequence(batch.prefix_lens, 0),
            block_table=by_sequence(batch.block_table, 0),
            slot_mapping=None if batch.slot_mapping is None else _extended(batch.slot_mapping, tokens, -1),
        ),
        features=None
        if inputs.features is None
        else _extended(inputs.features, num_features - len(inputs.features), 0),
        last=None if inputs.last is None else _extended(inputs.last, draws, 0),
        sampling=_pad_sampling(inputs.sampling, draws),
    )


def pad_decode(inputs: Step, num_seqs: int) -> Step:
    """A step of one new token in each of num_seqs sequences; those of padding have no context. Work for a GPU is cut afterwards."""
    rows, batch = num_seqs - len(inputs.ids), inputs.batch
    assert batch.context_lens is not None, "decoding knows its contexts"
    assert batch.work is None, "work is cut when the number of sequences is known"
    return replace(
        _by_token(inputs, rows),
        batch=replace(
            batch,
            context_lens=_extended(batch.context_lens, rows, 0),
            slot_mapping=None if batch.slot_mapping is None else _extended(batch.slot_mapping, rows, -1),
            block_table=None if batch.block_table is None else _extended(batch.block_table, rows, 0),
        ),
        sampling=_pad_sampling(inputs.sampling, rows),
    )


def _by_token(inputs: Step, num: int) -> Step:
    """What has an entry a token, extended by num."""
    return replace(
        inputs,
        ids=_extended(inputs.ids, num, 0),
        positions=F.pad(inputs.positions, (0, num)),
        feature_index=None if inputs.feature_index is None else _extended(inputs.feature_index, num, -1),
    )


def _pad_sampling(draw: Sampling | None, num: int) -> Sampling | None:
    """Rows of padding are greedy."""
    if draw is None:
        return None
    return Sampling(**{name: _extended(values, num, 0) for name, values in vars(draw).items()})


def _extended(values: Tensor, num: int, fill: int) -> Tensor:
    """values with num more entries along the first axis. Raises RuntimeError for a bucket that is smaller than the values."""
    return torch.cat((values, values.new_full((num, *values.shape[1:]), fill)))
