"""Training batches for `scenes`: pictures of one size and the token rows that ask about them, made by worker processes."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scenes
import torch
from scenes_targets import cell_targets
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vlmfx.processing import qwen2_vl as processing
from vlmfx.processing.inputs import MediaLayout, index_features

IGNORED = -100
KIND_WEIGHTS = {"objects": 44, "text": 38, "chart": 18}
PAIRS_SHARE = 0.1
MANNERS = {"first": 0.8, "talk": 0.12, "last": 0.08}
SMALLEST_CHART = 168
VISION = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """images (n, H, W, 3) uint8; cells (n·cells, targets) int64 what they show where; ids, feature_index, branch (S, T) int64; positions
    (3, S, T); labels (S, T) int64: the id each position should predict, IGNORED where none; label_weight (S, T) float32; answers
    (S, T) int64: the number of the answer that a label is part of; tasks: the task of each answer.

    A row is one picture's chat: a beginning (branch 0) and then branches 1, 2, ..., each one question with its answer, that see the
    beginning and themselves; padding is branch −1."""

    images: Tensor
    cells: Tensor
    ids: Tensor
    feature_index: Tensor
    branch: Tensor
    positions: Tensor
    labels: Tensor
    label_weight: Tensor
    answers: Tensor
    tasks: tuple[str, ...]

    def _map(self, fn: Callable[[Tensor], Tensor]) -> TrainingBatch:
        tensors = {name: fn(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return TrainingBatch(**tensors, tasks=self.tasks)

    def pin_memory(self) -> TrainingBatch:
        """The batch in memory that a GPU can copy from while it computes; the DataLoader calls this."""
        return self._map(lambda t: t.pin_memory())

    def to(self, device: torch.device) -> TrainingBatch:
        """The batch with its tensors on a device."""
        return self._map(lambda t: t.to(device, non_blocking=True))


def answer_ids(tokenizer: Tokenizer, task: str, answer: str) -> list[int]:
    """Answer tokens. Characters read off a picture are spelled one token each; words of ours are merged as usual."""
    if task == "text":
        return _spelled(tokenizer, answer)
    pieces = re.split(r'(?<=")([^"]*)(?=")', answer) if '"' in answer else [answer]
    return [
        i
        for n, piece in enumerate(pieces)
        for i in (_spelled(tokenizer, piece) if n % 2 else tokenizer.encode(piece).ids)
    ]


def _spelled(tokenizer: Tokenizer, text: str) -> list[int]:
    return [i for char in text for i in tokenizer.encode(char).ids]


@dataclass
class Row:
    """One row of a batch while it is made."""

    ids: list[int]
    learned: list[bool]
    branch: list[int]
    answers: list[int]

    def add(self, ids: list[int], branch: int, answer: int | None = None) -> None:
        """Append tokens; those of an answer are learned."""
        self.ids += ids
        self.learned += [answer is not None] * len(ids)
        self.branch += [branch] * len(ids)
        self.answers += [-1 if answer is None else answer] * len(ids)


def add_turn(row: Row, tokenizer: Tokenizer, before: str, qa: scenes.QA, branch: int, answer: int) -> None:
    """One question and its answer; `before` is what the turn's text begins with."""
    row.add(tokenizer.encode(f"{before}{qa.question}<|im_end|>\n<|im_start|>assistant\n").ids, branch)
    row.add([*answer_ids(tokenizer, qa.task, qa.answer), *tokenizer.encode("<|im_end|>").ids], branch, answer)
    row.add(tokenizer.encode("\n").ids, branch)


