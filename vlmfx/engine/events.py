"""What an engine keeps of a request that has begun, and what it says of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from vlmfx.engine.embedding import EmbeddingRequestOutput
from vlmfx.engine.prepared import Prepared
from vlmfx.engine.request import FinishReason, Logprob, RequestMetrics, RequestOutput
from vlmfx.engine.sequence import Request
from vlmfx.engine.sequence import Sequence as Text

Output = RequestOutput | EmbeddingRequestOutput


@dataclass(frozen=True, kw_only=True, eq=False)
class Event:
    """What is new in text `index` of a request, which ends with it where finish_reason is set; output is set with the last one of all, or
    where the request failed."""

    request: Request
    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[dict[int, Logprob], ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    output: Output | None = None


@dataclass(kw_only=True, eq=False)
class Group:
    """A request that has begun: its texts, and what they share."""

    request: Request
    prepared: Prepared
    texts: list[Text]
    taps: dict[str, Tensor] | None
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    first_token_at: float | None = None

    def output(self) -> RequestOutput:
        """All of it by now."""
        request, inputs, now = self.request, self.prepared.inputs, time.perf_counter()
        first = self.first_token_at
        metrics = RequestMetrics(
            prompt_tokens=len(inputs.token_ids),
            output_tokens=sum(len(t.completion.token_ids) for t in self.texts),
            time_to_first_token_s=None if first is None else first - request.arrival,
            decode_s=None if first is None else now - first,
        )
        return RequestOutput(
            request_id=str(request.number),
            prompt=inputs.prompt,
            prompt_token_ids=inputs.token_ids,
            outputs=[t.completion.output() for t in self.texts],
            finished=all(t.completion.end is not None for t in self.texts),
            metrics=metrics,
            taps=self.taps,
            prompt_logprobs=self.prompt_logprobs,
        )


@dataclass(kw_only=True)
class Counters:
    """What was done so far. num_cached: tokens of prompts that were found in the cache; num_finished: requests, failed ones too.

    encoder_seconds: as `EncoderClock` counts them."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_cached: int = 0
    num_drawn: int = 0
    num_encoded: int = 0
    encoder_seconds: float = 0.0
    num_preempted: int = 0
    num_failed: int = 0
    num_finished: int = 0
