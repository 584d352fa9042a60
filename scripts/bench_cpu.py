"""Speed of a Qwen2-VL folder on the CPU: vlmfx beside transformers' generate, and beside the matmuls of a decode step alone.

    python scripts/bench_cpu.py [--model DIR] [--threads N] [--dtype float32,bfloat16] [--batch 1,8] [--rounds 7]

Both sides have the same folder, threads, dtype and prompts (a generated picture and a question each), decode greedily past EOS to
the same number of tokens, and take turns. In float32 their tokens must be equal before anything is timed; the folder may be
`scenes` (the default, shipped) or any other with Qwen2-VL's architecture."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import scenes
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    StoppingCriteria,
    StoppingCriteriaList,
)

import vlmfx
from vlmfx import hub
from vlmfx.checkpoint import Model
from vlmfx.engine import runner
from vlmfx.engine.drain import run
from vlmfx.engine.request import SamplingParams
from vlmfx.engine.sequence import Request
from vlmfx.processing.prompt import prepare


@dataclass(frozen=True, kw_only=True)
class Question:
    """A picture and what is asked about it."""

    image: Image.Image
    text: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [
            {
                "role": "user",
                "content": [{"type": "image", "image": self.image}, {"type": "text", "text": self.text}],
            }
        ]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One run of a batch: seconds of preprocessing, from there to the first token, and a decode step; and the tokens."""

    prepare_s: float
    first_s: float
    step_s: float
    tokens: list[tuple[int, ...]]


def questions(count: int) -> list[Question]:
    """Generated pictures, each with a question; lengths differ as sizes and questions do."""
    samples = (scenes.sample(seed, split="heldout", kind="objects") for seed in range(count))
    return [Question(image=s.images[0], text=s.qas[0].question) for s in samples]


def run_vlmfx(model: Model, batch: Sequence[Question], num_tokens: int) -> Timing:
    """One batch through vlmfx's engine; the decode time includes detokenizing, as for any user."""
    start = time.perf_counter()
    inputs = [prepare(model.processor, {"messages": q.messages}) for q in batch]
    prepared = time.perf_counter()
    params = SamplingParams.greedy(max_tokens=num_tokens, ignore_eos=True)
    requests = [Request.ready(i, one, params, prepared) for i, one in enumerate(inputs)]
    outputs = sorted(run(model, requests, max_num_seqs=len(batch)), key=lambda o: int(o.request_id))
    total = time.perf_counter() - prepared
    metrics = outputs[0].metrics
    assert metrics is not None, "a finished output has metrics"
    decode_s = metrics.decode_s or 0.0
    return Timing(
        prepare_s=prepared - start,
        first_s=total - decode_s,
        step_s=decode_s / (num_tokens - 1),
        tokens=[o.outputs[0].token_ids for o in outputs],
    )


class Clock(StoppingCriteria):
    """Stops nothing: notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Reference:
    """transformers with its usual settings: SDPA attention, a growing cache, inference mode, prompts padded on the left."""

    def __init__(self, folder: Path, dtype: torch.dtype, chat_template: str) -> None:
        load = Qwen2VLForConditionalGeneration.from_pretrained
        self.model: Any = load(
            folder, dtype=dtype, attn_implementation="sdpa"
        ).eval()  # its stubs refuse its own generate
        self.model.generation_config.eos_token_id = None
        # AutoProcessor, which would join these, needs torchvision for its video half.
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.images = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.chat_template = chat_template

    @torch.inference_mode()
    def run(self, batch: Sequence[Question], num_tokens: int) -> Timing:
        """One batch through generate."""
        start = time.perf_counter()
        inputs = self.prepare(batch)
        prepared, clock = time.perf_counter(), Clock()
        out = self.model.generate(
            **inputs, do_sample=False, max_new_tokens=num_tokens, stopping_criteria=StoppingCriteriaList([clock])
        )
        assert len(clock.times) == num_tokens, f"transformers made {len(clock.times)} tokens instead of {num_tokens}"
        return Timing(
            prepare_s=prepared - start,
            first_s=clock.times[0] - prepared,
            step_s=(clock.times[-1] - clock.times[0]) / (num_tokens - 1),
            tokens=[tuple(row) for row in out[:, inputs["input_ids"].shape[1] :].tolist()],
        )

    def prepare(self, batch: Sequence[Question]) -> dict[str, Any]:
        """What Qwen2VLProcessor returns: ids with grown placeholders, padded; pixels; and where the pictures are."""
        texts = self.tokenizer.apply_chat_template(
            [q.messages for q in batch], chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
        )
        pixels = self.images([q.image for q in batch], return_tensors="pt")
        counts = (pixels["image_grid_thw"].prod(-1) // self.images.merge_size**2).tolist()
        pad = "<|image_pad|>"
        texts = [text.replace(pad, pad * count) for text, count in zip(texts, counts, strict=True)]
        inputs = {**self.tokenizer(texts, padding=True, return_tensors="pt"), **pixels}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.model.config.image_token_id).int()
        return inputs


def matmuls(model: Model, rows: int) -> Callable[[], None]:
    """The linear maps of one decode step and nothing else, on weights of their own, as many and as large as the model's."""
    text, dtype = model.config.text, model.dtype
    params = model.params["text"]
    weights = [layer[name].clone() for layer in params["layers"] for name in ("qkv", "out", "gate_up", "down")]
    weights.append(params.get("head", params["embed"]).clone())
    inputs = {size: torch.randn(rows, size, dtype=dtype) for size in {w.shape[1] for w in weights}}
    assert len(weights) == 4 * text.num_layers + 1, "every layer has four matrices, and the head is one"

    def step() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    return step


