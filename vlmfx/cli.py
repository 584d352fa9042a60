"""The command line, one verb a function; run `vlmfx --help`."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmfx import __version__
from vlmfx.errors import InvalidRequest, VlmfxError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; 1 and one sentence on stderr for an error of the user's, 2 for wrong usage."""
    args = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    try:
        return args.run(args)
    except VlmfxError as error:
        print(f"vlmfx: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # what reads the output has ended; nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlmfx", description="Vision-language models as pure functions.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    verb = verbs.add_parser("generate", help="answer a question about images")
    verb.add_argument("question")
    verb.add_argument("--model", default="scenes", help='folder, hub id, or "scenes", the shipped model (default)')
    verb.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; repeat for several")
    verb.add_argument(
        "--raw", action="store_true", help="take the question as the whole prompt, without the chat template"
    )
    _add_sampling(verb)
    _add_loading(verb)
    verb.set_defaults(run=generate)

    verb = verbs.add_parser("demo", help="ask the shipped model about a shipped picture")
    verb.set_defaults(run=demo)
    return parser


def _add_sampling(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--max-tokens", type=int)
    verb.add_argument("--temperature", type=float, help="0, the default, is greedy; 1 the model's own")
    verb.add_argument("--top-p", type=float)
    verb.add_argument("--top-k", type=int)
    verb.add_argument("--min-p", type=float)
    verb.add_argument("--seed", type=int)
    verb.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeat for several")
    verb.add_argument("--ignore-eos", action="store_true")


def _add_loading(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16")
    verb.add_argument("--device", default="auto", help="auto, cpu, cuda or mlu")
    verb.add_argument("--max-model-len", type=int)
    verb.add_argument("--chat-template", metavar="FILE")
    verb.add_argument("--revision")
    verb.add_argument("--trust-remote-code", action="store_true", help="accepted; no remote code is ever run")


def generate(args: argparse.Namespace) -> int:
    """`vlmfx generate`: the answer, streamed to the terminal."""
    from vlmfx.engine.request import SamplingParams
    from vlmfx.llm import LLM

    drawing = {
        name: getattr(args, name) for name in ("top_p", "top_k", "min_p", "seed") if getattr(args, name) is not None
    }
    if drawing and not args.temperature:
        raise InvalidRequest("temperature", f"{', '.join(drawing)} without it changes nothing; add --temperature 1.")
    params = SamplingParams(
        temperature=args.temperature or 0.0,
        stop=args.stop,
        max_tokens=args.max_tokens,
        ignore_eos=args.ignore_eos,
        **drawing,
    )
    llm = LLM(
        args.model,
        dtype=args.dtype,
        device=args.device,
        max_model_len=args.max_model_len,
        chat_template=args.chat_template,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    prompt: dict[str, Any] = (
        {"prompt": args.question, "multi_modal_data": {"image": args.image}}
        if args.raw
        else chat(args.image, args.question)
    )
    llm.generate(prompt, params, on_text=lambda number, text: print(text, end="", flush=True))
    print()
    return 0


def demo(args: argparse.Namespace) -> int:
    """`vlmfx demo`: a shipped picture, questions about it, the answers and the speed."""
    from vlmfx.llm import LLM

    picture = Path(__file__).parent / "assets" / "demo.png"
    questions = (picture.with_suffix(".txt")).read_text(encoding="utf-8").splitlines()
    llm = LLM("scenes")
    print(f"picture   {picture}")
    for question in questions:
        output = llm.generate(chat([str(picture)], question))[0]
        metrics = output.metrics
        assert metrics is not None
        assert metrics.time_to_first_token_s is not None
        assert metrics.decode_s is not None
        rate = (metrics.output_tokens - 1) / metrics.decode_s if metrics.output_tokens > 1 else 0.0
        print(f"\nquestion  {question}\nanswer    {output.outputs[0].text}")
        print(
            f"speed     {metrics.prompt_tokens} prompt tokens, first token after {metrics.time_to_first_token_s * 1e3:.0f} ms, "
            f"then {rate:.0f} tokens per second"
        )
    return 0


def chat(images: Sequence[str], question: str) -> dict[str, Any]:
    """A prompt of one user message: the images, then the question."""
    parts = [{"type": "image", "image": path} for path in images]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]}
