"""Admission: what an engine of this size can never serve is refused before it waits for anything."""

from __future__ import annotations

from dataclasses import dataclass

from vlmfx.checkpoint import Model
from vlmfx.compile.executor import Executor
from vlmfx.compile.ladders import MAX_PATCHES
from vlmfx.engine.scheduler import Limits
from vlmfx.engine.sequence import Request
from vlmfx.errors import InvalidRequest
from vlmfx.processing.inputs import ModelInputs


def limits_of(model: Model, executor: Executor, max_num_seqs: int, max_tokens: int) -> Limits:
    """What was asked for, and no more than an executor's plan has room for."""
    plan = executor.plan
    rungs = () if plan is None else plan.prefill or plan.pool
    if plan is None or not rungs:
        patches = MAX_PATCHES.get(model.device.type, MAX_PATCHES["cuda"])
        return Limits(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_tokens, max_patches=patches)
    return Limits(
        max_num_seqs=min((max_num_seqs, *plan.decode[-1:])),
        max_num_batched_tokens=min(max_tokens, rungs[-1]),
        max_prefill_seqs=plan.max_seqs,
        max_patches=plan.encode[-1] if plan.encode else 1,
        max_segments=plan.max_segments,
    )


@dataclass(frozen=True, kw_only=True)
class Admission:
    """capacity: tokens that the cache holds."""

    executor: Executor
    limits: Limits
    capacity: int

    def check(self, request: Request) -> None:
        """Raise InvalidRequest for a request whose prompt is too long, or that wants too many texts at once."""
        length = request.num_tokens
        if not request.pools and length >= self.capacity:
            raise InvalidRequest(
                "prompt",
                f"it is {length} tokens long, but the cache holds {self.capacity} in all; shorten it, or give the cache more memory "
                "(kv_cache_memory_bytes).",
                found=length,
                expected=self.capacity - 1,
            )
        largest = self.executor.largest("pool") if request.pools else None
        if largest is not None and length > largest:
            message = f"it is {length} tokens long, but the plan's largest pool program takes {largest}; shorten it."
            raise InvalidRequest("prompt", message, found=length, expected=largest)
        n, most = request.params.n, min(self.limits.max_num_seqs, self.limits.max_prefill_seqs)
        if n > most:
            message = f"it is {n}, but only {most} texts can begin at once (max_num_seqs, or the plan's max_seqs); ask for fewer."
            raise InvalidRequest("n", message, found=n, expected=most)

    def check_media(self, inputs: ModelInputs) -> None:
        """Raise InvalidRequest for an image that no program takes."""
        largest = self.executor.largest("encode")
        size = max((len(item.vision.position_ids) for item in inputs.media), default=0)
        if largest is not None and size > largest:
            message = f"it has {size} patches, but the plan's largest encode program takes {largest}; make it smaller."
            raise InvalidRequest("multi_modal_data.image", message, found=size, expected=largest)