def check_tokens(ours: Timing, theirs: Timing) -> None:
    """Exit with a sentence where the two sides' tokens differ."""
    for row, (a, b) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)):
        if a != b:
            at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
            sys.exit(f"bench_cpu: tokens of row {row} differ from token {at} on: {a[at:]} here, {b[at:]} there.")


def measure(folder: Path, dtype: torch.dtype, rows: int, num_tokens: int, rounds: int) -> str:
    """One line of the table."""
    model = vlmfx.load(folder, dtype=dtype, device="cpu")
    assert model.processor.chat_template is not None, "the folder has a chat template"
    reference = Reference(folder, dtype, model.processor.chat_template)
    batch = questions(rows)
    lengths = [len(prepare(model.processor, {"messages": q.messages}).token_ids) for q in batch]
    ours, theirs = run_vlmfx(model, batch, num_tokens), reference.run(batch, num_tokens)  # warms both
    if dtype == torch.float32:
        check_tokens(ours, theirs)
    floor = matmuls(model, rows)
    here: list[Timing] = []
    there: list[Timing] = []
    floors: list[float] = []
    for _ in range(rounds):
        here.append(run_vlmfx(model, batch, num_tokens))
        there.append(reference.run(batch, num_tokens))
        start = time.perf_counter()
        with torch.no_grad(), runner.matmul_backend(model, rows):
            for _ in range(num_tokens):
                floor()
        floors.append((time.perf_counter() - start) / num_tokens)

    def first_token(value: Callable[[Timing], float]) -> str:
        a, b = median(map(value, here)), median(map(value, there))
        return f"{a * 1e3:.1f} / {b * 1e3:.1f} / {b / a:.2f}"

    step, their_step, floor_step = median(t.step_s for t in here), median(t.step_s for t in there), median(floors)
    ratios = sorted(b.step_s / a.step_s for a, b in zip(here, there, strict=True))
    cells = [
        str(dtype).removeprefix("torch."),
        str(rows),
        str(lengths[0]) if rows == 1 else f"{min(lengths)}–{max(lengths)}",
        f"{rows / step:.0f}",
        f"{rows / their_step:.0f}",
        f"**{their_step / step:.2f}** ({ratios[0]:.2f}–{ratios[-1]:.2f})",
        f"{step * 1e3:.2f}",
        f"{floor_step * 1e3:.2f}",
        f"{floor_step / step:.0%}",
        first_token(lambda t: t.first_s),
        first_token(lambda t: t.prepare_s + t.first_s),
    ]
    return "| " + " | ".join(cells) + " |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="scenes", help='a Qwen2-VL folder, or "scenes", the shipped one (default)')
    parser.add_argument("--threads", type=int, help="torch's default where left out")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--batch", default="1,8", help="rows that are decoded together")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a row")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = hub.resolve(args.model)
    print(
        f"{_cpu()}, {torch.get_num_threads()} threads; torch {torch.__version__}, transformers {transformers.__version__}, "
        f"vlmfx {vlmfx.__version__}; {args.tokens} new tokens a row, greedy; medians of {args.rounds} rounds, the sides taking turns.\n"
    )
    print(
        "| dtype | batch | prompt tokens | vlmfx tok/s | transformers tok/s | ratio (least–most of a round) | step ms | its matmuls ms "
        "| share | first token ms: vlmfx / transformers / ratio | with preprocessing |\n" + "|---" * 11 + "|"
    )
    for name in args.dtype.split(","):
        for rows in args.batch.split(","):
            print(measure(folder, getattr(torch, name), int(rows), args.tokens, args.rounds), flush=True)
    return 0


def _cpu() -> str:
    """The processor's name and how many cores this machine has of it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
