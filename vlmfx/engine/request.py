"""What a request asks for and what it gets back: SamplingParams, RequestOutput and their parts, under vLLM's names.

Plain Python, no torch: the server and the command line validate a request before any model is loaded.
Source of names, defaults and ranges: vllm-project/vllm: vllm/sampling_params.py, vllm/outputs.py, vllm/logprobs.py.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from vlmfx.errors import InvalidRequest, VlmfxError, shown

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 512  # what max_tokens=None allows at most


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw the tokens of one request and when to stop; frozen, and valid once built.

    temperature 0 is greedy, and then top_k, top_p, min_p and seed play no part. top_k 0 or -1, top_p 1 and min_p 0 are
    off. seed None (or -1, as in vLLM) lets the engine choose. max_tokens None is min(512, rest of the context): see
    `token_budget`. stop and stop_token_ids are stored as tuples, top_k -1 as 0. Raises InvalidRequest."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        def store(field: str, value: Any) -> None:
            object.__setattr__(self, field, value)

        store("temperature", _number("temperature", self.temperature, 0.0, math.inf, "0 is greedy, 1 the model's own"))
        store("top_p", _number("top_p", self.top_p, 0.0, 1.0, "1 keeps every token", above=True))
        store("min_p", _number("min_p", self.min_p, 0.0, 1.0, "0 keeps every token"))
        store("top_k", max(0, _integer("top_k", self.top_k, -1, None, "0 keeps every token")))
        if self.seed is not None:
            seed = _integer("seed", self.seed, -(2**63), 2**64 - 1, "leave it out to let the engine choose")
            store("seed", None if seed == -1 else seed)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "True or False", "leave it out for the default")
        store("stop", _stop_strings(self.stop))
        if self.stop and not self.detokenize:
            _refuse("stop", self.stop, "no stop strings with detokenize=False", "use stop_token_ids or detokenize=True")
        store("stop_token_ids", _token_ids(self.stop_token_ids))
        store("min_tokens", _integer("min_tokens", self.min_tokens, 0, None, "0 allows a stop at once"))
        if self.max_tokens is not None:
            hint = "None allows up to 512 or the rest of the context"
            store("max_tokens", _integer("max_tokens", self.max_tokens, 1, None, hint))
            if self.min_tokens > self.max_tokens:
                limit = f"an integer of at most max_tokens, which is {shown(self.max_tokens)}"
                _refuse("min_tokens", self.min_tokens, limit, "lower min_tokens or raise max_tokens")
        if self.logprobs is not None:
            hint = "None asks for none, 0 for the sampled token's alone"
            store("logprobs", _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, hint))

    @classmethod
    def greedy(cls, **overrides: Any) -> SamplingParams:
        """What `sampling_params=None` means: temperature 0, to EOS or min(512, rest of the context)."""
        return cls(**{"temperature": 0.0, "max_tokens": None, **overrides})

    def token_budget(self, context_left: int) -> int:
        """The most tokens to generate when the context has room for context_left more."""
        return min(DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens, context_left)


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

    taps: the values asked for, by name, on the CPU and in the model's dtype, see `vlmfx.engine.taps.tap`; None where none were."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    error: VlmfxError | None = None
    taps: dict[str, Tensor] | None = None

    @classmethod
    def failed(
        cls, request_id: str, error: VlmfxError, *, prompt: str | None = None, prompt_token_ids: Sequence[int] = ()
    ) -> RequestOutput:
        """The result of a request that could not be served: one output, empty text, finish_reason "error"."""
        output = CompletionOutput(index=0, text="", token_ids=(), finish_reason="error")
        return cls(request_id, prompt, list(prompt_token_ids), [output], finished=True, error=error)


def _refuse(field: str, found: object, expected: str, remedy: str) -> NoReturn:
    raise InvalidRequest(field, f"found {shown(found)} but need {expected}; {remedy}.", found=found, expected=expected)


def _number(field: str, value: object, low: float, high: float, remedy: str, *, above: bool = False) -> float:
    """value as a float in [low, high], or (low, high] where above; numpy's scalars count as numbers, bool does not."""
    span = f"of at least {low:g}" if high == math.inf else f"in {'(' if above else '['}{low:g}, {high:g}]"
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and low <= number <= high and not (above and number == low):
            return number
    _refuse(field, value, f"a finite number {span}", remedy)


def _integer(field: str, value: object, low: int, high: int | None, remedy: str) -> int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        integer = int(value)
        if low <= integer and (high is None or integer <= high):
            return integer
    span = f"of at least {low}" if high is None else f"from {low} to {high}"
    _refuse(field, value, f"an integer {span}", remedy)


def _stop_strings(stop: object) -> tuple[str, ...]:
    strings = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, (list, tuple)):
        _refuse("stop", stop, "a string or a list of strings", "wrap the stop strings in a list")
    for string in strings:
        if not isinstance(string, str) or not string:
            _refuse("stop", string, "strings of at least one character", "an empty one would stop before any token")
    return tuple(strings)


def _token_ids(ids: object) -> tuple[int, ...]:
    if ids is None:
        return ()
    if not isinstance(ids, (list, tuple)):
        _refuse("stop_token_ids", ids, "a list of token ids", "wrap a single id in a list")
    return tuple(dict.fromkeys(_integer("stop_token_ids", i, 0, None, "look ids up in the tokenizer") for i in ids))
