"""Time to the first token and time per token on a GPU, through LLM, beside what vLLM took for the same work.

    python scripts/bench_gpu.py FOLDER... [--batches 1,8,32,128] [--sides 448x448,1000x700] [--out FILE] [--profile]

FOLDER has config.json, tokenizer and preprocessor of a Qwen2-VL model; weights are random, in bfloat16. Each request has an image of
noise of its own and 64 characters, and answers 129 tokens, greedily; nothing is cached from one request to the next. t1 is the wall time
of a batch with one token each, preprocessing (`exact`) included; TPOT is (t129 − t1) / 128. vLLM 0.25.0 was measured on one H200."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

import vlmfx
from vlmfx import checkpoint
from vlmfx.tree import tree_map
from vlmfx.weights import ParamSpec

PROMPT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>" + "x" * 64 + "<|im_end|>\n<|im_start|>assistant\n"
)
NUM_TOKENS = 129
# hidden size → batch → (t1 in ms, TPOT in ms) of vLLM, with images of 448 × 448
VLLM = {
    3584: {1: (65.9, 4.82), 8: (129.0, 5.02), 32: (532.0, 5.11), 128: (2244.0, 6.57)},
    1536: {1: (46.4, 2.15), 8: (126.0, 2.43), 32: (452.0, 2.75), 128: (1352.0, 5.71)},
}
HOST_GAP_US = 10
READ_BANDWIDTH = 4.5e12  # bytes a second, of one H200


def random_model(folder: str) -> checkpoint.Model:
    """The model of a folder's config, with random weights made on the GPU."""
    plan = checkpoint.blueprint(folder, dtype="bfloat16", device="cuda", max_model_len=2048)
    generator = torch.Generator("cuda").manual_seed(0)

    def one(s: ParamSpec) -> torch.Tensor:
        if s.init != "normal":
            return torch.full(s.shape, float(s.init == "ones"), dtype=torch.bfloat16, device="cuda")
        return torch.empty(s.shape, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02, generator=generator)

    p = plan.programs
    return checkpoint.Model(
        name=folder,
        functions=p.functions,
        config=p.config,
        params=tree_map(one, plan.specs),
        processor=plan.processor,
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        eos_token_ids=plan.eos_token_ids,
    )


def requests(count: int, width: int, height: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    images = [Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)) for _ in range(count)]
    return [{"prompt": PROMPT, "multi_modal_data": {"image": image}} for image in images]


def seconds(llm: vlmfx.LLM, asked: list[dict[str, Any]], num_tokens: int) -> float:
    params = vlmfx.SamplingParams.greedy(max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    torch.cuda.synchronize()
    start = time.perf_counter()
    outputs = llm.generate(asked, params, use_tqdm=False)
    took = time.perf_counter() - start
    assert all(len(o.outputs[0].token_ids) == num_tokens for o in outputs), [o.error for o in outputs if o.error][:1]
    return took


def row(llm: vlmfx.LLM, batch: int, side: tuple[int, int], rng: np.random.Generator, rounds: int) -> str:
    """A line of the table."""

    def timed(num_tokens: int) -> float:
        return seconds(llm, requests(batch, *side, rng), num_tokens)

    timed(4)
    made = llm.executor.memory().num_programs
    first = median(timed(1) for _ in range(rounds)) * 1e3
    whole = min(timed(NUM_TOKENS) for _ in range(2)) * 1e3
    step = (whole - first) / (NUM_TOKENS - 1)
    new = llm.executor.memory().num_programs - made
    text = llm.model.config.text
    theirs = VLLM.get(text.hidden_size, {}).get(batch) if side == (448, 448) else None
    params = llm.model.params["text"]
    read = (
        sum(t.nbytes for t in torch.utils._pytree.tree_leaves(params["layers"]))
        + params.get("head", params["embed"]).nbytes
    )
    share = read / READ_BANDWIDTH * 1e3 / step
    ratios = ("", "", "", "") if theirs is None else (*theirs, f"{theirs[0] / first:.2f}", f"{theirs[1] / step:.2f}")
    cells = [
        f"{text.hidden_size}", f"{side[0]}×{side[1]}", f"{batch}", f"{first:.1f}", ratios[0], ratios[2], f"{step:.2f}",
        ratios[1], ratios[3], f"{share:.0%}", f"{batch * NUM_TOKENS / whole * 1e3:.0f}", f"{new}",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def idle(llm: vlmfx.LLM, batch: int, rng: np.random.Generator) -> str:
    """How much of 100 decode steps the device does nothing."""
    from torch.profiler import ProfilerActivity, profile

    asked = requests(batch, 448, 448, rng)
    params = vlmfx.SamplingParams.greedy(max_tokens=140, ignore_eos=True, detokenize=False)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        llm.generate(asked, params, use_tqdm=False)
    spans = sorted((e.time_range.start, e.time_range.end) for e in seen.events() or [] if e.device_type.name == "CUDA")
    # The last 100 steps are all decoding: the last 100/139 of what came after prefill, cut by time.
    end = spans[-1][1]
    begin = end - (end - spans[0][0]) * 0.6
    gaps, reached = [], begin
    for first, last in spans:
        if last > reached:
            gaps.append(max(first - reached, 0.0))
            reached = last
    whole, waiting = end - begin, sum(gap for gap in gaps if gap > HOST_GAP_US)
    return (
        f"batch {batch}: of {whole / 1e3:.0f} ms of decoding the device waits {waiting / whole:.1%} for the host (gaps above "
        f"{HOST_GAP_US} µs) and {(sum(gaps) - waiting) / whole:.1%} between kernels"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--sides", default="448x448")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    lines = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, vlmfx {vlmfx.__version__}, bfloat16.",
        "",
        "| hidden | image | batch | t1 ms | vLLM | ratio | TPOT ms | vLLM | ratio | of the weights' read | tokens/s | captured meanwhile |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if args.out is not None:
            args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")

    for folder in args.folders:
        options: dict[str, Any] = {"max_num_seqs": 128, "enable_prefix_caching": False, "mm_feature_cache_bytes": 0}
        llm, rng = vlmfx.LLM(random_model(folder), **options), np.random.default_rng(0)
        llm.warm_up(use_tqdm=False)
        for side in args.sides.split(","):
            width, height = map(int, side.split("x"))
            for batch in map(int, args.batches.split(",")):
                say(row(llm, batch, (width, height), rng, args.rounds))
        if args.profile:
            say("\n" + "; ".join(idle(llm, batch, rng) for batch in (1, 8, 32)) + ".")
        del llm
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
