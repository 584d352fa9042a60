"""EngineOptions: how much an engine may hold and do at once, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vlmfx.errors import InvalidRequest, shown

MAX_NUM_SEQS = {"cuda": 128}  # by device, where the option is left out
DEFAULT_NUM_SEQS = 16
NUM_MAKERS = 8  # threads that make prompts requests: tokenize, fetch
FEATURE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """max_num_seqs: texts that are generated at once; None is 128 on a GPU and 16 elsewhere. max_num_batched_tokens: of prompts in a step.

    kv_cache_memory_bytes: of the KV cache; None is on a GPU what gpu_memory_utilization, a share of all its memory, leaves beside the
    weights and the largest step, elsewhere 4 GiB; and never more than max_num_seqs of the longest sequences need.
    num_gpu_blocks_override: its blocks of 16 tokens, on any device, in the place of both. mm_feature_cache_bytes: of encoded images that
    are kept for other requests. enable_prefix_caching: whether prompts that begin alike share blocks. async_scheduling: whether a step is
    launched before the one before is read; None is on a GPU only. Raises InvalidRequest."""

    max_num_seqs: int | None = None
    max_num_batched_tokens: int = 8192
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    mm_feature_cache_bytes: int = FEATURE_BYTES
    enable_prefix_caching: bool = True
    async_scheduling: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("kv_cache_memory_bytes", 1),
            ("num_gpu_blocks_override", 1),
            ("mm_feature_cache_bytes", 0),
        ):
            value = getattr(self, name)
            is_open = value is None and name in ("max_num_seqs", "kv_cache_memory_bytes", "num_gpu_blocks_override")
            if not is_open and (type(value) is not int or value < least):
                raise InvalidRequest(name, f"it is {shown(value)}; use a whole number of {least} or more.", found=value)
        share = self.gpu_memory_utilization
        if type(share) not in (int, float) or not 0 < share <= 1:
            raise InvalidRequest(
                "gpu_memory_utilization", f"it is {shown(share)}; use a number above 0, up to 1.", found=share
            )
        for name in ("enable_prefix_caching", "async_scheduling"):
            value = getattr(self, name)
            if type(value) is not bool and not (value is None and name == "async_scheduling"):
                raise InvalidRequest(name, f"it is {shown(value)}; use True or False.", found=value)

    def num_seqs(self, device: str) -> int:
        """max_num_seqs on a type of device."""
        return MAX_NUM_SEQS.get(device, DEFAULT_NUM_SEQS) if self.max_num_seqs is None else self.max_num_seqs

    def overlaps(self, device: str) -> bool:
        """async_scheduling on a type of device."""
        return device == "cuda" if self.async_scheduling is None else self.async_scheduling


NAMES = tuple(field.name for field in fields(EngineOptions))