def chat_rows(
    tokenizer: Tokenizer, num_images: int, qas: Sequence[scenes.QA], manner: str, first_answer: int
) -> list[Row]:
    """Rows of the chats about a sample. manner: "first", the picture before the question, all questions branches of one row;
    "last", the picture after the question, a row each; "talk", the questions in pairs, the second following the first's answer."""
    user, pictures = "<|im_start|>user\n", VISION * num_images
    rows = []
    if manner == "last":
        for n, qa in enumerate(qas):
            row = Row([], [], [], [])
            add_turn(row, tokenizer, user, scenes.QA(qa.task, qa.question + pictures, qa.answer), 0, first_answer + n)
            rows.append(row)
        return rows
    row = Row([], [], [], [])
    row.add(tokenizer.encode(user + pictures).ids, 0)
    for n, qa in enumerate(qas):
        follows = manner == "talk" and n % 2 == 1
        add_turn(row, tokenizer, user if follows else "", qa, 1 + (n // 2 if manner == "talk" else n), first_answer + n)
    return [row]


def expand(row: Row, image_token_id: int, num_rows: int) -> Row:
    """The row with each placeholder repeated for the rows of its image."""
    at = [n for n, i in enumerate(row.ids) for _ in range(num_rows if i == image_token_id else 1)]
    return Row(
        ids=[row.ids[n] for n in at],
        learned=[row.learned[n] for n in at],
        branch=[row.branch[n] for n in at],
        answers=[row.answers[n] for n in at],
    )


def positions_of(row: Row, cfg: processing.Qwen2VLProcessing, layouts: Sequence[MediaLayout]) -> Tensor:
    """(3, L): each branch goes on from the end of the row's beginning."""
    start = row.branch.count(0)
    parts, following = processing.positions(cfg, row.ids[:start], {"image": layouts})
    branches = [torch.arange(row.branch.count(b)) for b in range(1, max(row.branch) + 1)]
    return torch.cat((parts, *((b + following).expand(3, -1) for b in branches)), 1)


def make_batch(
    tokenizer: Tokenizer,
    cfg: processing.Qwen2VLProcessing,
    seed: int,
    num_pictures: int,
    *,
    split: str = "train",
    num_questions: int = 6,
) -> TrainingBatch:
    """A batch of num_pictures samples of one picture size, deterministic in its arguments."""
    rng = random.Random(f"{split}/{seed}")
    size = rng.choice(scenes.SIZES[split])
    layout = processing.layout(cfg, size[::-1])
    # Rows are padded to the longest of the batch, so pairs of pictures and each manner of chat have batches of their own.
    is_pairs = rng.random() < PAIRS_SHARE
    manner = "first" if split != "train" else rng.choices(list(MANNERS), list(MANNERS.values()))[0]
    kinds = KIND_WEIGHTS if min(size) >= SMALLEST_CHART else {**KIND_WEIGHTS, "chart": 0}
    images: list[np.ndarray] = []
    cells: list[np.ndarray] = []
    tasks: list[str] = []
    rows: list[tuple[Row, Tensor, Tensor]] = []
    for _ in range(num_pictures):
        kind = "pair" if is_pairs else rng.choices(list(kinds), list(kinds.values()))[0]
        sample, pictured = scenes.compose(
            rng.getrandbits(48), split=split, size=size, kind=kind, num_questions=num_questions
        )
        layouts = [layout] * len(sample.images)
        for short in chat_rows(tokenizer, len(sample.images), sample.qas, manner, len(tasks)):
            row = expand(short, cfg.image_token_id, layout.num_rows)
            index = index_features(row.ids, cfg.image_token_id)
            rows.append(
                (
                    row,
                    torch.where(index >= 0, index + len(images) * layout.num_rows, -1),
                    positions_of(row, cfg, layouts),
                )
            )
        tasks += [qa.task for qa in sample.qas]
        images += [np.asarray(image) for image in sample.images]
        cells += [cell_targets(scene) for scene in pictured]
    return _pad(np.stack(images), np.concatenate(cells), rows, tuple(tasks))


def _pad(
    images: np.ndarray, cells: np.ndarray, rows: list[tuple[Row, Tensor, Tensor]], tasks: tuple[str, ...]
) -> TrainingBatch:
    """Rows padded on the right to one length, a multiple of 16; no other token attends there."""
    length = -(-max(len(row.ids) for row, *_ in rows) // 16) * 16
    shape = (len(rows), length)
    ids, index, branch, answers = (torch.full(shape, fill) for fill in (0, -1, -1, -1))
    positions = torch.zeros(3, *shape, dtype=torch.int64)
    learned = torch.zeros(shape, dtype=torch.bool)
    for r, (row, row_index, row_positions) in enumerate(rows):
        n = len(row.ids)
        ids[r, :n], branch[r, :n], answers[r, :n] = (torch.tensor(xs) for xs in (row.ids, row.branch, row.answers))
        index[r, :n], positions[:, r, :n], learned[r, :n] = row_index, row_positions, torch.tensor(row.learned)
    # Position t predicts token t + 1, if that is learned.
    learned, answers = learned.roll(-1, 1), answers.roll(-1, 1)
    lengths = torch.bincount(answers[learned], minlength=len(tasks))
    return TrainingBatch(
        images=torch.from_numpy(images),
        cells=torch.from_numpy(cells),
        ids=ids,
        feature_index=index,
        branch=branch,
        positions=positions,
        labels=torch.where(learned, ids.roll(-1, 1), IGNORED),
        # Long answers count more than short ones, but less than by their length.
        label_weight=learned / lengths[answers.clamp(min=0)].clamp(min=1).sqrt(),
        answers=answers,
        tasks=tasks,
    )


class BatchStream(IterableDataset):
    """Endless batches; worker w of n makes batches w, w + n, w + 2n, ... counted from first_seed."""

    def __init__(
        self, tokenizer_file: str, cfg: processing.Qwen2VLProcessing, first_seed: int, num_pictures: int
    ) -> None:
        self.tokenizer_file, self.cfg, self.first_seed, self.num_pictures = (
            tokenizer_file,
            cfg,
            first_seed,
            num_pictures,
        )

    def __iter__(self) -> Iterator[TrainingBatch]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        tokenizer = Tokenizer.from_file(self.tokenizer_file)
        seed, step = (self.first_seed, 1) if worker is None else (self.first_seed + worker.id, worker.num_workers)
        while True:
            yield make_batch(tokenizer, self.cfg, seed, self.num_pictures)
            seed += step


def stream(
    tokenizer_file: str, cfg: processing.Qwen2VLProcessing, *, first_seed: int, num_pictures: int, num_workers: int
) -> Iterator[TrainingBatch]:
    """Batches in the order of their seeds, made by num_workers processes."""
    dataset = BatchStream(tokenizer_file, cfg, first_seed, num_pictures)
    prefetch = 4 if num_workers else None
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=prefetch,
            pin_memory=torch.cuda.is_available(),
        )
    )
