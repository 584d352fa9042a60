"""What a request gets back: RequestOutput and its parts, under vLLM's names; what it asks for, SamplingParams, beside them.

Plain Python, no torch: the server and the command line validate a request before any model is loaded.
Source of names and defaults: vllm-project/vllm: vllm/outputs.py, vllm/logprobs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vlmfx.engine.sampling_params import SamplingParams as SamplingParams
from vlmfx.errors import VlmfxError

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass
class Logprob:
    """One candidate at one position; rank 1 is the most likely. Taken before temperature and filters."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One generated text. stop_reason: the stop string or stop token id that ended it, None for EOS and all else.

    logprobs has one dict a token, by token id, the sampled one among them; None where none were asked for."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """Counts, and seconds: from arrival to the first token, and from there to the last; None if there was no token."""

    prompt_tokens: int
    output_tokens: int
    time_to_first_token_s: float | None = None
    decode_s: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the tokens after the first; 0 where there were none."""
        return (self.output_tokens - 1) / self.decode_s if self.decode_s and self.output_tokens > 1 else 0.0

    @property
    def speed(self) -> str:
        """ "first token after 12 ms, then 90 tokens per second"."""
        if self.time_to_first_token_s is None:
            return "no token"
        return f"first token after {self.time_to_first_token_s * 1e3:.0f} ms, then {self.tokens_per_second:.0f} tokens per second"


@dataclass
class RequestOutput:
    """A request and all it has produced so far. error is set where it failed; its batch mates are not affected.

    prompt_logprobs: None, then a dict a prompt token, by token id, the token itself among them; None where none were asked for.
    taps: the values asked for, by name, on the CPU and in the model's dtype, see `vlmfx.engine.taps.tap`; None where none were."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    error: VlmfxError | None = None
    taps: dict[str, Tensor] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @classmethod
    def failed(
        cls, request_id: str, error: VlmfxError, *, prompt: str | None = None, prompt_token_ids: Sequence[int] = ()
    ) -> RequestOutput:
        """The result of a request that could not be served: one output, empty text, finish_reason "error"."""
        output = CompletionOutput(index=0, text="", token_ids=(), finish_reason="error")
        return cls(request_id, prompt, list(prompt_token_ids), [output], finished=True, error=error)
