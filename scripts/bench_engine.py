"""A trace of 64 mixed requests on the CPU: vlmfx's engine beside transformers' generate in static batches of 8, and where the gain is from.

    python scripts/bench_engine.py [--dtype float32] [--rounds 3]

The trace is made from a seed: 16 generated pictures, four questions about each, answers of 4 to 64 tokens. Both sides have the shipped
model, threads and dtype, decode greedily to the length asked for, and take turns; in float32 their tokens must be equal. A batch runs
until its longest answer is done. Of the gain's causes each is switched off in turn: one request's images and prompts are not kept for
others; and requests go in static batches of 8, too."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import scenes
import torch
from bench_cpu import Question, Reference

import vlmfx
from vlmfx import hub

NUM_PICTURES, NUM_QUESTIONS, BATCH = 16, 4, 8
ASKED = ["What colours are there?", "How many objects are there?", "Describe the picture.", "Is there a red circle?"]


def trace() -> list[tuple[Question, int]]:
    """(question, tokens of its answer), those about one picture apart from each other."""
    draw = random.Random(0)
    images = [scenes.sample(seed, split="heldout", kind="objects").images[0] for seed in range(NUM_PICTURES)]
    asked = [(Question(image=image, text=text), draw.choice([4, 8, 16, 32, 64])) for text in ASKED for image in images]
    draw.shuffle(asked)
    return asked


def run_vlmfx(
    llm: vlmfx.LLM, asked: Sequence[tuple[Question, int]], at_once: int
) -> tuple[float, list[tuple[int, ...]]]:
    """Seconds and tokens; the LLM answers so many at once."""
    llm.reset_prefix_cache()
    start, tokens = time.perf_counter(), []
    for first in range(0, len(asked), at_once):
        part = asked[first : first + at_once]
        params = [vlmfx.SamplingParams.greedy(max_tokens=n, ignore_eos=True) for _, n in part]
        outputs = llm.generate([{"messages": q.messages} for q, _ in part], params, use_tqdm=False)
        tokens += [o.outputs[0].token_ids for o in outputs]
    return time.perf_counter() - start, tokens


def run_transformers(
    reference: Reference, asked: Sequence[tuple[Question, int]]
) -> tuple[float, list[tuple[int, ...]]]:
    start, tokens = time.perf_counter(), []
    for first in range(0, len(asked), BATCH):
        part = asked[first : first + BATCH]
        made = reference.run([q for q, _ in part], max(n for _, n in part))
        tokens += [row[:n] for row, (_, n) in zip(made.tokens, part, strict=True)]
    return time.perf_counter() - start, tokens


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    asked = trace()
    model = vlmfx.load("scenes", dtype=args.dtype, device="cpu")
    assert model.processor.chat_template is not None
    reference = Reference(hub.SCENES, model.dtype, model.processor.chat_template)
    whole = vlmfx.LLM(model, max_num_seqs=16)
    unshared = vlmfx.LLM(model, max_num_seqs=16, enable_prefix_caching=False, mm_feature_cache_bytes=0)
    sides: dict[str, Callable[[], tuple[float, Any]]] = {
        "transformers, static batches of 8": lambda: run_transformers(reference, asked),
        "vlmfx": lambda: run_vlmfx(whole, asked, len(asked)),
        "vlmfx, nothing shared": lambda: run_vlmfx(unshared, asked, len(asked)),
        "vlmfx, nothing shared, static batches of 8": lambda: run_vlmfx(unshared, asked, BATCH),
    }
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds + 1):
        tokens = {}
        for name, run in sides.items():
            seconds, tokens[name] = run()
            taken[name].append(seconds)
        if args.dtype == "float32":
            wrong = [name for name in sides if tokens[name] != tokens["transformers, static batches of 8"]]
            if wrong:
                sys.exit(f"bench_engine: tokens of {wrong[0]} differ from those of transformers.")
    count, theirs = sum(n for _, n in asked), taken["transformers, static batches of 8"][1:]
    print(
        f"{len(asked)} requests, {count} tokens, {args.dtype}, {torch.get_num_threads()} threads; medians of {args.rounds} rounds.\n"
    )
    print("| side | s | tokens/s | ratio (least–most of a round) |\n|---|---|---|---|")
    for name, every in taken.items():
        ratios = [a / b for a, b in zip(theirs, every[1:], strict=True)]
        ends = f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        print(f"| {name} | {median(every[1:]):.2f} | {count / median(every[1:]):.0f} | {ends} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
