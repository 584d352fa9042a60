"""TokenRules: what one sequence's parameters and tokens say of its next token, beyond its logits. On the host, in numpy."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from vlmfx.engine.grammar import Grammar
from vlmfx.engine.sampling_params import SamplingParams, check_vocab
from vlmfx.engine.token_mask import Mask, every_token, forbid, mask_of
from vlmfx.errors import InvalidRequest, shown
from vlmfx.processing.tokenizer import Tokenizer


class TokenRules:
    """Which tokens may come next in one sequence, what is added to logits, and the tokens that penalties count.

    Made once, at admission, with the grammar of params.structured_outputs at its start; `accept` each token that is drawn, in order, as
    long as the sequence goes on. Source of what they mean: vllm-project/vllm: vllm/v1/sample/. Two differences: a bad word is forbidden
    both with and without a space before it, also where the two have different numbers of tokens; and a mask that would leave no token
    gives up min_tokens first, and then raises.

    Raises InvalidRequest for ids beyond the vocabulary, for a bad word without tokens, and, now or in `mask`, where the rules together
    leave no token."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Collection[int],
        grammar: Grammar | None = None,
    ) -> None:
        check_vocab(params, vocab_size)
        assert (grammar is None) == (params.structured_outputs is None), "a form has a grammar, of a GrammarCompiler"
        self.params, self._grammar = params, grammar
        words = list(_bad_words(params.bad_words or (), tokenizer))
        self._words = [ids for ids in words if len(ids) > 1]
        # What the tokens so far do not change.
        self._allowed: Mask | None = None
        if params.allowed_token_ids is not None or len(self._words) < len(words):
            ids = params.allowed_token_ids
            self._allowed = every_token(vocab_size) if ids is None else mask_of(ids, vocab_size)
            forbid(self._allowed, [ids[0] for ids in words if len(ids) == 1])
        # Also with ignore_eos, as in vLLM: what is ignored should not be drawn either.
        self._stops = sorted({*eos_token_ids, *(params.stop_token_ids or ())}) if params.min_tokens else []
        self._answer: list[int] = []
        self._history: NDArray[np.int32] | None = None
        if self.has_penalties:
            self._history = np.array(prompt_ids, np.int32)
        self.prompt_len = len(prompt_ids)
        self.bias_ids = np.array([*(params.logit_bias or ())], np.int32)
        self.bias = np.array([*(params.logit_bias or {}).values()], np.float32)
        self._vocab_size = vocab_size
        # By whether stops are forbidden; where the tokens matter, of the tokens so far.
        self._masks: dict[bool, Mask | None] = {}
        self.mask()

    @property
    def needs_host(self) -> bool:
        """Whether the next token can only be planned when the last one is known here, not on the device alone."""
        return bool(self._words) or self._grammar is not None

    @property
    def has_penalties(self) -> bool:
        p = self.params
        return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0

    @property
    def history(self) -> NDArray[np.int32]:
        """Prompt and answer, where there are penalties; else nothing."""
        if self._history is None:
            return np.empty(0, np.int32)
        return self._history[: self.prompt_len + len(self._answer)]

    def accept(self, token_id: int) -> None:
        """Take the token that was drawn."""
        if self._history is not None:
            end = self.prompt_len + len(self._answer)
            if end == len(self._history):
                self._history = np.concatenate([self._history, np.empty(max(64, end // 2), np.int32)])
            self._history[end] = token_id
        self._answer.append(token_id)
        if self.needs_host:
            if self._grammar is not None:
                self._grammar.accept(token_id)
            self._masks.clear()  # the next one is made while the model computes the logits that it is for

    def mask(self, *, is_ahead: bool = False) -> Mask | None:
        """The tokens that may come next, None for all; not to be written to. is_ahead: one more token has been drawn and is not
        accepted yet. Raises InvalidRequest."""
        assert not (is_ahead and self.needs_host), "the next token depends on one that is not known yet"
        forbids_stops = len(self._answer) + is_ahead < self.params.min_tokens
        if forbids_stops not in self._masks:
            self._masks[forbids_stops] = self._mask(forbids_stops)
        return self._masks[forbids_stops]

    def copy(self) -> TokenRules:
        """Of the same sequence, to go on by itself: another of n answers."""
        other = copy.copy(self)
        other._answer, other._masks = self._answer.copy(), self._masks.copy()
        other._history = None if self._history is None else self._history.copy()
        other._grammar = None if self._grammar is None else self._grammar.copy()
        return other

    def _mask(self, forbids_stops: bool) -> Mask | None:
        ends = [last for *before, last in self._words if before == self._answer[len(self._answer) - len(before) :]]
        if self._allowed is None and self._grammar is None and not ends and not forbids_stops:
            return None
        mask = every_token(self._vocab_size) if self._grammar is None else self._grammar.mask()
        if self._allowed is not None:
            mask &= self._allowed
        forbid(mask, ends)
        if not mask.any():
            rules = ("allowed_token_ids", "bad_words", "structured_outputs")
            names = [name for name in rules if getattr(self.params, name)]
            found = f"{' and '.join(names)} leave no token to draw as number {len(self._answer) + 1}"
            raise InvalidRequest(names[0], f"{found}; allow more tokens.")
        if forbids_stops:
            before = mask.copy()
            forbid(mask, self._stops)
            return mask if mask.any() else before
        return mask


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The tokens of each word, and of the word after a space where they are others. Raises InvalidRequest."""
    for word in words:
        plain = tokenizer.encode(word.lstrip(), add_special_tokens=False)
        if not plain:
            raise InvalidRequest("bad_words", f"{shown(word)} has no tokens; leave it out.", found=word)
        yield plain
        spaced = tokenizer.encode(f" {word.lstrip()}", add_special_tokens=False)
        if spaced and spaced != plain:
            yield spaced
