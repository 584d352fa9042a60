"""Completion: the host's side of one text that is being generated: its tokens, its text, and whether it is done."""

from __future__ import annotations

from vlmfx.checkpoint import Model
from vlmfx.engine.request import CompletionOutput, Logprob, SamplingParams
from vlmfx.engine.stopping import StopChecker, StopStep
from vlmfx.processing.detokenizer import IncrementalDetokenizer


class Completion:
    """Text number `index` of a request, of at most max_tokens tokens."""

    def __init__(self, model: Model, params: SamplingParams, index: int, max_tokens: int) -> None:
        self.params, self.index = params, index
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] = []
        self.end: StopStep | None = None
        self._tokenizer = model.processor.tokenizer
        self._stop = StopChecker(params, eos_token_ids=model.eos_token_ids, max_tokens=max_tokens)
        self._detokenizer = IncrementalDetokenizer(self._tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._text: list[str] = []

    @property
    def text(self) -> str:
        """What may be shown by now."""
        return "".join(self._text)

    def push(self, token_id: int, candidates: dict[int, tuple[float, int]] | None) -> str:
        """Take a sampled token; returns the text that can be shown now. `end` is set once it was the last."""
        self.token_ids.append(token_id)
        if candidates is not None:
            self.logprobs.append(
                {
                    i: Logprob(value, rank, self._tokenizer.decode([i], skip_special_tokens=False))
                    for i, (value, rank) in candidates.items()
                }
            )
        before, text = self._new_text(token_id)
        step = self._stop.step(token_id, text, before)
        if step.finish_reason is not None:
            self.end = step
        self._text.append(step.text)
        return step.text

    def cut(self) -> str:
        """End it from outside, an abort or a deadline; returns text that was held back."""
        text = self._detokenizer.finish() if self.params.detokenize else ""
        text = self._stop.flush() + text
        self._text.append(text)
        self.end = StopStep(text, "abort")
        return text

    def _new_text(self, token_id: int) -> tuple[str, str]:
        """(what earlier tokens left open, the token's own text); a last token closes what is open."""
        if not self.params.detokenize:
            return "", ""
        ending = self._stop.ending(token_id)
        if ending == "stop":
            before = self._detokenizer.finish()
            return before, self._detokenizer.push(token_id) + self._detokenizer.finish()
        text = self._detokenizer.push(token_id)
        return "", text + self._detokenizer.finish() if ending == "length" else text

    def output(self) -> CompletionOutput:
        """What it is by now."""
        wants_logprobs = self.params.logprobs is not None
        chosen = [entry[token].logprob for entry, token in zip(self.logprobs, self.token_ids, strict=False)]
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=tuple(self.token_ids),
            cumulative_logprob=sum(chosen) if wants_logprobs else None,
            logprobs=list(self.logprobs) if wants_logprobs else None,
            finish_reason=self.end.finish_reason if self.end is not None else None,
            stop_reason=self.end.stop_reason if self.end is not None else None,
        )
