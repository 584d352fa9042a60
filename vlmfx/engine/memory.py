"""How large the KV cache is: what a step needs is measured first, and the cache gets what is left."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from vlmfx.checkpoint import Model
from vlmfx.compile.buckets import Plan
from vlmfx.compile.executor import EagerExecutor
from vlmfx.compile.layout import BLOCK_SIZE, CacheLayout, bytes_per_token
from vlmfx.device import accelerator
from vlmfx.engine.options import EngineOptions
from vlmfx.engine.warm_up import run_padding
from vlmfx.errors import DeviceError
from vlmfx.processing.prompt import example_vision

log = logging.getLogger("vlmfx")
DEFAULT_BYTES = 4 << 30  # on a CPU
SLACK = 512 << 20  # of a GPU or MLU, for what no measurement sees: kernels, libraries, fragments


def cache_layout(model: Model, options: EngineOptions, plan: Plan | None) -> CacheLayout:
    """The layout of the cache that there is room for. plan: whose largest steps run beside it. Raises DeviceError."""
    block_bytes = bytes_per_token(model.config.text, model.dtype) * BLOCK_SIZE
    most = CacheLayout.of(options.num_seqs(model.device.type), model.max_model_len)
    if options.num_gpu_blocks_override is not None:
        room = options.num_gpu_blocks_override * block_bytes
    elif options.kv_cache_memory_bytes is not None:
        room = options.kv_cache_memory_bytes
    elif accelerator(model.device) is not None:
        room = _room_on_device(model, options.gpu_memory_utilization, plan)
    else:
        room = DEFAULT_BYTES
    num_blocks = min(most.num_blocks, room // block_bytes)
    if num_blocks < 1:
        raise DeviceError(
            f"the KV cache has {max(room, 0) >> 20} MiB, less than one block of {block_bytes >> 10} KiB; raise gpu_memory_utilization or "
            "kv_cache_memory_bytes, or choose a smaller model or plan."
        )
    layout = replace(most, num_blocks=num_blocks)
    tokens = num_blocks * BLOCK_SIZE
    log.info(
        "the KV cache holds %d tokens in %d MiB, %.1f of the longest sequences (%d tokens); %d MiB for encoded images hold %d rows",
        tokens, num_blocks * block_bytes >> 20, tokens / model.max_model_len, model.max_model_len,
        options.mm_feature_cache_bytes >> 20,
        options.mm_feature_cache_bytes // (model.program_set.row_size * model.dtype.itemsize),
    )  # fmt: skip
    return layout


def _room_on_device(model: Model, share: float, plan: Plan | None) -> int:
    """Bytes of a GPU's or MLU's memory that are left of a share of it, beside what is there and the largest step of a plan."""
    peak, api = 0 if plan is None else step_bytes(model, plan), accelerator(model.device)
    free, total = api.mem_get_info(model.device)
    free += api.memory_reserved(model.device) - api.memory_allocated(model.device)
    return int(share * total) - (total - free) - peak - SLACK


@torch.no_grad()
def step_bytes(model: Model, plan: Plan) -> int:
    """What the largest encode, and the largest prefill, take on the device beside the weights: the larger of the two, by running both."""
    programs, device, api = model.program_set, model.device, accelerator(model.device)
    layout = CacheLayout.of(1, model.max_model_len)
    eager = EagerExecutor(programs, model.params, layout=replace(layout, num_blocks=1))
    example, before = example_vision(model.processor), api.memory_allocated(device)
    api.reset_peak_memory_stats(device)
    for name in ("encode", "prefill", "pool"):
        if plan.rungs(name):
            run_padding(model, eager, name, plan.rungs(name)[-1], plan, layout, example)
    api.synchronize(device)
    return api.max_memory_allocated(device) - before
