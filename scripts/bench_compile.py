"""What compiling a decode step costs and gives, whole and as one block run L times: seconds to compile, milliseconds a step.

    python scripts/bench_compile.py [--layers 4,16,28] [--size tiny|2b|7b] [--batch 8] [--context 512] [--out FILE.md]

Random weights of Qwen2-VL's text half, cut to so many layers; eager beside both forms. On a GPU a step is a replay of a captured CUDA
graph, on a CPU a call. Each form starts from empty compile caches; the tokens of all forms must be equal before anything is timed, or
their logits close where the dtype is bfloat16."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vlmfx.compile import programs
from vlmfx.compile.layered import LayeredStep
from vlmfx.compile.programs import Step
from vlmfx.models import qwen2_vl
from vlmfx.models.layers import Batch, Cache
from vlmfx.ops.paged_decode_attention import TILE, DecodeWork, decode_work, num_items_for
from vlmfx.tree import Tree, tree_map
from vlmfx.weights import ParamSpec

BLOCK_SIZE = 16
# hidden, intermediate, heads, KV heads, vocabulary
SIZES = {"tiny": (256, 1024, 4, 2, 1024), "2b": (1536, 8960, 12, 2, 151936), "7b": (3584, 18944, 28, 4, 152064)}
Run = Callable[[Tree, Cache, Step], tuple[torch.Tensor, torch.Tensor]]


def config_of(size: str, num_layers: int) -> qwen2_vl.Qwen2VLConfig:
    """Qwen2-VL of a size, its text half cut to num_layers."""
    hidden, intermediate, heads, kv_heads, vocab = SIZES[size]
    vision = {"embed_dim": 64, "depth": 1, "num_heads": 1, "hidden_size": hidden}
    ids = {"image_token_id": 5, "video_token_id": 6, "vision_config": vision}
    text = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": num_layers,
        "vocab_size": vocab,
    }
    numbers = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 32768}
    half = hidden // heads // 2
    scaling = {"type": "mrope", "mrope_section": [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]}
    return qwen2_vl.config({**ids, **text, **numbers, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "rope_scaling": scaling})


def decode_inputs(cfg: qwen2_vl.Qwen2VLConfig, batch: int, context: int, device: torch.device) -> Step:
    """One new token in each of `batch` sequences of so many tokens, whose blocks lie scattered."""
    blocks = -(-context // BLOCK_SIZE)
    table = torch.randperm(batch * blocks, dtype=torch.int32).view(batch, blocks)
    slots = table[:, (context - 1) // BLOCK_SIZE] * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
    work = None
    if device.type == "cuda":
        num_cores = torch.cuda.get_device_properties(device).multi_processor_count
        items = decode_work([context] * batch, num_items_for(batch, cfg.text.num_kv_heads, num_cores), tile=TILE)
        work = DecodeWork(*(part.to(device) for part in items))
    return Step(
        ids=torch.arange(7, 7 + batch, device=device),
        positions=torch.full((3, batch), context - 1, device=device),
        batch=Batch(
            context_lens=torch.full((batch,), context, dtype=torch.int32, device=device),
            slot_mapping=slots.to(device),
            block_table=table.to(device),
            work=work,
        ),
    )


def cache_of(cfg: qwen2_vl.Qwen2VLConfig, inputs: Step, dtype: torch.dtype) -> Cache:
    """Random keys and values in all blocks."""
    assert inputs.batch.block_table is not None
    text, table = cfg.text, inputs.batch.block_table
    shape = (table.numel(), text.num_kv_heads, BLOCK_SIZE, text.head_dim)
    return [
        (torch.randn(shape, device=table.device, dtype=dtype), torch.randn(shape, device=table.device, dtype=dtype))
        for _ in range(text.num_layers)
    ]


def forms(cfg: qwen2_vl.Qwen2VLConfig) -> dict[str, Callable[[], Run]]:
    """Each form of a step, made anew."""
    compiled: Any = partial(torch.compile, fullgraph=True, dynamic=False)
    return {
        "eager": lambda: partial(programs.step, qwen2_vl, cfg),
        "whole": lambda: compiled(partial(programs.step, qwen2_vl, cfg)),
        "block": lambda: LayeredStep(qwen2_vl, cfg, compiled),
    }


def steps_ms(runs: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """Milliseconds of a step of each form, medians; on a CPU they take turns."""
    if device.type == "cuda":
        return [_replay_ms(run) for run in runs]
    rounds = [[_timed(run) for run in runs] for _ in range(40)]
    return [median(times) for times in zip(*rounds, strict=True)]


def _replay_ms(run: Callable[[], Any]) -> float:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(20):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def _timed(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def measure(
    size: str, num_layers: int, batch: int, context: int, device: torch.device, dtype: torch.dtype
) -> list[str]:
    """Rows of the table for one depth."""
    torch.manual_seed(0)
    cfg = config_of(size, num_layers)

    def random(spec: ParamSpec) -> torch.Tensor:
        """Drawn on the device: a host takes minutes for 7 billion."""
        made = torch.randn(spec.shape, device=device, dtype=dtype)
        return made.fill_(1.0) if spec.init == "ones" else made.mul_(0.02)

    params = {"text": tree_map(random, qwen2_vl.param_specs(cfg)["text"])}
    inputs = decode_inputs(cfg, batch, context, device)
    cache = cache_of(cfg, inputs, dtype)
    expected, runs, cells = None, [], []
    torch.compiler.reset()
    for name, make in forms(cfg).items():
        run = partial(make(), params, cache, inputs)
        begin = time.perf_counter()
        _, logits = run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        first_s = time.perf_counter() - begin
        expected = logits.clone() if expected is None else expected
        off = float((logits.float() - expected.float()).abs().max() / expected.float().abs().max())
        if off > (0.05 if dtype == torch.bfloat16 else 1e-4):
            raise SystemExit(f"bench_compile: the logits of {name} are off by {off:.2g} of their range.")
        runs.append(run)
        cells.append((name, "" if name == "eager" else f"{first_s:.1f}"))
    lines = [
        f"| {num_layers} | {name} | {compile_s} | {ms:.2f} |"
        for (name, compile_s), ms in zip(cells, steps_ms(runs, device), strict=True)
    ]
    print("\n".join(lines), flush=True)
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", default="4,16,28")
    parser.add_argument("--size", choices=SIZES, help="7b on a GPU, tiny on a CPU where left out")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, dtype = ("7b", torch.bfloat16) if device.type == "cuda" else ("tiny", torch.float32)
    size = args.size or size
    where = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    head = (
        f"{where}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}; decode of Qwen2-VL {size}, batch {args.batch}, "
        f"context {args.context}.\n\n| layers | form | compile s | step ms |\n|---|---|---|---|"
    )
    print(head, flush=True)
    with torch.no_grad():
        torch._inductor.config.fx_graph_cache = False
        torch._inductor.config.force_disable_caches = True
        rows = [
            line
            for n in args.layers.split(",")
            for line in measure(size, int(n), args.batch, args.context, device, dtype)
        ]
    if args.out:
        args.out.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
