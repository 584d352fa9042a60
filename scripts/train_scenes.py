"""Train `scenes` from scratch with vlmfx's own pure functions under autograd.

    python scripts/train_scenes.py --out DIR [--minutes 22] [--stop-after M]      # the same command again resumes

The learning rate follows the time trained, of which --minutes is the whole. DIR/state.pt holds all that a resumed run needs;
DIR/model is the checkpoint folder, written at the end of each run."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import scenes
import torch
import torch.nn.functional as F
from scenes_batches import IGNORED, TrainingBatch, make_batch, stream
from scenes_checkpoint import build_tokenizer, save_weights, write_folder
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from vlmfx import weights
from vlmfx.models import qwen2_vl
from vlmfx.models.layers import Batch
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.ops.patches import pack_patches
from vlmfx.processing import qwen2_vl as processing
from vlmfx.tree import Tree, items, leaves, tree_map

CORPUS_SAMPLES = 4000
MAX_SKIPPED = 40


def corpus(num_samples: int) -> Iterator[str]:
    """Questions and worded answers, for the tokenizer; what is read off a picture stays out, so that it is spelled."""
    for seed in range(num_samples):
        for qa in scenes.sample(seed).qas:
            yield qa.question
            if qa.task in ("describe", "position", "compare", "shape", "colour", "yesno"):
                yield qa.answer


def row_losses(
    params: Tree, cfg: qwen2_vl.Qwen2VLConfig, vision: processing.Qwen2VLProcessing, batch: TrainingBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """(cross entropy, weight, whether the most likely token is right), each over the answer tokens, and their rows.

    The pictures are encoded once; every row about a picture gathers the same features."""
    num_images, height, width, _ = batch.images.shape
    device = batch.images.device
    frames = batch.images[:, None].expand(-1, vision.temporal_patch_size, -1, -1, -1)
    patches = pack_patches(frames, vision.patch_size, vision.merge_size)
    grid = processing.patch_positions(height // vision.patch_size, width // vision.patch_size, vision.merge_size).to(
        device
    )
    inputs = VisionInputs(
        patches=patches,
        position_ids=grid.repeat(num_images, 1),
        seq_lens=(len(grid),) * num_images,
        mean=vision.mean,
        std=vision.std,
    )
    features = qwen2_vl.encode(params, cfg, inputs)
    rows, length = batch.ids.shape
    x = qwen2_vl.merge(params, cfg, batch.ids.flatten(), features, batch.feature_index.flatten())
    hidden, _ = qwen2_vl.forward(params, cfg, x, batch.positions.flatten(1), None, Batch(seq_lens=(length,) * rows), ())
    labels = batch.labels.flatten()
    at = (labels != IGNORED).nonzero().squeeze(1)
    logits = qwen2_vl.logits(params, cfg, hidden[at]).float()
    entropy = F.cross_entropy(logits, labels[at], reduction="none")
    return entropy, batch.label_weight.flatten()[at], torch.stack((logits.argmax(-1) == labels[at], at // length))


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
        _, _, hits = row_losses(params, cfg, vision, batch.to(device))
        wrong = set(hits[1][hits[0] == 0].tolist())
        for row, task in enumerate(batch.tasks):
            right[task].append(row not in wrong)
    return {task: sum(hits) / len(hits) for task, hits in sorted(right.items())}


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
    parser.add_argument("--eval-every", type=int, default=1000, metavar="STEPS")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    folder = args.out / "model"
    if not (folder / "tokenizer.json").exists():
        write_folder(folder, build_tokenizer(corpus(CORPUS_SAMPLES)))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    cfg = qwen2_vl.config(json.loads((folder / "config.json").read_text()))
    vision = processing.config(json.loads((folder / "preprocessor_config.json").read_text()), cfg)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward gave NaN within 500 steps (torch 2.11, H200)
    params = tree_map(lambda p: p.requires_grad_(), weights.init(qwen2_vl.param_specs(cfg), device=device))
    matrices = [p for p in leaves(params) if p.ndim > 1]
    vectors = [p for p in leaves(params) if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    step, trained, skipped = 0, 0.0, 0
    if (args.out / "state.pt").exists():
        state = torch.load(args.out / "state.pt", map_location=device, weights_only=True)
        for p, saved in zip(leaves(params), state["params"], strict=True):
            p.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        step, trained = state["step"], state["trained"]
    held_out = [make_batch(tokenizer, vision, seed, 32, split="heldout") for seed in range(12 if args.workers else 2)]
    batches = stream(
        str(folder / "tokenizer.json"), vision, first_seed=step, num_pictures=args.pictures, num_workers=args.workers
    )
    bar = tqdm(batches, initial=step, unit="step", mininterval=20, file=sys.stdout)
    recent: list[Tensor] = []
    start = time.monotonic() - trained
    stop_at = min(args.minutes * 60, trained + args.stop_after * 60)
    for batch in bar:
        trained = time.monotonic() - start
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(trained / (args.minutes * 60), args.lr)
        compute = tree_map(lambda p: p.to(dtype), params)
        entropy, weight, _ = row_losses(compute, cfg, vision, batch.to(device))
        loss = (entropy * weight).sum() / weight.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if torch.isfinite(torch.nn.utils.clip_grad_norm_(leaves(params), 1.0)):
            optimizer.step()
            recent.append(loss.detach())
        else:
            skipped += 1
            bad = [name for name, p in items(params) if p.grad is None or not torch.isfinite(p.grad).all()]
            print(
                f"\nstep {step}: loss {loss.item()}, {len(bad)} gradients not finite, from {bad[0]} to {bad[-1]}; skipped; "
                f"entropy finite {torch.isfinite(entropy).all().item()}, images {tuple(batch.images.shape)}, ids {tuple(batch.ids.shape)}",
                flush=True,
            )
            if skipped > MAX_SKIPPED:
                raise SystemExit("too many gradients are not finite; lower --lr")
        step += 1
        is_last = step == args.max_steps or trained > stop_at
        if step % args.eval_every == 0 or is_last:
            shown = accuracy(tree_map(lambda p: p.detach().to(dtype), params), cfg, vision, held_out)
            mean_loss = torch.stack(recent).mean().item()
            print(
                f"\nstep {step} after {trained:.0f} s: loss {mean_loss:.4f}, held out "
                + " ".join(f"{task} {share:.3f}" for task, share in shown.items()),
                flush=True,
            )
            recent = []
        if is_last:
            break
    state = {
        "params": [p.detach() for p in leaves(params)],
        "optimizer": optimizer.state_dict(),
        "step": step,
        "trained": trained,
    }
    torch.save(state, args.out / "state.pt")
    save_weights(folder, cfg, params)
    if args.export:
        write_folder(args.export, tokenizer)
        save_weights(args.export, cfg, params, max_shard_bytes=15_000_000)
    print(f"{step} steps in {trained / 60:.1f} of {args.minutes} minutes; checkpoint in {folder}")


if __name__ == "__main__":
    main()
