"""Scheduler: what each step computes: one more token of all that decode, parts of prompts as far as a budget goes, and the images that
those parts need.

Sequences are served by (priority, number). The first of them always gets on: for want of blocks the last one is preempted, which frees
its blocks and computes it again later. Plain Python, no tensors. After vllm-project/vllm: vllm/v1/core/sched/scheduler.py."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import numpy as np

from vlmfx.engine.block_manager import BlockManager
from vlmfx.engine.feature_cache import FeatureCache
from vlmfx.engine.prefix import block_keys
from vlmfx.engine.prepared import Item
from vlmfx.engine.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one step: tokens of prompts (in parts for texts, whole for vectors) and their sequences, patches and segments of images (one that
    is larger goes alone); and how many sequences may run."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_prefill_seqs: int = 2**31
    max_patches: int = 2**31
    max_segments: int = 2**31


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Tokens start to end of a sequence; where end is that of all its tokens the next one is drawn, for its forks too. num_found: tokens
    before start that were in the cache."""

    sequence: Sequence
    start: int
    end: int
    draws: tuple[Sequence, ...] = ()
    num_found: int = 0


@dataclass(kw_only=True, eq=False)
class StepPlan:
    """copies: (source, target) blocks, before all else; then encode, prefill and decode."""

    copies: list[tuple[int, int]] = field(default_factory=list)
    encode: list[Item] = field(default_factory=list)
    prefill: list[Chunk] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.prefill or self.decode)


