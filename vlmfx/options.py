"""LLM's options: which there are, which of vLLM's are known and not to be had, and those that a processor alone needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmfx import checkpoint
from vlmfx.checkpoint import Model
from vlmfx.engine.options import NAMES
from vlmfx.errors import InvalidRequest, shown
from vlmfx.processing.prompt import Processor, with_options

MEDIA_OPTIONS = {"allowed_local_media_path", "allowed_media_domains", "private_media_hosts"}
LOADING_OPTIONS = {"max_model_len", "chat_template", "revision", "hf_token"}
NOT_COUNTED = {
    "dtype", "device", "task", "trust_remote_code", "backend", "plan", "strict", "enforce_eager", "record", *NAMES,
}  # fmt: skip
# Arguments of vLLM's that are known and not to be had yet, with the one value that asks for nothing.
NOT_YET = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "quantization": None,
    "enable_lora": False,
}
# Arguments of vLLM's that would change no answer: there is nothing here yet that they could act on.
NO_EFFECT = {
    "swap_space", "cpu_offload_gb", "kv_cache_dtype", "block_size", "max_seq_len_to_capture", "disable_custom_all_reduce",
    "enable_chunked_prefill",
    "disable_mm_preprocessor_cache", "disable_log_stats", "distributed_executor_backend",
}  # fmt: skip


def check_others(others: Mapping[str, Any]) -> None:
    """Raise InvalidRequest for an option that is not ours; vLLM's that ask for nothing may stay."""
    for name, value in others.items():
        if name in NO_EFFECT:
            raise InvalidRequest(name, "vLLM has it, but it has no effect here yet; remove it.", found=value)
        if name not in NOT_YET:
            raise InvalidRequest(name, f"LLM has no option {name}; remove it.", found=value)
        none = NOT_YET[name]
        if type(value) is not type(none) or value != none:
            raise InvalidRequest(
                name, f"{shown(value)} is not implemented; leave it at {none!r}.", found=value, expected=none
            )


def processor_of(
    model: str | Path | Model,
    *,
    limit_mm_per_prompt: Any = None,
    media_io_kwargs: Any = None,
    mm_processor_kwargs: Any = None,
    **options: Any,
) -> Processor:
    """The processor with LLM's options, without the weights."""
    media = {name: options.pop(name) for name in MEDIA_OPTIONS & options.keys()}
    loading = {name: options.pop(name) for name in LOADING_OPTIONS & options.keys()}
    check_others({name: value for name, value in options.items() if name not in NOT_COUNTED})
    if isinstance(model, Model):
        given = [name for name in (*loading, *options) if name not in NOT_YET]
        if given:
            raise InvalidRequest(given[0], "the model is loaded already; pass it to vlmfx.load instead.")
        processor = model.processor
    else:
        processor = checkpoint.load_only_processor(model, **loading)
    media = {name: value for name, value in media.items() if value is not None}
    return with_options(processor, limit_mm_per_prompt, media, media_io_kwargs, mm_processor_kwargs)
