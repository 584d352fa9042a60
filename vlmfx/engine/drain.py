"""drain: requests through an engine until all are done; run: through an engine of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from vlmfx.checkpoint import Model
from vlmfx.compile.executor import EagerExecutor, Executor
from vlmfx.compile.layout import CacheLayout
from vlmfx.engine import runner
from vlmfx.engine.engine import Engine
from vlmfx.engine.events import Output
from vlmfx.engine.request import RequestOutput
from vlmfx.engine.sequence import Request
from vlmfx.errors import VlmfxError

OnText = Callable[[int, str], None]  # (request number, its new text)


def run(
    model: Model,
    requests: Sequence[Request],
    *,
    max_num_seqs: int,
    max_tokens: int = runner.MAX_TOKENS,
    executor: Executor | None = None,
    on_text: OnText = lambda number, text: None,
) -> Iterator[RequestOutput]:
    """The outputs of requests for texts as they finish, by an engine of their own; at most max_tokens of prompts are computed in a step.

    executor: by default the functions as they are, with a cache that holds max_num_seqs of the longest request."""
    if not requests:
        return
    if executor is None:
        longest = max(r.max_len(model.max_model_len) for r in requests)
        layout = CacheLayout.of(min(max_num_seqs, len(requests)), longest)
        executor = EagerExecutor(model.program_set, model.params, layout=layout)
    engine = Engine(model, executor, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_tokens)
    try:
        for output in drain(engine, requests, on_text):
            assert isinstance(output, RequestOutput), "requests for vectors go to an engine"
            yield output
    finally:
        engine.close()


def drain(engine: Engine, requests: Sequence[Request], on_text: OnText) -> Iterator[Output]:
    """The outputs of requests as they finish, in an engine that has no others; one that cannot be served has its error in it.

    Where the caller stops, or on_text raises, those that are left are ended."""
    mine = {request.number for request in requests}
    try:
        for request in requests:
            try:
                engine.add(request)
            except VlmfxError as error:
                mine.remove(request.number)
                yield request.failed(error)
        while engine.has_work:
            for event in engine.step():
                if event.text:
                    on_text(event.request.number, event.text)
                if event.output is not None:
                    mine.remove(event.request.number)
                    yield event.output
    finally:
        for number in mine:
            engine.abort(number)
        if mine:
            engine.step()
