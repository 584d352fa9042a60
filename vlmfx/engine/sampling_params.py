"""SamplingParams: how the tokens of one request are drawn, under vLLM's names. Plain Python, no torch.

Source of names, defaults and ranges: vllm-project/vllm: vllm/sampling_params.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

from vlmfx.engine.fields import boolean, integer, number, refuse, refuse_absent, strings, token_ids
from vlmfx.engine.structured_outputs import StructuredOutputsParams
from vlmfx.errors import InvalidRequest, shown

MAX_LOGPROBS = 20
MAX_N = 128  # OpenAI's limit; vLLM's default is 16,384, of which each would take rows and blocks of the cache
MAX_STRINGS = 128  # of stop, and of bad_words, as vLLM's default for these
MAX_CHARS = 8192  # of all of them together, as each takes time of every step
MAX_LOGIT_BIAS = 1024
DEFAULT_MAX_TOKENS = 512  # what max_tokens=None allows at most
ABSENT = frozenset({
    "best_of", "use_beam_search", "length_penalty", "early_stopping", "prompt_logprob_token_ids", "prompt_logprob_start",
    "logprob_token_ids", "flat_logprobs", "spaces_between_special_tokens", "output_kind", "stream_interval", "skip_clone",
    "extra_args", "skip_reading_prefix_cache", "thinking_token_budget", "repetition_detection", "routed_experts_prompt_start",
    "trace_decode_token_ids", "logits_processors", "truncate_prompt_tokens",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw the tokens of one request and when to stop; frozen, and valid once built.

    n answers are drawn, at most 128; more than one needs a temperature above 0. temperature 0 is greedy, and then top_k, top_p, min_p
    and seed play no part. top_k 0 or -1, top_p 1 and min_p 0 are off. seed None (or -1, as in vLLM) lets the engine choose. max_tokens
    None is min(512, rest of the context): see `token_budget`.

    presence_penalty and frequency_penalty (-2 to 2, 0 is off) count tokens of the answer, repetition_penalty (above 0, 1 is off) those of
    prompt and answer. logit_bias: token id, or its text, to what is added to its logit, cut to ±100. bad_words: of each, the last token
    is not drawn where it would complete the word, with or without a space before it. allowed_token_ids: all others are not drawn.
    min_tokens: EOS and stop tokens are not drawn before. structured_outputs: the form of the text; guided_decoding is its older name.

    Lists are stored as tuples, logit_bias as a new dict by integers, top_k -1 as 0. What vLLM has beyond these is refused by name.
    Raises InvalidRequest."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    logit_bias: Mapping[int, float] | Mapping[str, float] | None = field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    guided_decoding: InitVar[StructuredOutputsParams | None] = None

    def __new__(cls, **options: Any) -> SamplingParams:
        refuse_absent(options, ABSENT)
        return super().__new__(cls)

    def __post_init__(self, guided_decoding: StructuredOutputsParams | None) -> None:
        def store(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        store("n", integer("n", self.n, 1, MAX_N, "send more requests for more answers"))
        store("temperature", number("temperature", self.temperature, 0.0, math.inf, "0 is greedy, 1 the model's own"))
        if self.n > 1 and not self.temperature:
            refuse("n", self.n, "1 with temperature 0", "greedy answers are all the same, so raise the temperature")
        store("top_p", number("top_p", self.top_p, 0.0, 1.0, "1 keeps every token", above=True))
        store("min_p", number("min_p", self.min_p, 0.0, 1.0, "0 keeps every token"))
        store("top_k", max(0, integer("top_k", self.top_k, -1, None, "0 keeps every token")))
        for name in ("presence_penalty", "frequency_penalty"):
            store(name, number(name, getattr(self, name), -2.0, 2.0, "0 is off"))
        penalty = number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, "1 is off", above=True)
        store("repetition_penalty", penalty)
        if self.seed is not None:
            seed = integer("seed", self.seed, -(2**63), 2**64 - 1, "leave it out to let the engine choose")
            store("seed", None if seed == -1 else seed)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize"):
            boolean(name, getattr(self, name))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        hint = "an empty one would stop before any token"
        store("stop", strings("stop", () if stop is None else stop, hint, most=MAX_STRINGS, most_chars=MAX_CHARS))
        if self.stop and not self.detokenize:
            refuse("stop", self.stop, "no stop strings with detokenize=False", "use stop_token_ids or detokenize=True")
        for name in ("stop_token_ids", "allowed_token_ids"):
            if getattr(self, name) is not None:
                store(name, token_ids(name, getattr(self, name)))
        store("stop_token_ids", self.stop_token_ids or ())
        if self.allowed_token_ids == ():
            refuse("allowed_token_ids", [], "at least one id", "leave it out to allow every token")
        hint = "an empty one would forbid every token"
        store("bad_words", strings("bad_words", self.bad_words or (), hint, most=MAX_STRINGS, most_chars=MAX_CHARS))
        store("min_tokens", integer("min_tokens", self.min_tokens, 0, None, "0 allows a stop at once"))
        if self.max_tokens is not None:
            hint = "None allows up to 512 or the rest of the context"
            store("max_tokens", integer("max_tokens", self.max_tokens, 1, None, hint))
            if self.min_tokens > self.max_tokens:
                limit = f"an integer of at most max_tokens, which is {shown(self.max_tokens)}"
                refuse("min_tokens", self.min_tokens, limit, "lower min_tokens or raise max_tokens")
        for name, one in (("logprobs", "the sampled token's"), ("prompt_logprobs", "the prompt tokens' own")):
            if getattr(self, name) is not None:
                hint = f"None asks for none, 0 for {one} alone"
                store(name, integer(name, getattr(self, name), 0, MAX_LOGPROBS, hint))
        if self.logit_bias is not None:
            store("logit_bias", _bias(self.logit_bias) or None)
        self._store_form(guided_decoding)

    def _store_form(self, guided_decoding: StructuredOutputsParams | None) -> None:
        both = {"structured_outputs": self.structured_outputs, "guided_decoding": guided_decoding}
        for name, value in both.items():
            if value is not None and not isinstance(value, StructuredOutputsParams):
                refuse(name, value, "a StructuredOutputsParams", "write StructuredOutputsParams(json=...) or its like")
        if guided_decoding is not None:
            if self.structured_outputs is not None:
                refuse("guided_decoding", guided_decoding, "no second form", "leave it out beside structured_outputs")
            object.__setattr__(self, "structured_outputs", guided_decoding)

    @property
    def has_rules(self) -> bool:
        """Whether anything but temperature and filters decides the next token."""
        given = (self.logit_bias, self.bad_words, self.allowed_token_ids, self.structured_outputs, self.min_tokens)
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        return any(given) or any(penalties)

    @classmethod
    def greedy(cls, **overrides: Any) -> SamplingParams:
        """What `sampling_params=None` means: temperature 0, to EOS or min(512, rest of the context)."""
        return cls(**{"temperature": 0.0, "max_tokens": None, **overrides})

    def token_budget(self, context_left: int) -> int:
        """The most tokens to generate when the context has room for context_left more."""
        return min(DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens, context_left)


def check_vocab(params: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidRequest for ids whose logits a model of vocab_size logits does not have; a stop token may be one that never comes."""
    for name in ("logit_bias", "allowed_token_ids"):
        for i in getattr(params, name) or ():
            if i >= vocab_size:
                refuse(name, i, f"ids below {vocab_size}, the model's vocabulary", "look ids up in the tokenizer")


def _bias(given: object) -> dict[int, float]:
    """Token ids to what is added to their logits."""
    if not isinstance(given, Mapping):
        refuse("logit_bias", given, "a dict of token ids to numbers", "write {token id: bias}")
    if len(given) > MAX_LOGIT_BIAS:
        message = f"found {len(given)} ids but need at most {MAX_LOGIT_BIAS}; leave some out."
        raise InvalidRequest("logit_bias", message, found=given, expected=MAX_LOGIT_BIAS)
    biases = {}
    for key, value in given.items():
        # Of digits alone: int() would take " 7", "1_0" and digits of other scripts, too.
        is_text = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20
        token = integer("logit_bias", int(key) if is_text else key, 0, None, "write ids as integers or as their digits")
        if token in biases:
            refuse("logit_bias", key, "each token id once", "leave one of the two out")
        bias = number("logit_bias", value, -math.inf, math.inf, "beyond ±100 it counts as ±100")
        biases[token] = min(100.0, max(-100.0, bias))
    return biases
