"""Sequence: one running request, from its first sampled token to its RequestOutput."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from vlmfx.checkpoint import Model
from vlmfx.engine.request import CompletionOutput, Logprob, RequestMetrics, RequestOutput, SamplingParams
from vlmfx.engine.stopping import StopChecker, StopStep
from vlmfx.engine.taps import tap
from vlmfx.errors import VlmfxError
from vlmfx.processing.detokenizer import IncrementalDetokenizer
from vlmfx.processing.inputs import ModelInputs


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A request whose prompt's length is known, and whose pixels `load` makes once there is room for it.

    number names it; arrival is when the user asked, by time.perf_counter; prompt is its text, where it has one; taps names the
    values that its output is to carry."""

    number: int
    num_tokens: int
    load: Callable[[], ModelInputs]
    params: SamplingParams
    arrival: float
    prompt: str | None = None
    taps: tuple[str, ...] = ()

    @classmethod
    def ready(cls, number: int, inputs: ModelInputs, params: SamplingParams, arrival: float) -> Request:
        """The request of inputs that are there."""
        return cls(
            number=number,
            num_tokens=len(inputs.token_ids),
            load=lambda: inputs,
            params=params,
            arrival=arrival,
            prompt=inputs.prompt,
        )

    def max_tokens(self, model: Model) -> int:
        """The most tokens this request may generate."""
        return self.params.token_budget(model.max_model_len - self.num_tokens)

    def max_len(self, model: Model) -> int:
        """The most tokens prompt and answer may have together."""
        return self.num_tokens + self.max_tokens(model)

    def failed(self, error: VlmfxError) -> RequestOutput:
        """The result of a request that could not be served."""
        return RequestOutput.failed(str(self.number), error, prompt=self.prompt)


class Sequence:
    """The host's side of a running request: its tokens, its text, and whether it is done. Raises what loading its pixels raises."""

    def __init__(self, model: Model, request: Request) -> None:
        params = request.params
        self.number, self.failed = request.number, request.failed
        self.inputs = request.load()
        self.params = params
        self.max_len = request.max_len(model)
        taps = tap(model, self.inputs, request.taps, max_len=self.max_len)
        self._taps = {name: value.cpu() for name, value in taps.items()} if request.taps else None
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] = []
        self.end: StopStep | None = None
        self._tokenizer = model.processor.tokenizer
        self._stop = StopChecker(params, eos_token_ids=model.eos_token_ids, max_tokens=request.max_tokens(model))
        self._detokenizer = IncrementalDetokenizer(self._tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._text: list[str] = []
        self._arrival = request.arrival
        self._first_token_at = 0.0

    @property
    def context_len(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.inputs.token_ids) + len(self.token_ids)

    @property
    def next_position(self) -> int:
        """The position of the newest token, which the next decode step reads."""
        return self.inputs.next_position + len(self.token_ids) - 1

    def push(self, token_id: int, candidates: dict[int, tuple[float, int]] | None) -> str:
        """Take a sampled token; returns the text that can be shown now. `end` is set once it was the last."""
        if not self.token_ids:
            self._first_token_at = time.perf_counter()
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

    def output(self) -> RequestOutput:
        """The finished request's result."""
        assert self.end is not None, "output of a request that is still running"
        now = time.perf_counter()
        chosen = [entry[token].logprob for entry, token in zip(self.logprobs, self.token_ids, strict=False)]
        completion = CompletionOutput(
            index=0,
            text="".join(self._text),
            token_ids=tuple(self.token_ids),
            cumulative_logprob=sum(chosen) if self.params.logprobs is not None else None,
            logprobs=self.logprobs if self.params.logprobs is not None else None,
            finish_reason=self.end.finish_reason,
            stop_reason=self.end.stop_reason,
        )
        metrics = RequestMetrics(
            prompt_tokens=len(self.inputs.token_ids),
            output_tokens=len(self.token_ids),
            time_to_first_token_s=self._first_token_at - self._arrival,
            decode_s=now - self._first_token_at,
        )
        return RequestOutput(
            request_id=str(self.number),
            prompt=self.inputs.prompt,
            prompt_token_ids=self.inputs.token_ids,
            outputs=[completion],
            finished=True,
            metrics=metrics,
            taps=self._taps,
        )
