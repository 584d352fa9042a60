"""Engine: requests in, tokens out, a step at a time: schedule, launch the programs, read what they drew.

With `overlaps` a step is planned and launched before the one before it is read: ids feed forward on the device, and a text's end is
noticed a step late, whose token is dropped."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import asdict
from typing import Any

import torch

from vlmfx.checkpoint import Model
from vlmfx.compile.executor import Executor
from vlmfx.compile.layout import CacheLayout
from vlmfx.engine import runner
from vlmfx.engine.admission import Admission, limits_of
from vlmfx.engine.block_manager import BlockManager
from vlmfx.engine.completion import Completion
from vlmfx.engine.deadline import too_late
from vlmfx.engine.embedding import EmbeddingOutput, EmbeddingRequestOutput
from vlmfx.engine.encoder_clock import EncoderClock
from vlmfx.engine.events import Counters, Event, Group
from vlmfx.engine.feature_cache import FeatureCache
from vlmfx.engine.grammar import GrammarCompiler
from vlmfx.engine.intake import Intake, Loaded
from vlmfx.engine.launched import Launched
from vlmfx.engine.launcher import NOT_COMPUTED, Launcher
from vlmfx.engine.observer import Observer
from vlmfx.engine.options import FEATURE_BYTES
from vlmfx.engine.pooler import vectors
from vlmfx.engine.prepared import Prepared, prepared
from vlmfx.engine.prompt_logprobs import prompt_logprobs
from vlmfx.engine.request import SamplingParams
from vlmfx.engine.scheduler import Scheduler, StepPlan
from vlmfx.engine.sequence import Request
from vlmfx.engine.sequence import Sequence as Text
from vlmfx.engine.taps import tap
from vlmfx.engine.token_rules import TokenRules
from vlmfx.errors import VlmfxError, as_vlmfx_error
from vlmfx.processing.inputs import ModelInputs

log = logging.getLogger("vlmfx")
NOT_PREPARED = "the prompt could not be prepared"
LINGER = 0.01  # seconds that a step waits for pixels where nothing runs
POOL_AHEAD = 64  # prompts for vectors whose pixels may be in memory


class Engine:
    """One model, its executor's cache, and the requests that are in it. One thread steps it.

    Requests of any kind share steps. One that fails, by its pixels, in a program or in any other way, fails alone."""

    def __init__(
        self,
        model: Model,
        executor: Executor,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int = runner.MAX_TOKENS,
        feature_cache_bytes: int = FEATURE_BYTES,
        caches_prefixes: bool = True,
        overlaps: bool = False,
        observer: Observer | None = None,
    ) -> None:
        assert executor.layout is not None, "an engine needs a cache"
        self.model, self.executor, self.overlaps = model, executor, overlaps
        self.observer = observer or Observer()
        self.layout: CacheLayout = executor.layout
        self.limits = limits_of(model, executor, max_num_seqs, max_num_batched_tokens)
        self._admission = Admission(executor=executor, limits=self.limits, capacity=self.capacity)
        self.features = FeatureCache(feature_cache_bytes)
        self.blocks = BlockManager(self.layout.num_blocks, caches_prefixes=caches_prefixes)
        self.scheduler = Scheduler(self.blocks, self.features, self.limits, self.layout.block_size)
        self.counters = Counters()
        self._intake = Intake(self._loaded)
        self._groups: dict[int, Group] = {}  # of those that have begun, by number
        self._poolable: deque[tuple[Request, ModelInputs]] = deque()
        self._pending: Launched | None = None
        self._events: list[Event] = []
        self._has_deadlines = False
        tokenizer, vocab_size = model.processor.tokenizer, model.processor.vocab_size
        self._vocabulary: dict[str, Any] = {
            "tokenizer": tokenizer,
            "vocab_size": vocab_size,
            "eos_token_ids": model.eos_token_ids,
        }
        self._grammars = GrammarCompiler(tokenizer, vocab_size, model.eos_token_ids)
        no_rules = TokenRules(SamplingParams(), [], **self._vocabulary)
        self._clock = EncoderClock(model.device)
        self._launcher = Launcher(model, executor, self.features, no_rules, self._clock)

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds."""
        return self.layout.num_blocks * self.layout.block_size

    @property
    def has_work(self) -> bool:
        return bool(len(self._intake) or self._groups or self._poolable or self._pending or self._events)

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._intake) + len(self._poolable) + len(self.scheduler.waiting)

    def max_len(self, request: Request) -> int:
        """The most tokens that its prompt and answer may have together."""
        return request.max_len(min(self.model.max_model_len, self.capacity))

    def metrics(self) -> dict[str, float]:
        """The counters, and what is held now."""
        memory = self.executor.memory()
        return {
            **asdict(self.counters),
            "num_waiting": self.num_waiting,
            "num_running": len(self.scheduler.running),
            "num_free_blocks": self.blocks.num_free,
            "num_blocks": self.blocks.num_blocks,
            "num_kept_images": len(self.features),
            "feature_bytes": self.features.num_bytes,
            "cache_bytes": memory.cache,
            "num_programs": memory.num_programs,
            "program_bytes": memory.programs,
        }

    def check(self, request: Request) -> None:
        """Raise InvalidRequest for a request that can never be served."""
        self._admission.check(request)

    def add(self, request: Request) -> None:
        """Take a request; what becomes of it comes out of `step`. Raises InvalidRequest."""
        self.check(request)
        self._has_deadlines |= request.deadline is not None
        self._intake.add(request)

    def begin(self, request: Request) -> None:
        """Begin a request at once, whose inputs are ready, however many are there. Raises what its inputs fail by."""
        self._begin(request, *self._loaded(request))

    def abort(self, number: int) -> None:
        """End a request. Of one that has begun to be generated an output comes out of the next step, with what it has by then."""
        self.observer.ended(number, None)
        self._remove(number)
        group = self._groups.get(number)
        if group is not None:
            for text in group.texts:
                if text.completion.end is None:
                    text.completion.cut()
            self._finish(group, Event(request=group.request, output=group.output()))

    def end(self, request: Request, error: VlmfxError) -> None:
        """End a request by an error, which comes out of the next step."""
        self.observer.ended(request.number, error)
        if request.number in self._groups:
            self._fail(request, error)
        else:
            self._remove(request.number)
            self._refuse(request, error)

    def fail_all(self, error: VlmfxError) -> list[Event]:
        """End every request by an error. What the cache holds is forgotten: nobody knows what a step that failed has written."""
        self._pending = None
        for request in self._requests():
            self.end(request, error)
        self.blocks.reset()
        events, self._events = self._events, []
        return events

    def reset_prefix_cache(self) -> bool:
        """Forget the blocks and images that are kept for other requests; False, and nothing is done, while requests run."""
        is_done = self.blocks.reset()
        if is_done:
            self.features.clear()
            self.observer.forgot()
        return is_done

    def close(self) -> None:
        """End all requests and the threads."""
        for number in [*self._groups]:
            self.abort(number)
        self._pending, self._poolable = None, deque()
        self._intake.close()

    @torch.no_grad()
    def step(self, timeout: float | None = None) -> list[Event]:
        """Compute one step, or where there is nothing else to do wait for pixels, no longer than timeout seconds."""
        self._expire()
        self._load()
        self._pool()
        plan = self.scheduler.schedule()
        before, self._pending = self._pending, None
        launched = self._launch(plan, before) if plan else None
        if self.overlaps:
            self._pending = launched
        else:
            before = launched
        if before is not None:
            self._collect(before)
        elif not plan and self._intake.num_loading and not self._events:
            self._intake.wait(timeout)
        events, self._events = self._events, []
        return events

    def step_or_fail(self, timeout: float | None = None) -> list[Event]:
        """As `step`, for who serves others after it: where it fails, all requests that are there end by that, and it is logged."""
        try:
            return self.step(timeout)
        except Exception as error:
            log.exception("a step failed; its requests are ended")
            return self.fail_all(as_vlmfx_error(error, "the step could not be computed"))

    def _requests(self) -> list[Request]:
        """All that are there, begun or not."""
        return [
            *(group.request for group in self._groups.values()),
            *self._intake,
            *(request for request, _ in self._poolable),
        ]

    def _remove(self, number: int) -> None:
        """Forget a request that has not begun."""
        self._intake.remove(number)
        self._poolable = deque(entry for entry in self._poolable if entry[0].number != number)

    def _load(self) -> None:
        """Have pixels made ready for as many requests as may run next, and begin those whose pixels are there."""
        self._intake.load(self._has_room)
        if self._intake.num_loading and not self.scheduler.running and not self._poolable:
            self._intake.wait(LINGER, for_all=True)  # what is ready soon may share the step
        for request, loaded in self._intake.take():
            try:
                self._begin(request, *loaded.result())
            except Exception as error:
                self._refuse(request, as_vlmfx_error(error, NOT_PREPARED))

    def _has_room(self, request: Request) -> bool:
        num_ahead = len(self._poolable) if request.pools else len(self.scheduler.waiting)
        return num_ahead + self._intake.num_loading < (POOL_AHEAD if request.pools else self.limits.max_num_seqs)

    def _loaded(self, request: Request) -> Loaded:
        """The inputs of a request, and the rules of its tokens where it has any."""
        inputs, params, rules = request.load(), request.params, None
        self._admission.check_media(inputs)
        if request.pools:
            return inputs, None
        if params.has_rules:
            form = params.structured_outputs
            grammar = None if form is None else self._grammars.compile(form)
            rules = TokenRules(params, inputs.token_ids, grammar=grammar, **self._vocabulary)
        size = self.layout.block_size
        return prepared(self.model, inputs, max_len=self.max_len(request), block_size=size, salt=request.salt), rules

    def _expire(self) -> None:
        """End what is too late."""
        if not self._has_deadlines:
            return
        now = time.perf_counter()
        for request in self._requests():
            if request.deadline is not None and now > request.deadline:
                self.end(request, too_late())

    def _pool(self) -> None:
        """The vectors of prompts that are ready, in one pass."""
        batch: list[tuple[Request, ModelInputs]] = []
        num_tokens = 0
        while self._poolable and len(batch) < self.limits.max_prefill_seqs:
            num_tokens += self._poolable[0][0].num_tokens
            if batch and num_tokens > self.limits.max_num_batched_tokens:
                break
            batch.append(self._poolable.popleft())
        if not batch:
            return
        dimensions = [request.dimensions for request, _ in batch]
        found = vectors(self.model, [inputs for _, inputs in batch], dimensions, self.executor, self._clock)
        self.counters.num_encoded += sum(len(inputs.media) for _, inputs in batch)
        self.counters.encoder_seconds = self._clock.read()
        self.observer.pooled([request for request, _ in batch], found)
        for (request, inputs), vector in zip(batch, found, strict=True):
            if isinstance(vector, VlmfxError):
                self._refuse(request, vector)
                continue
            embedding = EmbeddingOutput(embedding=vector.tolist())
            output = EmbeddingRequestOutput(str(request.number), embedding, inputs.token_ids)
            self.counters.num_finished += 1
            self._events.append(Event(request=request, output=output))

    def _begin(self, request: Request, made: Prepared | ModelInputs, rules: TokenRules | None) -> None:
        if isinstance(made, ModelInputs):
            self.observer.began(request, made)
            self._poolable.append((request, made))
            return
        max_len, params = self.max_len(request), request.params
        tapped = tap(self.model, made.inputs, request.taps, max_len=max_len) if request.taps else None
        num = params.prompt_logprobs
        texts = [
            Text(
                request,
                made,
                Completion(self.model, params, index, max_len - request.num_tokens),
                max_len,
                rules if rules is None or index == 0 else rules.copy(),
            )
            for index in range(params.n)
        ]
        texts[0].forks = texts[1:]
        group = Group(
            request=request,
            prepared=made,
            texts=texts,
            taps=None if tapped is None else {name: value.cpu() for name, value in tapped.items()},
            prompt_logprobs=None if num is None else prompt_logprobs(self.model, made.inputs, num, max_len=max_len),
        )
        self.observer.began(request, made.inputs)
        self._groups[request.number] = group
        self.scheduler.add(texts[0])

    def _launch(self, plan: StepPlan, before: Launched | None) -> Launched:
        self.observer.planned(plan)
        num_encoded = self._launcher.num_encoded
        launched = self._launcher.launch(plan, before, self._collect)
        self.observer.failed(launched.failed)
        for request, error in launched.failed:
            self._fail(request, error)
        for chunk in plan.prefill:
            self.counters.num_prompt_tokens += chunk.end - chunk.start
            self.counters.num_cached += chunk.num_found
            if chunk.sequence.is_open:
                self.scheduler.unpin_read(chunk.sequence)
        self.counters.num_steps += 1
        self.counters.num_encoded += self._launcher.num_encoded - num_encoded
        self.counters.encoder_seconds = self._clock.read()
        return launched

    def _collect(self, launched: Launched) -> None:
        """Read what a step drew, unless that is done."""
        if launched.is_read:
            return
        drawn = launched.read()
        self.observer.read(drawn)
        for text, token, candidates in drawn:
            text.num_in_flight -= 1
            if not text.is_open:
                continue
            group = self._groups[text.request.number]
            group.first_token_at = group.first_token_at or time.perf_counter()
            shown = text.completion.push(token, candidates)
            self.counters.num_drawn += 1
            self.scheduler.publish(text)
            end = text.completion.end
            if end is not None:
                self.scheduler.finish(text)
            elif text.rules is not None:
                try:
                    text.rules.accept(token)
                except Exception as error:
                    self._fail(text.request, as_vlmfx_error(error, NOT_COMPUTED))
                    continue
            output = group.output() if all(t.completion.end is not None for t in group.texts) else None
            new = tuple(text.completion.logprobs[-1:]) if candidates is not None else ()
            event = Event(
                request=text.request,
                index=text.completion.index,
                text=shown,
                token_ids=(token,),
                logprobs=new,
                finish_reason=None if end is None else end.finish_reason,
                stop_reason=None if end is None else end.stop_reason,
                output=output,
            )
            self._finish(group, event) if output is not None else self._events.append(event)

    def _fail(self, request: Request, error: VlmfxError) -> None:
        """End a request that has begun by an error."""
        group = self._groups.get(request.number)
        if group is not None:
            self.counters.num_failed += 1
            self._finish(group, Event(request=request, output=request.failed(error)))

    def _refuse(self, request: Request, error: VlmfxError) -> None:
        """End a request that has not begun by an error."""
        self.counters.num_failed += 1
        self.counters.num_finished += 1
        self._events.append(Event(request=request, output=request.failed(error)))

    def _finish(self, group: Group, event: Event) -> None:
        for one in group.texts:
            self.scheduler.finish(one)
            self.counters.num_preempted += one.num_preempted
        del self._groups[group.request.number]
        self.counters.num_finished += 1
        self._events.append(event)
