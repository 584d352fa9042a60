"""What sampling parameters cost a step on a GPU, those who did not ask for them included.

    python scripts/bench_parameters.py FOLDER [--batch 32]

FOLDER as for bench_gpu.py. A batch answers text prompts; each line has what the first request of it, or each of it, asks for beside
being greedy, the time of a step, and its ratio to that of a batch that asks for nothing."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from bench_gpu import random_model

import vlmfx

NUM_TOKENS = 129
CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "logprobs=5": {"logprobs": 5},
    "temperature, top_p, top_k": {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 1},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "logit_bias": {"logit_bias": dict.fromkeys(range(100), 1.0)},
    "bad_words (by the host)": {"bad_words": ["a bad word", "another one of them"]},
    "a JSON schema (by the host)": {
        "structured_outputs": vlmfx.StructuredOutputsParams(
            json={"type": "array", "items": {"type": "string", "minLength": 1000}, "minItems": 9}
        )
    },
}


def step_ms(llm: vlmfx.LLM, params: list[vlmfx.SamplingParams]) -> float:
    """A decode step: what 128 tokens more take."""
    prompts = [f"Question {n}: what is it?" for n in range(len(params))]

    def seconds(num_tokens: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        asked = [vlmfx.SamplingParams(**{**vars(p), "max_tokens": num_tokens}) for p in params]
        outputs = llm.generate(prompts, asked, use_tqdm=False)
        took = time.perf_counter() - start
        assert all(len(o.outputs[0].token_ids) == num_tokens for o in outputs), [o.error for o in outputs]
        return took

    seconds(3)
    return (min(seconds(NUM_TOKENS) for _ in range(3)) - min(seconds(1) for _ in range(3))) / (NUM_TOKENS - 1) * 1e3


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args(argv)
    llm = vlmfx.LLM(random_model(args.folder), max_num_seqs=args.batch)
    plain = vlmfx.SamplingParams.greedy(ignore_eos=True, detokenize=False)
    base = None
    print("| asked for | one of the batch, ms a step | ratio | all of the batch, ms | ratio |\n|---|---|---|---|---|")
    for name, options in CASES.items():
        asking = vlmfx.SamplingParams(**{**vars(plain), **options})
        try:
            times = [step_ms(llm, [*[asking] * count, *[plain] * (args.batch - count)]) for count in (1, args.batch)]
        except AssertionError as error:
            print(f"| {name} | not run: {str(error)[:120]} |||", flush=True)
            continue
        base = base or times[1]
        print(f"| {name} | " + " | ".join(f"{t:.2f} | {t / base:.2f}" for t in times) + " |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