class Scheduler:
    """waiting: what is ready to begin; running: what holds blocks. Both in order."""

    def __init__(self, blocks: BlockManager, features: FeatureCache, limits: Limits, block_size: int) -> None:
        self.blocks, self.features, self.limits, self.block_size = blocks, features, limits, block_size
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Take a sequence that has begun nothing, with its forks."""
        insort(self.waiting, sequence, key=_order)

    def schedule(self) -> StepPlan:
        """The next step; the sequences in it are counted as computed, and those that draw as one token longer."""
        plan = StepPlan()
        for sequence in list(self.running):
            num_tokens = sequence.num_tokens
            is_decoding = sequence.num_computed == num_tokens - 1 >= sequence.num_prompt
            if is_decoding and num_tokens < sequence.max_len and sequence.is_running:
                self._decode(plan, sequence, num_tokens - 1)
        self._prefill(plan)
        return plan

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, and free what it holds."""
        if sequence.is_open:
            sequence.is_open = False
            held = self.running if sequence.is_running else self.waiting
            if sequence in held:  # a fork may be in neither yet
                held.remove(sequence)
            sequence.is_running = False
            self._release(sequence)

    def publish(self, sequence: Sequence) -> None:
        """Let others find the blocks that are whole and whose tokens are known."""
        num_whole = min(sequence.num_computed, sequence.num_known) // self.block_size
        if not self.blocks.caches_prefixes or num_whole <= sequence.num_published:
            return
        if len(sequence.keys) < num_whole:
            sequence.keys += self._more_keys(sequence, num_whole)
        for at in range(sequence.num_published, num_whole):
            self.blocks.publish(sequence.blocks[at], sequence.keys[at])
        sequence.num_published = num_whole

    def _decode(self, plan: StepPlan, sequence: Sequence, place: int) -> None:
        """One more token, the newest of which is at this place."""
        is_new = place // self.block_size == len(sequence.blocks)
        is_shared = not is_new and self.blocks.holders(sequence.blocks[-1]) > 1
        if is_new or is_shared:
            while not self.blocks.has_room(1):
                if self._preempt_last(plan) is sequence:
                    return
            (block,) = self.blocks.allocate(1)
            if is_shared:  # another sequence goes on in it
                shared = sequence.blocks[-1]
                self.blocks.release([shared])
                plan.copies.append((shared, block))
                sequence.blocks[-1] = block
            else:
                sequence.blocks.append(block)
        sequence.num_computed += 1
        sequence.num_in_flight += 1
        plan.decode.append(sequence)

    def _prefill(self, plan: StepPlan) -> None:
        left, rows = self.limits.max_num_batched_tokens, self.limits.max_prefill_seqs
        partial = [s for s in self.running if s.num_in_flight == 0 and not s.is_decoding]
        num_running = sum(1 + len(s.forks) for s in self.running)
        for sequence in chain(partial, list(self.waiting)):
            num_rows = 1 + len(sequence.forks)
            is_new = not sequence.is_running
            if left <= 0 or (is_new and num_running + num_rows > self.limits.max_num_seqs):
                return
            if num_rows > rows or sequence.num_in_flight:
                continue
            # A long prompt leaves half of a step to those behind it.
            is_alone = len(partial) + len(self.waiting) == 1
            chunk = self._chunk(plan, sequence, left if is_alone else min(left, self._half))
            if isinstance(chunk, Chunk):
                plan.prefill.append(chunk)
                left, rows = left - (chunk.end - chunk.start), rows - max(len(chunk.draws), 1)
                num_running += num_rows if is_new else 0
            elif chunk == "blocks":
                return  # those behind it must not take what it waits for

    @property
    def _half(self) -> int:
        return max(self.limits.max_num_batched_tokens // 2, 1)

    def _chunk(self, plan: StepPlan, sequence: Sequence, share: int) -> Chunk | Literal["blocks", "images"]:
        """The next part of a sequence's known tokens, of at most `share`, with blocks and images for it; or what it must wait for."""
        size, is_new = self.block_size, not sequence.is_running
        shared = self.blocks.lookup(sequence.keys[: (sequence.num_tokens - 1) // size]) if is_new else []
        start = sequence.num_computed + len(shared) * size
        end, missing = self._with_images(plan, sequence, start, min(sequence.num_tokens, start + share))
        if end <= start:
            return "images"
        pinned = self._pin(sequence, start, end)  # before a preemption lets go of them
        count = max(-(-end // size) - len(sequence.blocks) - len(shared), 0)
        spare = len(self.running) if is_new else 0  # a newcomer leaves those that run a block each
        while not self.blocks.has_room(count + spare, shared):
            if is_new or self.running[-1] is sequence:
                self._unpin(sequence, pinned)
                return "blocks"
            self._preempt_last(plan)
        self.blocks.share(shared)
        sequence.blocks.extend(shared)
        sequence.blocks.extend(self.blocks.allocate(count))
        if is_new:
            self.waiting.remove(sequence)
            self._run(sequence)
        plan.encode += missing
        sequence.num_computed = end
        draws = self._fork(sequence) if end == sequence.num_tokens else ()
        return Chunk(sequence=sequence, start=start, end=end, draws=draws, num_found=len(shared) * size)

    def _pin(self, sequence: Sequence, start: int, end: int) -> set[bytes]:
        """Hold the images that these tokens read; the keys of those that the sequence did not hold."""
        keys = {item.key for item in sequence.items(start, end) if item.rows is None} - sequence.pins
        for key in keys:
            self.features.pin(key)
        sequence.pins |= keys
        return keys

    def _unpin(self, sequence: Sequence, keys: set[bytes]) -> None:
        sequence.pins -= keys
        for key in keys:
            self.features.unpin(key)

    def _with_images(self, plan: StepPlan, sequence: Sequence, start: int, end: int) -> tuple[int, list[Item]]:
        """How far from start the images that are there, or may be encoded in this step, let the tokens go; and those to encode for it."""
        limits, missing = self.limits, [*plan.encode]
        have = {item.key for item in missing}
        patches, segments = sum(map(_num_patches, missing)), sum(map(_num_segments, missing))
        for item in sequence.items(start, end):
            if item.rows is not None or item.key in have or item.key in self.features:
                continue
            patches, segments = patches + _num_patches(item), segments + _num_segments(item)
            if missing and (patches > limits.max_patches or segments > limits.max_segments):
                end = max(item.first, start)
                break
            missing.append(item)
            have.add(item.key)
        return end, missing[len(plan.encode) :]

    def _fork(self, sequence: Sequence) -> tuple[Sequence, ...]:
        """The sequences that draw at the end of this one: itself, and those that go on from its prompt in blocks they share."""
        draws = (sequence, *sequence.forks)
        for fork in sequence.forks:
            fork.num_computed = sequence.num_computed
            self.blocks.share(sequence.blocks)
            fork.blocks.extend(sequence.blocks)
            self._run(fork)
        sequence.forks = []
        for one in draws:
            one.num_in_flight += 1
        return draws

    def _run(self, sequence: Sequence) -> None:
        sequence.is_running = True
        insort(self.running, sequence, key=_order)

    def _preempt_last(self, plan: StepPlan) -> Sequence:
        """Take its blocks from the last running sequence, which begins again when there is room; if it is in the plan, not any more."""
        sequence = self.running.pop()
        if sequence in plan.decode:
            plan.decode.remove(sequence)
            sequence.num_in_flight -= 1
        sequence.is_running = False
        self._release(sequence)
        sequence.num_computed = 0
        sequence.num_preempted += 1
        insort(self.waiting, sequence, key=_order)
        return sequence

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        del sequence.blocks[:]
        sequence.num_published = 0
        self._unpin(sequence, set(sequence.pins))

    def unpin_read(self, sequence: Sequence) -> None:
        """Let go of the images that lie behind what is computed."""
        if sequence.pins:
            needed = {item.key for item in sequence.prepared.items if item.end > sequence.num_computed}
            self._unpin(sequence, sequence.pins - needed)

    def _more_keys(self, sequence: Sequence, num: int) -> list[bytes]:
        """Keys of the blocks after those that the prompt has alone, up to `num` in all."""
        have = len(sequence.keys)
        start, end = have * self.block_size, num * self.block_size
        ids = np.asarray(sequence.token_ids(start, end), np.int32)
        positions = sequence.positions(start, end).reshape(-1, end - start).numpy()
        media = [(item.first - start, item.key) for item in sequence.prepared.items if item.first >= start]
        parent = sequence.keys[-1] if sequence.keys else sequence.prepared.root
        return list(block_keys(parent, ids, positions, media, self.block_size))


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return *sequence.request.order, sequence.completion.index


def _num_patches(item: Item) -> int:
    return 0 if item.vision is None else len(item.vision.position_ids)


def _num_segments(item: Item) -> int:
    return 0 if item.vision is None else item.vision.num_segments
