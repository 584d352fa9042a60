"""Train `scenes` from scratch with vlmfx's own pure functions under autograd.

    python scripts/train_scenes.py --out DIR [--minutes 22] [--stop-after M]      # the same command again resumes

The learning rate follows the time trained, of which --minutes is the whole. DIR/state.pt holds all that a resumed run needs;
DIR/model is the checkpoint folder, written at the end of each run. A run that is killed goes on from the last evaluation."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import scenes
import torch
import torch.nn.functional as F
from muon import Muon
from scenes_batches import IGNORED, TrainingBatch, make_batch, stream
from scenes_checkpoint import build_tokenizer, save_weights, write_folder
from scenes_targets import CLASSES
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from vlmfx import weights
from vlmfx.checkpoint import load_processor
from vlmfx.models import qwen2_vl
from vlmfx.models.layers import Batch
from vlmfx.models.vision_inputs import VisionInputs, cumulative
from vlmfx.ops.pack_patches import patch_offsets
from vlmfx.processing import qwen2_vl as processing
from vlmfx.tree import Tree, items, leaves, tree_map
from vlmfx.weight_files import WeightFiles

CORPUS_SAMPLES = 4000
MAX_SKIPPED = 40


def corpus(num_samples: int) -> Iterator[str]:
    """Questions and worded answers, for the tokenizer; what is read off a picture stays out, so that it is spelled."""
    for seed in range(num_samples):
        for qa in scenes.sample(seed).qas:
            yield qa.question
            if qa.task in ("describe", "position", "compare", "shape", "colour", "yesno"):
                yield qa.answer


class Losses(NamedTuple):
    """Cross entropy, weight, correctness and answer number of each answer token; and the mean entropy of what cells show."""

    entropy: Tensor
    weight: Tensor
    is_right: Tensor
    answer: Tensor
    cells: Tensor


def branch_mask(branch: Tensor) -> Tensor:
    """branch (S, T) → (S, 1, T, T) bool: a token attends to itself and to earlier ones of its branch and of the row's beginning."""
    length = branch.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    of_beginning = (branch == 0)[:, None]
    return (causal & (of_beginning | (branch[:, :, None] == branch[:, None])))[:, None]


def batch_losses(
    params: Tree, cfg: qwen2_vl.Qwen2VLConfig, vision: processing.Qwen2VLProcessing, batch: TrainingBatch
) -> Losses:
    """The losses of a batch; params holds the model's parameters and "cells", the matrix of the head that is thrown away."""
    num_images, height, width, _ = batch.images.shape
    device = batch.images.device
    grid = processing.patch_positions(height // vision.patch_size, width // vision.patch_size, vision.merge_size).to(
        device
    )
    offsets, row_stride = patch_offsets(
        [(1, height, width)] * num_images, vision.patch_size, vision.temporal_patch_size, vision.merge_size
    )
    inputs = VisionInputs(
        pixels=batch.images.flatten(),
        patch_offsets=offsets.to(device),
        row_stride=row_stride.to(device),
        position_ids=grid.repeat(num_images, 1),
        cu_seqlens=cumulative([len(grid)] * num_images).to(device),
        mean=vision.mean,
        std=vision.std,
    )
    features = qwen2_vl.encode(params, cfg, inputs)
    x = qwen2_vl.merge(params, cfg, batch.ids.flatten(), features, batch.feature_index.flatten())
    attention = Batch(mask=branch_mask(batch.branch))
    hidden, _ = qwen2_vl.forward(params, cfg, x, batch.positions.flatten(1), None, attention, ())
    labels = batch.labels.flatten()
    at = (labels != IGNORED).nonzero().squeeze(1)
    logits = qwen2_vl.logits(params, cfg, hidden[at]).float()
    return Losses(
        entropy=F.cross_entropy(logits, labels[at], reduction="none"),
        weight=batch.label_weight.flatten()[at],
        is_right=logits.argmax(-1) == labels[at],
        answer=batch.answers.flatten()[at],
        cells=cells_loss(F.linear(F.rms_norm(features, features.shape[-1:]), params["cells"]).float(), batch.cells),
    )


