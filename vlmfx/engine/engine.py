"""The loop: admit requests while rows are free, decode all running ones a token, retire those that are done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from vlmfx.checkpoint import Model
from vlmfx.compile.executor import Executor
from vlmfx.compile.programs import Sampling
from vlmfx.engine import runner, sequence
from vlmfx.engine.request import RequestOutput
from vlmfx.engine.sampler import logprobs, state
from vlmfx.engine.sequence import Request
from vlmfx.errors import as_vlmfx_error

OnText = Callable[[int, str], None]  # (request number, its new text)


@torch.no_grad()  # as a decorator: a `with` in a generator would hold for its caller, too
def run(
    model: Model,
    requests: Sequence[Request],
    *,
    max_num_seqs: int,
    max_tokens: int = runner.MAX_TOKENS,
    executor: Executor | None = None,
    on_text: OnText = lambda number, text: None,
) -> Iterator[RequestOutput]:
    """The outputs of the requests as they finish; request_id is a request's number.

    At most max_num_seqs run at once, in rows 0, 1, ... of one cache; the last running row moves into a row that becomes free. Those
    that start together have at most max_tokens. One whose pixels cannot be loaded, or whose prefill fails, fails alone."""
    if not requests:
        return
    executor = executor or model.executor
    with executor.alone():
        yield from _run(model, requests, executor, max_num_seqs, max_tokens, on_text)


def _run(
    model: Model, requests: Sequence[Request], executor: Executor, max_num_seqs: int, max_tokens: int, on_text: OnText
) -> Iterator[RequestOutput]:
    waiting, one_by_one = deque(requests), 0
    longest = max(r.max_len(model) for r in requests)
    num_rows = min(max_num_seqs, len(requests), _most_rows(executor))
    if executor.plan is not None and executor.plan.prefill:
        max_tokens = min(max_tokens, executor.plan.prefill[-1])
    running: list[sequence.Sequence] = []
    ids = torch.empty(0, dtype=torch.int64, device=model.device)
    cache = executor.cache(num_rows, longest)
    while waiting or running:
        if waiting and len(running) < num_rows:
            admitted = _admit(waiting, 1 if one_by_one else num_rows - len(running), max_tokens)
            one_by_one = max(0, one_by_one - 1)
            new = []
            for request in admitted:
                try:
                    new.append(sequence.Sequence(model, request))
                except Exception as error:
                    yield request.failed(as_vlmfx_error(error, "the prompt could not be prepared"))
            if not new:
                continue
            try:
                prompts, max_lens = [s.inputs for s in new], [s.max_len for s in new]
                next_ids, logits = runner.prefill(
                    model, prompts, max_lens, cache, len(running), _sampling(model, new), executor
                )
            except Exception as error:  # out of memory, most likely: again, one at a time, so that only the cause fails
                if len(admitted) > 1:
                    waiting.extendleft(reversed([r for r in admitted if r.number in {s.number for s in new}]))
                    one_by_one = len(new)
                else:
                    yield admitted[0].failed(as_vlmfx_error(error, "the prompt could not be computed"))
                continue
            _push(next_ids, logits, new, on_text)
            ids = torch.cat((ids, next_ids))
            running += new
        else:
            positions, lens = [s.next_position for s in running], [s.context_len for s in running]
            max_lens, sampling = [s.max_len for s in running], _sampling(model, running)
            try:
                ids, logits = runner.decode(model, ids, positions, lens, max_lens, cache, sampling, executor)
            except (
                Exception
            ) as error:  # the program of so many rows cannot be made, say: those that wait may do with another
                failure = as_vlmfx_error(error, "the next token could not be computed")
                yield from (s.failed(failure) for s in running)
                running, ids = [], ids[:0]
                continue
            _push(ids, logits, running, on_text)
        for row in reversed(range(len(running))):
            if running[row].end is not None:
                yield running[row].output()
                last = running.pop()
                if row < len(running):
                    runner.move_row(cache, executor.layout, len(running), row)
                    running[row] = last
                    ids[row] = ids[len(running)]
                ids = ids[: len(running)]


def _most_rows(executor: Executor) -> int:
    """Sequences that an executor's cache and plan hold at once."""
    plan, layout = executor.plan, executor.layout
    most = [plan.max_seqs, *plan.decode[-1:]] if plan is not None else []
    return min(most + ([layout.num_rows] if layout is not None else []), default=2**31)


def _admit(waiting: deque[Request], most: int, max_tokens: int) -> list[Request]:
    """The first waiting requests, at least one and at most `most`, of max_tokens together."""
    admitted = [waiting.popleft()]
    num_tokens = admitted[0].num_tokens
    while waiting and len(admitted) < most and num_tokens + waiting[0].num_tokens <= max_tokens:
        num_tokens += waiting[0].num_tokens
        admitted.append(waiting.popleft())
    return admitted


def _sampling(model: Model, sequences: Sequence[sequence.Sequence]) -> Sampling | None:
    """How the next token of each sequence is drawn, on the host."""
    seeds, positions = [s.seed for s in sequences], [s.context_len for s in sequences]
    return state([s.params for s in sequences], seeds, positions, torch.device("cpu"))


def _push(ids: Tensor, logits: Tensor, sequences: Sequence[sequence.Sequence], on_text: OnText) -> None:
    """Give each sequence its next id (n,), with log-probabilities where it wants them."""
    wanted = [s.params.logprobs for s in sequences]
    candidates = logprobs(logits, ids, wanted) if any(w is not None for w in wanted) else [None] * len(sequences)
    for s, token, tops in zip(sequences, ids.tolist(), candidates, strict=True):
        text = s.push(token, tops)
        if text:
            on_text(s.number, text)
