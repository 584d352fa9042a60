"""Launcher: runs a step's plan: images into the feature cache, parts of prompts and newest tokens through the programs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlmfx.checkpoint import Model
from vlmfx.compile.executor import Executor, moved
from vlmfx.compile.programs import Adjustments, Sampling, choose
from vlmfx.engine import runner
from vlmfx.engine.adjustments import adjustments
from vlmfx.engine.encoder_clock import EncoderClock
from vlmfx.engine.feature_cache import FeatureCache
from vlmfx.engine.launched import Failure, Launched, Piece
from vlmfx.engine.prepared import Item
from vlmfx.engine.sampler import state
from vlmfx.engine.scheduler import Chunk, StepPlan
from vlmfx.engine.sequence import Sequence as Text
from vlmfx.engine.token_rules import TokenRules
from vlmfx.errors import VlmfxError, as_vlmfx_error, reason_of

log = logging.getLogger("vlmfx")
NOT_COMPUTED = "the request could not be computed"
One = TypeVar("One", Chunk, Text)


class Launcher:
    """no_rules: of texts that have none, beside others that have. clock counts the time of encoding, num_encoded images.

    What fails in a batch is run again one by one, which may write keys and values a second time and changes nothing."""

    def __init__(
        self, model: Model, executor: Executor, features: FeatureCache, no_rules: TokenRules, clock: EncoderClock
    ) -> None:
        self.model, self.executor, self.features, self._no_rules = model, executor, features, no_rules
        self._clock = clock
        self._vocab_size = model.processor.vocab_size
        self.num_encoded = 0

    def launch(self, plan: StepPlan, before: Launched | None, collect: Callable[[Launched], None]) -> Launched:
        """Start a step. before: the one whose tokens are not read yet, where there is one; it is given to collect where a row's rules
        must know them, once the model is launched, so that what may come next is found while that runs."""
        failed: list[Failure] = []
        runner.copy_blocks(self.executor.cache, plan.copies)
        bad = self._encode(plan.encode)
        chunks = []
        for chunk in plan.prefill:
            sequence = chunk.sequence
            why = [bad[item.key] for item in sequence.items(chunk.start, chunk.end) if item.key in bad]
            if why:
                failed.append((sequence.request, why[0]))
            else:
                chunks.append(chunk)
        pieces = self._attempt(chunks, self._prefill, failed)
        pieces += self._attempt(plan.decode, partial(self._decode, before=before, collect=collect), failed)
        return Launched(pieces, self.model.device, failed)

    def _encode(self, items: Sequence[Item]) -> dict[bytes, VlmfxError]:
        """Encode items into the feature cache; key → why, of those that fail."""
        made: list[tuple[Item, Tensor]] = []
        bad: dict[bytes, VlmfxError] = {}

        def encode(some: Sequence[Item]) -> None:
            visions = [item.vision for item in some if item.vision is not None]
            with self._clock.span():
                rows = runner.encode_items(self.model, visions, [item.num_rows for item in some], self.executor)
            made.extend(zip(some, rows, strict=True))

        try:
            if items:
                encode(items)
        except Exception as error:
            log.warning(
                "%d images could not be encoded together (%s); each is encoded alone", len(items), reason_of(error)
            )
            for item in items:
                try:
                    encode([item])
                except Exception as error:
                    bad[item.key] = as_vlmfx_error(error, NOT_COMPUTED)
        for item, rows in made:
            # Rows of a batch are views of one tensor, which would stay as long as any of them.
            self.features.put(item.key, rows if len(made) == 1 else rows.clone())
        self.num_encoded += len(made)
        return bad

    def _attempt(
        self, batch: Sequence[One], run: Callable[[Sequence[One]], Piece], failed: list[Failure]
    ) -> list[Piece]:
        """The piece of a batch; where that fails those of its parts alone, so that only the cause fails."""
        if not batch:
            return []
        try:
            return [run(batch)]
        except Exception as error:
            if len(batch) > 1:
                log.warning(
                    "a step failed for %d texts (%s); it is run again for each alone", len(batch), reason_of(error)
                )
                return [piece for one in batch for piece in self._attempt([one], run, failed)]
            one = batch[0]
            request = one.sequence.request if isinstance(one, Chunk) else one.request
            failed.append((request, as_vlmfx_error(error, NOT_COMPUTED)))
            return []

    def _prefill(self, chunks: Sequence[Chunk]) -> Piece:
        draws = [text for chunk in chunks for text in chunk.draws]
        parts = [
            runner.Chunk(
                token_ids=c.sequence.token_ids(c.start, c.end),
                positions=c.sequence.positions(c.start, c.end),
                max_len=c.sequence.max_len,
                blocks=c.sequence.blocks,
                start=c.start,
                num_draws=len(c.draws),
                **self._features(c),
            )
            for c in chunks
        ]
        # What forks draw first is of the prompt's length, as what the first text draws.
        sampling = _sampling(draws, [c.end for c in chunks for _ in c.draws])
        rules = self._rules(draws)
        ids, logits = runner.prefill(self.model, parts, self.executor.cache, None if rules else sampling, self.executor)
        if rules is not None:
            ids, logits = self._choose(logits, sampling, adjustments(rules, self._vocab_size))
        return Piece(draws, ids, logits)

    def _features(self, chunk: Chunk) -> dict[str, Any]:
        """The feature rows that a chunk's tokens read, and which of them each reads."""
        sequence = chunk.sequence
        num_prompt, end = sequence.num_prompt, min(chunk.end, sequence.num_prompt)
        index = sequence.prepared.inputs.feature_index[chunk.start : end] if chunk.start < num_prompt else None
        mine = torch.full((chunk.end - chunk.start,), -1)
        rows, count = [], 0
        for item in sequence.items(chunk.start, chunk.end) if index is not None else []:
            assert index is not None
            at = (index >= item.first_row) & (index < item.first_row + item.num_rows)
            if not bool(at.any()):
                continue
            read = index[at] - item.first_row
            first, last = int(read.min()), int(read.max())
            all_rows = self.features.get(item.key) if item.rows is None else item.rows
            rows.append(moved(all_rows[first : last + 1].to(self.model.dtype), self.model.device))
            mine[: len(index)][at] = read - first + count
            count += last + 1 - first
        return {"features": torch.cat(rows) if rows else None, "feature_index": mine}

    def _decode(self, texts: Sequence[Text], before: Launched | None, collect: Callable[[Launched], None]) -> Piece:
        # The newest token is computed by this step, and the one it draws is counted in flight already.
        lens = [t.num_computed for t in texts]
        rows = [
            runner.Row(
                position=t.prepared.inputs.next_position + n - 1 - t.num_prompt,
                context_len=n,
                blocks=t.blocks,
                max_len=t.max_len,
            )
            for t, n in zip(texts, lens, strict=True)
        ]
        newest, sampling, rules = self._newest(texts, before), _sampling(texts, lens), self._rules(texts)
        ids, logits = runner.decode(
            self.model, newest, rows, self.executor.cache, None if rules else sampling, self.executor
        )
        if rules is not None:
            if before is not None and any(r.needs_host for r in rules):
                collect(before)
            ahead = [t.num_in_flight > 1 for t in texts]
            found = adjustments(rules, self._vocab_size, ahead)
            if found is not None and found.newest is not None:
                on_device = moved(torch.tensor(ahead), self.model.device)
                found = replace(found, newest=torch.where(on_device, newest, -1))
            ids, logits = self._choose(logits, sampling, found)
        return Piece(list(texts), ids, logits)

    def _rules(self, texts: Sequence[Text]) -> list[TokenRules] | None:
        """Those of each text, None where none has any: the program then draws by itself."""
        if all(t.rules is None for t in texts):
            return None
        return [t.rules or self._no_rules for t in texts]

    def _choose(self, logits: Tensor, sampling: Sampling | None, found: Adjustments | None) -> tuple[Tensor, Tensor]:
        device = self.model.device
        return choose(logits, moved(sampling, device), moved(found, device))

    def _newest(self, texts: Sequence[Text], before: Launched | None) -> Tensor:
        """The newest token of each (n,), on the device: of those that are in flight what the last step drew."""
        known = [t.completion.token_ids[-1] for t in texts if t.num_in_flight == 1]
        if before is None or len(known) == len(texts):
            return self._on_device(known)
        source, rows = before.ids, before.rows
        new = len(source)
        if known:
            source = torch.cat((source, self._on_device(known)))
        wanted = []
        for text in texts:
            if text.num_in_flight == 1:
                wanted.append(new)
                new += 1
            else:
                wanted.append(rows[text])
        if wanted == list(range(len(source))):
            return source
        return source.index_select(0, self._on_device(wanted))

    def _on_device(self, values: list[int]) -> Tensor:
        found: Tensor = moved(torch.tensor(values), self.model.device)
        return found


def _sampling(texts: Sequence[Text], places: Sequence[int]) -> Sampling | None:
    """How the token at each text's place is drawn, on the host."""
    params, seeds = [t.request.params for t in texts], [t.seed for t in texts]
    return state(params, seeds, places, torch.device("cpu"), [t.completion.index for t in texts])