def cells_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy over cells and targets; most cells show nothing, which counts a tenth."""
    total = logits.new_zeros(())
    for part, target, classes in zip(logits.split(CLASSES, -1), targets.unbind(-1), CLASSES, strict=True):
        weight = torch.ones(classes, device=logits.device)
        weight[0] = 0.1
        total = total + F.cross_entropy(part, target, weight=weight)
    return total / len(CLASSES)


def learning_rate(progress: float, peak: float, warmup: float = 0.015) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak; progress runs from 0 to 1."""
    if progress < warmup:
        return peak * max(progress / warmup, 0.01)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))))


@torch.no_grad()
def accuracy(
    params: Tree, cfg: qwen2_vl.Qwen2VLConfig, vision: processing.Qwen2VLProcessing, batches: list[TrainingBatch]
) -> dict[str, float]:
    """Share of answers whose every token is the most likely one given those before it, by task: the greedy answer is then right."""
    right: dict[str, list[bool]] = defaultdict(list)
    device = leaves(params)[0].device
    for batch in batches:
        losses = batch_losses(params, cfg, vision, batch.to(device))
        wrong = set(losses.answer[~losses.is_right].tolist())
        for answer, task in enumerate(batch.tasks):
            right[task].append(answer not in wrong)
    return {task: sum(hits) / len(hits) for task, hits in sorted(right.items())}


