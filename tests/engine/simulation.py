"""A model of the engine without tensors: a cache that holds, for each slot, what its keys and values were computed from.

A step is run by writing to it; before a token is computed, every slot of the tokens before it must hold what that text's own tokens
make."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from vlmfx.engine.block_manager import BlockManager
from vlmfx.engine.feature_cache import FeatureCache
from vlmfx.engine.prefix import block_keys, root_key
from vlmfx.engine.prepared import Item, Prepared
from vlmfx.engine.scheduler import Limits, Scheduler, StepPlan
from vlmfx.engine.sequence import Sequence
from vlmfx.processing.inputs import ModelInputs

VOCAB = 5  # few, so that texts often begin alike


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A request: prompt tokens, (first place, places, content) of its images, how many texts and tokens are wanted, priority and salt."""

    token_ids: tuple[int, ...]
    images: tuple[tuple[int, int, int], ...] = ()
    num_texts: int = 1
    num_tokens: int = 4
    priority: int = 0
    salt: str = ""


def answer_of(wish: Wish, index: int) -> list[int]:
    """Text `index`, up to the token 0, which ends it, or as long as was wanted."""
    answer: list[int] = []
    while len(answer) < wish.num_tokens and 0 not in answer:
        answer.append(hashlib.sha256(f"{wish} {index} {answer}".encode()).digest()[0] % VOCAB)
    return answer


@dataclass(eq=False)
class Job:
    wish: Wish
    texts: list[Sequence]
    answers: list[list[int]]
    is_aborted: bool = False


@dataclass(eq=False)
class Simulation:
    num_blocks: int
    block_size: int
    limits: Limits
    feature_bytes: int = 8
    caches_prefixes: bool = True
    overlaps: bool = False
    jobs: list[Job] = field(default_factory=list)
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.blocks = BlockManager(self.num_blocks, caches_prefixes=self.caches_prefixes)
        self.features = FeatureCache(self.feature_bytes)
        self.scheduler = Scheduler(self.blocks, self.features, self.limits, self.block_size)
        self.slots: dict[tuple[int, int], bytes] = {}
        self.pending: list[Sequence] = []
        self.num_encoded = 0

    def add(self, wish: Wish) -> Job:
        number = len(self.jobs)
        prompt = list(wish.token_ids)
        index = torch.full((len(prompt),), -1)
        items, row = [], 0
        for first, places, content in wish.images:
            index[first : first + places] = torch.arange(row, row + places)
            key = hashlib.sha256(f"{content} {wish.salt}".encode()).digest()[:16]
            vision: Any = SimpleNamespace(position_ids=range(4 * places), num_segments=1)
            items.append(Item(key=key, first_row=row, num_rows=places, first=first, end=first + places, vision=vision))
            row += places
        inputs = ModelInputs(
            prompt=None,
            token_ids=prompt,
            positions=torch.arange(len(prompt)),
            next_position=len(prompt),
            feature_index=index,
            num_features=row,
        )
        root = root_key(wish.salt, "")
        media = [(item.first, item.key) for item in items]
        ids, positions = torch.tensor(prompt, dtype=torch.int32).numpy(), torch.arange(len(prompt))[None].numpy()
        keys = tuple(block_keys(root, ids, positions, media, self.block_size))
        made = Prepared(inputs=inputs, items=tuple(items), root=root, keys=keys)
        request: Any = SimpleNamespace(order=(wish.priority, number), number=number)
        texts = []
        for i in range(wish.num_texts):
            completion: Any = SimpleNamespace(token_ids=[], index=i)
            texts.append(Sequence(request, made, completion, len(prompt) + wish.num_tokens))
        texts[0].forks = texts[1:]
        job = Job(wish, texts, [answer_of(wish, i) for i in range(wish.num_texts)])
        self.jobs.append(job)
        self.scheduler.add(texts[0])
        return job

    def abort(self, number: int) -> None:
        job = self.jobs[number]
        job.is_aborted = True
        for text in job.texts:
            self.scheduler.finish(text)

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        before, self.pending = self.pending, self.run(plan)
        if not self.overlaps:
            before, self.pending = self.pending, []
        self.collect(before)
        self.num_steps += 1
        return plan

    def run(self, plan: StepPlan) -> list[Sequence]:
        limits = self.limits
        assert sum(c.end - c.start for c in plan.prefill) <= limits.max_num_batched_tokens
        assert sum(max(len(c.draws), 1) for c in plan.prefill) <= limits.max_prefill_seqs
        assert len(self.scheduler.running) <= limits.max_num_seqs
        held = [block for text in self.scheduler.running for block in text.blocks]
        assert all(self.blocks.holders(block) == held.count(block) for block in held)
        for source, target in plan.copies:
            for at in range(self.block_size):
                if (source, at) in self.slots:
                    self.slots[target, at] = self.slots[source, at]
        patches = [len(item.vision.position_ids) for item in plan.encode if item.vision is not None]
        assert len(patches) == 1 or sum(patches) <= limits.max_patches
        for item in plan.encode:
            assert item.key not in self.features
            self.features.put(item.key, torch.empty(item.num_rows, dtype=torch.int8))
            self.num_encoded += 1
        drawn: list[Sequence] = []
        for chunk in plan.prefill:
            for item in chunk.sequence.items(chunk.start, chunk.end):
                self.features.get(item.key)
            self.compute(chunk.sequence, chunk.start, chunk.end)
            drawn += chunk.draws
            self.scheduler.unpin_read(chunk.sequence)
        for text in plan.decode:
            self.compute(text, text.num_computed - 1, text.num_computed)
        return drawn + plan.decode

    def compute(self, text: Sequence, start: int, end: int) -> None:
        for place in range(end):
            slot = (text.blocks[place // self.block_size], place % self.block_size)
            made = self.content(text, place + 1)
            if place < start:
                assert self.slots[slot] == made, f"place {place} of {text.request.number} holds another text's"
            self.slots[slot] = made

    def content(self, text: Sequence, length: int) -> bytes:
        """What the token at length − 1 is made of: all up to it."""
        job = self.jobs[text.request.number]
        wish, answer = job.wish, job.answers[text.completion.index]
        tokens = [*wish.token_ids, *answer][:length]
        assert len(tokens) == length
        images = [(first, content) for first, _, content in wish.images if first < length]
        return hashlib.sha256(f"{tokens} {images} {wish.salt}".encode()).digest()

    def collect(self, drawn: list[Sequence]) -> None:
        for text in drawn:
            text.num_in_flight -= 1
            if text.is_open:
                answer = self.jobs[text.request.number].answers[text.completion.index]
                text.completion.token_ids.append(answer[len(text.completion.token_ids)])
                self.scheduler.publish(text)
                if text.num_known == text.max_len or text.completion.token_ids[-1] == 0:  # 0 ends a text
                    self.scheduler.finish(text)

    @property
    def is_idle(self) -> bool:
        return not (self.scheduler.running or self.scheduler.waiting or self.pending)
