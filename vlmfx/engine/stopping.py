"""When one request ends, and which of its text may be streamed meanwhile. Plain Python, no tensors.

Semantics follow vllm-project/vllm: vllm/v1/core/sched/utils.py: check_stop (tokens and lengths) and
vllm/v1/engine/detokenizer.py (strings), with two differences: text is held back only while it is the beginning of a
stop string, not always by the longest one's length; and min_tokens holds for EOS here too, whether or not a mask
(`vlmfx.engine.token_rules`) keeps it from being drawn: where no other token is left it is drawn, and ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from vlmfx.engine.request import FinishReason, SamplingParams


@dataclass(frozen=True)
class StopStep:
    """What one token led to: text to emit now, and why the request is over, if it is.

    stop_reason: the stop string or the stop token id; None for EOS, for a length and while going on."""

    text: str
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class StopChecker:
    """Fed a request's tokens one at a time, says what to emit and when to end; the pieces of text add up to its text.

    Nothing emitted is ever taken back. The text ends before the stop string that is complete first (of several that
    are complete at the same character, the first listed), or after it with include_stop_str_in_output. The text of an
    EOS or stop token itself is left out, or kept with the same flag. A stop string that completes in the first
    min_tokens tokens, or an EOS or stop token among them, does not stop. A stop wins over a length reached by the
    same token.

    max_tokens is what params.token_budget gave: the end of the context is in it."""

    def __init__(self, params: SamplingParams, *, eos_token_ids: Collection[int], max_tokens: int) -> None:
        assert max_tokens > 0, f"max_tokens is {max_tokens}: admission lets no request in that has no room"
        self.num_tokens = 0
        self.finished = False
        self._max_tokens = max_tokens
        self._min_tokens = params.min_tokens
        self._eos = frozenset(() if params.ignore_eos else eos_token_ids)
        self._stop_ids = frozenset(params.stop_token_ids or ())
        self._include = params.include_stop_str_in_output
        self._matchers = [_Matcher(string) for string in params.stop or ()]
        self._held = ""  # seen and not emitted: the beginning of a stop string

    def ending(self, token_id: int) -> Literal["stop", "length"] | None:
        """Whether this next token is the last one, whatever its text."""
        if self.num_tokens >= self._min_tokens and (token_id in self._eos or token_id in self._stop_ids):
            return "stop"
        return "length" if self.num_tokens + 1 >= self._max_tokens else None

    def step(self, token_id: int, text: str = "", before: str = "") -> StopStep:
        """token_id is the next token, text what it added to the decoded text (empty in the middle of a character).

        before is text of the tokens before it that was held back until now, as only a last token settles it."""
        assert not self.finished, "step after the end"
        self.num_tokens += 1
        may_stop = self.num_tokens > self._min_tokens
        is_eos = may_stop and token_id in self._eos
        is_stop_id = may_stop and token_id in self._stop_ids
        if (is_eos or is_stop_id) and not self._include:
            text = ""
        text = before + text
        for at, char in enumerate(text, start=len(self._held) + 1):
            # Every matcher sees every character, found or not: a string found too early must not blind the others.
            complete = [m.pattern for m in self._matchers if m.feed(char)]
            if complete and may_stop:
                cut = at if self._include else at - len(complete[0])
                return self._end((self._held + text)[:cut], "stop", complete[0])
        if is_eos:
            return self._end(self._held + text, "stop", None)
        if is_stop_id:
            return self._end(self._held + text, "stop", token_id)
        if self.num_tokens >= self._max_tokens:
            return self._end(self._held + text, "length", None)
        text = self._held + text
        hold = 0 if self._include else max((m.matched for m in self._matchers), default=0)
        self._held = text[len(text) - hold :]
        return StopStep(text[: len(text) - hold])

    def flush(self) -> str:
        """The text held back, for a request that is ended from outside (an abort, a deadline); it takes no more."""
        return self._end(self._held, None, None).text

    def _end(self, text: str, finish_reason: FinishReason | None, stop_reason: int | str | None) -> StopStep:
        self.finished, self._held = True, ""
        return StopStep(text, finish_reason, stop_reason)


@dataclass
class _Matcher:
    """Finds pattern in a stream of characters in constant time a character (Knuth, Morris and Pratt, 1977).

    matched: how long a beginning of pattern the stream ends in now, always short of the whole."""

    pattern: str
    matched: int = 0
    _shorter: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._shorter = _borders(self.pattern)

    def feed(self, char: str) -> bool:
        """Whether an occurrence of pattern ends with this character."""
        self.matched = self._extend(self.matched, char)
        if self.matched < len(self.pattern):
            return False
        self.matched = self._shorter[-1]
        return True

    def _extend(self, length: int, char: str) -> int:
        return _extended(self.pattern, self._shorter, length, char)


@lru_cache(maxsize=1024)
def _borders(pattern: str) -> tuple[int, ...]:
    """[i]: the length of the longest proper border of pattern[: i + 1]. Kept, as the n answers of a request look for the same."""
    borders = [0]
    for char in pattern[1:]:
        borders.append(_extended(pattern, borders, borders[-1], char))
    return tuple(borders)


def _extended(pattern: str, borders: Sequence[int], length: int, char: str) -> int:
    """How long a beginning of pattern ends in char, after one of this length."""
    while length and pattern[length] != char:
        length = borders[length - 1]
    return length + (pattern[length] == char)
