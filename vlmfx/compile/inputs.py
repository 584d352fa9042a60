"""The inputs of each bucket, zero in every place: what programs are lowered for before there is a request."""

from __future__ import annotations

from dataclasses import replace

import torch

from vlmfx.compile.buckets import Plan
from vlmfx.compile.layout import CacheLayout
from vlmfx.compile.padding import pad_decode, pad_prefill, pad_vision
from vlmfx.compile.programs import ProgramSet, Step
from vlmfx.models.layers import Batch
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.ops.paged_decode_attention import DecodeWork, num_items_for
from vlmfx.tree import Tree


def bucket_inputs(
    programs: ProgramSet,
    name: str,
    size: int,
    *,
    plan: Plan,
    layout: CacheLayout,
    example: VisionInputs,
    num_cores: int | None = None,
) -> Tree:
    """VisionInputs of encode, or the Step of another program, for bucket `size`, on the host.

    example: pixels of any image as the family's processing makes them. num_cores: of the device that decodes, None for none."""
    if name == "encode":
        return pad_vision(_empty(example), size, plan.max_segments, programs.config.vision.patch_size)
    if name == "decode":
        return _decode(programs, size, layout, num_cores)
    return _prefill(programs, size, plan, layout if name == "prefill" else None)


def _prefill(programs: ProgramSet, size: int, plan: Plan, layout: CacheLayout | None) -> Step:
    """One sequence of one token, padded; without a layout, as pooling takes it."""
    one = torch.zeros(1, dtype=torch.int32)
    batch = Batch(cu_seqlens=torch.tensor([0, 1], dtype=torch.int32))
    if layout is not None:
        table = torch.zeros(1, layout.max_blocks, dtype=torch.int32)
        batch = replace(batch, slot_mapping=one - 1, prefix_lens=one, block_table=table)
    inputs = Step(
        ids=torch.zeros(1, dtype=torch.int64),
        positions=_positions(programs, 1),
        batch=batch,
        features=torch.zeros(0, programs.row_size, dtype=programs.dtype),
        feature_index=torch.full((1,), -1),
        last=None if layout is None else torch.zeros(1, dtype=torch.int64),
    )
    return _with_extras(programs, pad_prefill(inputs, size, plan.max_seqs, size), num_new=1)


def _decode(programs: ProgramSet, size: int, layout: CacheLayout, num_cores: int | None) -> Step:
    """One sequence, padded."""
    one = torch.zeros(1, dtype=torch.int32)
    inputs = Step(
        ids=torch.zeros(1, dtype=torch.int64),
        positions=_positions(programs, 1),
        batch=Batch(
            context_lens=one, slot_mapping=one - 1, block_table=torch.zeros(1, layout.max_blocks, dtype=torch.int32)
        ),
    )
    inputs = pad_decode(inputs, size)
    if num_cores is not None:
        num_items = num_items_for(size, programs.config.text.num_kv_heads, num_cores)
        items = torch.full((num_items, 3), -1, dtype=torch.int32)
        work = DecodeWork(items, torch.zeros(size + 1, dtype=torch.int32))
        inputs = replace(inputs, batch=replace(inputs.batch, work=work))
    return _with_extras(programs, inputs, num_new=1)


def _positions(programs: ProgramSet, num: int) -> torch.Tensor:
    positions = torch.zeros(num, dtype=torch.int64)
    return positions.expand(3, -1) if programs.config.text.mrope_section else positions


def _with_extras(programs: ProgramSet, inputs: Step, num_new: int) -> Step:
    extras = programs.functions.extras(
        programs.config, [num_new], [num_new], len(inputs.ids), inputs.features, inputs.feature_index
    )
    return replace(inputs, extras=extras)


def _empty(example: VisionInputs) -> VisionInputs:
    """An image's inputs without its patches."""
    fields = vars(example)
    cut = {name: value[:0] for name, value in fields.items() if isinstance(value, torch.Tensor)}
    starts = {name: fields[name][:1] for name in ("cu_seqlens", "cu_window_seqlens") if fields[name] is not None}
    return replace(example, **(cut | starts))
