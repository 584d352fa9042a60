"""Training batches for `scenes`: pictures of one size and the token rows that ask about them, made by worker processes."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scenes
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vlmfx.processing import qwen2_vl as processing
from vlmfx.processing.inputs import index_features

IGNORED = -100
KIND_WEIGHTS = {"objects": 52, "text": 28, "chart": 20}
PAIRS_SHARE = 0.1
TALK_SHARE = 0.25
SMALLEST_CHART = 168
VISION = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """images (n, H, W, 3) uint8; ids, feature_index (S, T) int64; positions (3, S, T); labels (S, T): the id each position should
    predict, IGNORED where none; label_weight (S, T) float32; tasks: the task of each row, for the report."""

    images: Tensor
    ids: Tensor
    feature_index: Tensor
    positions: Tensor
    labels: Tensor
    label_weight: Tensor
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


def conversation(
    tokenizer: Tokenizer, num_images: int, qas: Sequence[scenes.QA], rng: random.Random
) -> tuple[list[int], list[bool]]:
    """Token ids of the chat about num_images pictures, and which of them the model must learn to write."""
    ids: list[int] = []
    learned: list[bool] = []

    def add(new: list[int], learn: bool) -> None:
        ids.extend(new)
        learned.extend([learn] * len(new))

    for turn, qa in enumerate(qas):
        pictures = VISION * num_images if turn == 0 else ""
        text = qa.question + pictures if rng.random() < 0.1 else pictures + qa.question
        add(tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n").ids, False)
        add([*answer_ids(tokenizer, qa.task, qa.answer), tokenizer.token_to_id("<|im_end|>")], True)
        add(tokenizer.encode("\n").ids, False)
    return ids, learned


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
    # Rows are padded to the longest of the batch, so pictures in pairs and conversations of two turns have batches of their own.
    is_pairs = rng.random() < PAIRS_SHARE
    is_talk = split == "train" and not is_pairs and rng.random() < TALK_SHARE
    kinds = KIND_WEIGHTS if min(size) >= SMALLEST_CHART else {**KIND_WEIGHTS, "chart": 0}
    images, rows, tasks = [], [], []
    for _ in range(num_pictures):
        kind = "pair" if is_pairs else rng.choices(list(kinds), list(kinds.values()))[0]
        sample = scenes.sample(rng.getrandbits(48), split=split, size=size, kind=kind, num_questions=num_questions)
        qas = list(sample.qas)
        talks = [[qa] for qa in qas[:-2]] + [qas[-2:]] if is_talk else [[qa] for qa in qas]
        for talk in filter(None, talks):
            ids, learned = conversation(tokenizer, len(sample.images), talk, rng)
            layouts = [layout] * len(sample.images)
            repeats = [layout.num_rows if i == cfg.image_token_id else 1 for i in ids]
            expanded, mask = ([x for x, n in zip(xs, repeats, strict=True) for _ in range(n)] for xs in (ids, learned))
            index = index_features(expanded, cfg.image_token_id)
            offset = len(images) * layout.num_rows
            rows.append(
                (
                    expanded,
                    mask,
                    torch.where(index >= 0, index + offset, -1),
                    processing.positions(cfg, expanded, layouts)[0],
                )
            )
            tasks.append(talk[0].task)
        images.extend(np.asarray(image) for image in sample.images)
    return _pad(images, rows, tuple(tasks))


def _pad(
    images: list[np.ndarray], rows: list[tuple[list[int], list[bool], Tensor, Tensor]], tasks: tuple[str, ...]
) -> TrainingBatch:
    """Rows padded on the right to one length, a multiple of 16; causal attention never looks there."""
    length = -(-max(len(ids) for ids, *_ in rows) // 16) * 16
    shape = (len(rows), length)
    ids_t, index_t = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
    labels, weight = torch.full(shape, IGNORED), torch.zeros(shape)
    positions_t = torch.zeros(3, *shape, dtype=torch.int64)
    for r, (ids, mask, index, positions) in enumerate(rows):
        n = len(ids)
        ids_t[r, :n] = torch.tensor(ids)
        index_t[r, :n] = index
        positions_t[:, r, :n] = positions
        learned = torch.tensor(mask[1:], dtype=torch.bool)
        labels[r, : n - 1] = torch.where(learned, ids_t[r, 1:n], IGNORED)
        weight[r, : n - 1] = (
            learned / learned.sum() ** 0.5
        )  # long answers count more than short ones, but less than by length
    return TrainingBatch(
        images=torch.from_numpy(np.stack(images)),
        ids=ids_t,
        feature_index=index_t,
        positions=positions_t,
        labels=labels,
        label_weight=weight,
        tasks=tasks,
    )


class BatchStream(IterableDataset):  # type: ignore[type-arg]
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
