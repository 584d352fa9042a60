"""Partial: a request's events put together to what it has given so far."""

from __future__ import annotations

from dataclasses import replace

from vlmfx.engine.events import Event
from vlmfx.engine.request import CompletionOutput, RequestOutput


class Partial:
    """The outputs grow in place; `output` gives copies."""

    def __init__(self) -> None:
        self._last: Event | None = None
        self._outputs: dict[int, CompletionOutput] = {}

    def add(self, event: Event) -> None:
        self._last = event
        params = event.request.params
        if event.index not in self._outputs:
            wants_logprobs = params.logprobs is not None
            self._outputs[event.index] = CompletionOutput(event.index, "", (), logprobs=[] if wants_logprobs else None)
        so_far = self._outputs[event.index]
        so_far.text += event.text
        so_far.token_ids += event.token_ids
        if so_far.logprobs is not None:
            so_far.logprobs += event.logprobs
        so_far.finish_reason, so_far.stop_reason = event.finish_reason, event.stop_reason

    def output(self) -> RequestOutput:
        """All of it by now, its prompt's tokens not among it. To be called after an event."""
        assert self._last is not None
        request = self._last.request
        outputs = [
            replace(one, logprobs=None if one.logprobs is None else [*one.logprobs])
            for _, one in sorted(self._outputs.items())
        ]
        return RequestOutput(str(request.number), request.prompt, [], outputs, finished=False)
