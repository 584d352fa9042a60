"""A bundle beside its model run as it is: decode steps taking turns, their matrix products alone, and start to first answer.

    python scripts/bench_bundle.py BUNDLE [--batch 1] [--context 200] [--rounds 200]

BUNDLE is what `vlmfx export` wrote for a CPU, of a Qwen2-VL whose decode has a rung for the batch."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from bench_cpu import matmuls

import vlmfx
from vlmfx import hub
from vlmfx.compile.executor import EagerExecutor, Executor
from vlmfx.engine import runner

START = """
import sys
import vlmfx
picture = {"type": "image", "image": sys.argv[2]}
question = {"type": "text", "text": "How many objects are there?"}
(output,) = vlmfx.generate(sys.argv[1], {"messages": [{"role": "user", "content": [picture, question]}]})
print(output.outputs[0].text)
"""


def start_s(model: str | None) -> float:
    """Seconds from the start of a process to its answer to a question about the shipped picture, or without a model to `import torch`."""
    program = ["import torch"] if model is None else [START, model, str(hub.SCENES.parent / "demo.png")]
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", *program], check=True, capture_output=True)
    return time.perf_counter() - begin


def decode_step(model: vlmfx.Model, executor: Executor, batch: int, context: int) -> Callable[[], object]:
    """One step of `batch` sequences of so many tokens, as the engine runs it."""
    assert executor.layout is not None
    most, ids = executor.layout.max_blocks, torch.arange(7, 7 + batch)
    blocks = [list(range(row * most, (row + 1) * most)) for row in range(batch)]
    rows = [runner.Row(position=context - 1, context_len=context, blocks=b, max_len=context) for b in blocks]
    return lambda: runner.decode(model, ids, rows, executor.cache, None, executor)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args(argv)
    llm = vlmfx.LLM(args.bundle, strict=True)
    model = llm.model
    floor = matmuls(model, args.batch)
    as_it_is = EagerExecutor(model.program_set, model.params, layout=llm.executor.layout)
    sides: dict[str, Callable[[], object]] = {
        "as it is": decode_step(model, as_it_is, args.batch, args.context),
        "bundle": decode_step(model, llm.executor, args.batch, args.context),
        "matrix products": floor,
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    with torch.no_grad():
        for _ in range(args.rounds):
            for name, run in sides.items():
                begin = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - begin)
    own, compiled, products = (median(values[args.rounds // 10 :]) * 1e3 for values in times.values())
    starts = [start_s(args.bundle) for _ in range(5)]
    print(
        f"{str(model.dtype).removeprefix('torch.')}, batch {args.batch}, context {args.context}, {torch.get_num_threads()} threads: "
        f"as it is {own:.2f} ms, bundle {compiled:.2f} ms ({own / compiled:.2f} times as fast), matrix products alone {products:.2f} ms "
        f"(the bundle takes {compiled / products:.2f} of them); start to answer {median(starts):.2f} s, of which `import torch` "
        f"{start_s(None):.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
