"""StepCounter: what the engine's steps have computed, by program: their sizes, and what buckets add to these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from vlmfx.compile.executor import Executor
from vlmfx.engine.launched import Drawn, Failure
from vlmfx.engine.observer import Observer
from vlmfx.engine.scheduler import StepPlan
from vlmfx.engine.sequence import Request
from vlmfx.errors import VlmfxError
from vlmfx.processing.inputs import ModelInputs


class StepCounter(Observer):
    """Counts by program ("encode", "prefill", "decode", "pool"), and passes all on to another observer.

    sizes: patches, tokens and sequences; padding: what their buckets add; hits and misses: runs in a bucket, and beyond the plan, where
    there is one. num_media: images and videos of prompts that began. Counted by the engine's thread, read by any."""

    def __init__(self, inner: Observer, executor: Executor) -> None:
        self.inner, self.executor = inner, executor
        self.runs: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()
        self.padding: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self.num_media = 0

    def began(self, request: Request, inputs: ModelInputs) -> None:
        self.num_media += len(inputs.media)
        self.inner.began(request, inputs)

    def planned(self, plan: StepPlan) -> None:
        visions = [item.vision for item in plan.encode if item.vision is not None]
        num_patches = sum(len(vision.position_ids) for vision in visions)
        self._count("encode", num_patches, sum(vision.num_segments for vision in visions))
        num_tokens = sum(chunk.end - chunk.start for chunk in plan.prefill)
        self._count("prefill", num_tokens, len(plan.prefill))
        self._count("decode", len(plan.decode))
        self.inner.planned(plan)

    def _count(self, program: str, size: int, count: int = 1) -> None:
        if not size:
            return
        self.runs[program] += 1
        self.sizes[program] += size
        if self.executor.plan is not None:
            try:
                bucket = self.executor.bucket(program, size, count)
            except VlmfxError:  # a strict plan: the step will fail by it
                bucket = None
            (self.misses if bucket is None else self.hits)[program] += 1
            self.padding[program] += 0 if bucket is None else bucket - size

    def ended(self, number: int, error: VlmfxError | None) -> None:
        self.inner.ended(number, error)

    def forgot(self) -> None:
        self.inner.forgot()

    def failed(self, failures: Sequence[Failure]) -> None:
        self.inner.failed(failures)

    def read(self, drawn: Sequence[Drawn]) -> None:
        self.inner.read(drawn)

    def pooled(self, requests: Sequence[Request], vectors: Sequence[Tensor | VlmfxError]) -> None:
        self._count("pool", sum(request.num_tokens for request in requests), len(requests))
        self.inner.pooled(requests, vectors)