def optimizers(params: Tree, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the network, AdamW for embeddings, the patch projection, norms, biases and the cells' head."""
    hidden: list[Tensor] = []
    outer: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, p in items(params):
        is_outer = name in ("cells", "text.embed", "vision.patch")
        (vectors if p.ndim == 1 else outer if is_outer else hidden).append(p)
    groups = [{"params": outer, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return [
        Muon(hidden, lr=lr, weight_decay=0.05),
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=outer[0].is_cuda),
    ]


def with_replay(
    batches: Iterator[TrainingBatch], device: torch.device, size: int, times: int
) -> Iterator[TrainingBatch]:
    """Each new batch and, after it, times − 1 earlier ones, drawn from the last `size`: making pictures is what takes longest."""
    rng = random.Random(0)
    kept: deque[TrainingBatch] = deque(maxlen=size)
    for batch in batches:
        kept.append(batch.to(device))
        yield kept[-1]
        for _ in range(times - 1):
            yield rng.choice(kept)


def read_weights(folder: Path, specs: Tree, device: torch.device) -> Tree:
    """The parameters of a checkpoint folder, in float32."""
    with WeightFiles(folder, qwen2_vl.KEY_PREFIXES) as files:
        return weights.load(specs, files.read, dtype=torch.float32, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--export", type=Path, help="another folder for the checkpoint, written in shards of 15 MB")
    parser.add_argument("--minutes", type=float, default=22.0, help="the whole training, over all runs")
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="MINUTES", help="end this run and save")
    parser.add_argument("--max-steps", type=int, help="end after this many steps in all")
    parser.add_argument("--pictures", type=int, default=128, help="samples a step")
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--cells", type=float, default=0.5, help="weight of the loss on what each cell shows")
    parser.add_argument("--replay", type=int, default=2, help="steps for each batch that is made")
    parser.add_argument("--replay-from", type=int, default=400, help="how many batches are kept for that")
    parser.add_argument("--init", type=Path, help="a checkpoint folder to start from")
    parser.add_argument(
        "--first-batch", type=int, default=0, help="number of the first batch: others than an earlier run drew"
    )
    parser.add_argument("--eval-every", type=int, default=1000, metavar="STEPS")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    folder = args.out / "model"
    if not (folder / "tokenizer.json").exists():
        given = args.init and Tokenizer.from_file(str(args.init / "tokenizer.json"))
        write_folder(folder, given or build_tokenizer(corpus(CORPUS_SAMPLES)))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    cfg = qwen2_vl.config(json.loads((folder / "config.json").read_text()))
    vision = load_processor(folder, "qwen2_vl", cfg).config
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward gave NaN within 500 steps (torch 2.11, H200)
    specs = qwen2_vl.param_specs(cfg)
    params = weights.init(specs, device=device) if args.init is None else read_weights(args.init, specs, device)
    params["cells"] = torch.randn(sum(CLASSES), cfg.text.hidden_size, device=device) * 0.02
    params = tree_map(lambda p: p.requires_grad_(), params)
    steppers = optimizers(params, args.lr)
    step, trained, skipped = 0, 0.0, 0
    if (args.out / "state.pt").exists():
        state = torch.load(args.out / "state.pt", map_location=device, weights_only=True)
        for p, saved in zip(leaves(params), state["params"], strict=True):
            p.data.copy_(saved)
        for stepper, saved in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(saved)
        step, trained = state["step"], state["trained"]
    held_out = [make_batch(tokenizer, vision, seed, 32, split="heldout") for seed in range(12 if args.workers else 2)]
    batches = stream(
        str(folder / "tokenizer.json"),
        vision,
        first_seed=args.first_batch + step // args.replay,
        num_pictures=args.pictures,
        num_workers=args.workers,
    )
    bar = tqdm(
        with_replay(batches, device, args.replay_from, args.replay),
        initial=step,
        unit="step",
        mininterval=20,
        file=sys.stdout,
    )
    recent: list[Tensor] = []
    start = time.monotonic() - trained
    stop_at = min(args.minutes * 60, trained + args.stop_after * 60)
    for batch in bar:
        trained = time.monotonic() - start
        for group in (g for stepper in steppers for g in stepper.param_groups):
            group["lr"] = learning_rate(trained / (args.minutes * 60), args.lr)
        compute = tree_map(lambda p: p.to(dtype), params)
        losses = batch_losses(compute, cfg, vision, batch)
        loss = (losses.entropy * losses.weight).sum() / losses.weight.sum()
        for p in leaves(params):
            p.grad = None
        (loss + args.cells * losses.cells).backward()
        if torch.isfinite(torch.nn.utils.clip_grad_norm_(leaves(params), 1.0)):
            for stepper in steppers:
                stepper.step()
            recent.append(torch.stack((loss.detach(), losses.cells.detach())))
        else:
            skipped += 1
            print(f"\nstep {step}: loss {loss.item()}, the gradient is not finite; skipped", flush=True)
            if skipped > MAX_SKIPPED:
                raise SystemExit("too many gradients are not finite; lower --lr")
        step += 1
        is_last = trained > stop_at or (args.max_steps is not None and step >= args.max_steps)
        if step % args.eval_every == 0 or is_last:
            shown = accuracy(tree_map(lambda p: p.detach().to(dtype), params), cfg, vision, held_out)
            answers_loss, cells = torch.stack(recent).mean(0).tolist() if recent else (math.nan, math.nan)
            print(
                f"\nstep {step} after {trained:.0f} s: loss {answers_loss:.4f}, of cells {cells:.4f}; held out  "
                + " ".join(f"{task} {share:.3f}" for task, share in shown.items()),
                flush=True,
            )
            recent = []
            state = {
                "params": [p.detach() for p in leaves(params)],
                "optimizers": [s.state_dict() for s in steppers],
                "step": step,
                "trained": trained,
            }
            torch.save(state, args.out / "state.tmp")
            os.replace(args.out / "state.tmp", args.out / "state.pt")
        if is_last:
            break
    del params["cells"]
    save_weights(folder, cfg, params)
    if args.export:
        write_folder(args.export, tokenizer)
        save_weights(args.export, cfg, params, max_shard_bytes=15_000_000)
    print(f"{step} steps in {trained / 60:.1f} of {args.minutes} minutes; checkpoint in {folder}")


if __name__ == "__main__":
    main()
