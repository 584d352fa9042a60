"""The command line, one verb a function; run `vlmfx --help`."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfx import __version__
from vlmfx.errors import InvalidRequest, VlmfxError
from vlmfx.server.arguments import add_engine, add_server, engine_options, media_limits, server_options

if TYPE_CHECKING:
    from vlmfx.engine.request import SamplingParams


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; 1 and one sentence on stderr for an error of the user's, 2 for wrong usage."""
    args = _parser().parse_args(argv)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(io.UnsupportedOperation):  # a stdin of which some is read
                stream.reconfigure(errors="replace")  # what cannot be read or shown becomes a sign that says so
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
    verb.add_argument("--video", action="append", default=[], metavar="FILE", help="a video; repeat for several")
    verb.add_argument(
        "--raw", action="store_true", help="take the question as the whole prompt, without the chat template"
    )
    _add_sampling(verb)
    _add_loading(verb)
    verb.set_defaults(run=generate)

    verb = verbs.add_parser("verify", help="compare a model with a reference, stage by stage")
    verb.add_argument("model", help='folder, hub id, or "scenes"')
    verb.add_argument("--golden", metavar="DIR", help="a golden case, or a folder of cases that name the model")
    verb.add_argument("--against", choices=["transformers"], help="run this on the same folder")
    verb.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; repeat for several")
    verb.add_argument("--prompt", metavar="TEXT", help="what to ask; without it and --image, about a shipped picture")
    verb.add_argument("--dtype", default="float32", help="of both sides: float32 (default), float16 or bfloat16")
    verb.add_argument("--device", default="auto", help="auto, cpu, cuda or mlu")
    verb.set_defaults(run=verify)

    verb = verbs.add_parser("doctor", help="what runs on this machine, what does not, and what to do about it")
    verb.add_argument("--json", action="store_true", help="print the checks as JSON")
    verb.add_argument("--full", action="store_true", help="answer a question with the shipped model too")
    verb.set_defaults(run=doctor)

    verb = verbs.add_parser("embed", help="vectors of unit length, of images and texts")
    verb.add_argument("--model", required=True, help="folder or hub id")
    verb.add_argument("--text", action="append", default=[], help="follows the images; repeat for a vector each")
    verb.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; repeat for several")
    verb.add_argument("--video", action="append", default=[], metavar="FILE", help="a video; repeat for several")
    verb.add_argument("--dimensions", type=int, help="keep so many numbers of each vector")
    verb.add_argument("--raw", action="store_true", help="take each text as a whole prompt, without the chat template")
    verb.add_argument("-o", "--output", metavar="FILE", help=".npy or .safetensors; JSON on the terminal without it")
    _add_loading(verb)
    verb.set_defaults(run=embed)

    verb = verbs.add_parser("chat", help="talk with a model about images")
    verb.add_argument("--model", default="scenes", help='folder, hub id, or "scenes", the shipped model (default)')
    verb.add_argument("--image", action="append", default=[], metavar="FILE", help="an image of the first message")
    verb.add_argument("--video", action="append", default=[], metavar="FILE", help="a video of the first message")
    verb.add_argument("--system", metavar="TEXT", help="the system message")
    verb.add_argument("--speed", action="store_true", help="tell after each answer how fast it came")
    _add_sampling(verb)
    _add_loading(verb)
    verb.set_defaults(run=talk)

    verb = verbs.add_parser("batch", help="answer a file of OpenAI batch requests; goes on where it stopped")
    verb.add_argument("model", help='folder, hub id, or "scenes"')
    verb.add_argument("source", metavar="IN", help="JSON lines with custom_id, method, url and body")
    verb.add_argument(
        "target", metavar="OUT", help="a result a line as it finishes; what it holds already is not done again"
    )
    verb.add_argument("--task", default="auto", help="generate or embed; by default as the first line's url needs")
    verb.add_argument(
        "--served-model-name", metavar="NAME", help="what lines call the model; by default MODEL as it is given"
    )
    verb.add_argument("--max-num-seqs", type=int, help="texts that are generated at once; 128 on a GPU, 16 elsewhere")
    _add_loading(verb)
    verb.set_defaults(run=batch)

    verb = verbs.add_parser("serve", help="an HTTP server for OpenAI's clients, and vLLM's")
    verb.add_argument("model", help='folder, hub id, or "scenes", the shipped model')
    verb.add_argument("--task", default="generate", help="generate (default), or embed (also embedding)")
    _add_loading(verb)
    add_engine(verb)
    add_server(verb)
    verb.set_defaults(run=serve)

    verb = verbs.add_parser("replay", help="run again what --record wrote, to the first step that goes another way")
    verb.add_argument("file", metavar="FILE", help="the recording; its tensors lie in FILE.tensors")
    verb.add_argument("--model", help="by default as recorded")
    verb.add_argument("--alone", action="store_true", help="run each request by itself, and tell whose tokens differ")
    verb.add_argument("--device", help="another than was recorded: cpu, cuda or mlu; without the recorded plan")
    verb.add_argument("--backend", help="another than was recorded, such as eager; without the recorded plan")
    verb.add_argument("--dtype", help="another than was recorded: float32, float16 or bfloat16")
    verb.set_defaults(run=replay)

    verb = verbs.add_parser("plan", help="choose the sizes to compile that waste least on a trace of requests")
    verb.add_argument(
        "--trace", required=True, metavar="FILE", help="an object a line: num_tokens; num_patches, max_tokens if known"
    )
    verb.add_argument("--max-graphs", type=int, default=48, metavar="N", help="of all programs together (default 48)")
    verb.add_argument(
        "--max-padding",
        type=float,
        metavar="P",
        help="as few graphs as keep padding to this share (0.1) of each program",
    )
    verb.add_argument("--max-num-seqs", type=int, default=128, help="that decode together (default 128)")
    verb.add_argument("--max-num-batched-tokens", type=int, default=8192, help="of a prefill step (default 8192)")
    verb.add_argument("--max-patches", type=int, default=16384, help="of an encode step (default 16384)")
    verb.add_argument(
        "--patch-multiple", type=int, default=4, help="patches come in so many (default 4, a merged patch)"
    )
    for option, says in (("--weight", "cost of a padded unit"), ("--compile-seconds", "seconds that a graph takes")):
        verb.add_argument(option, action="append", default=[], metavar="PROGRAM=X", help=f"{says}; repeat for several")
    verb.add_argument("-o", "--out", metavar="FILE", help="write the plan here, as JSON")
    verb.set_defaults(run=plan)

    verb = verbs.add_parser("export", help="compile a model ahead of time, into a folder that runs without a compiler")
    _add_export(verb)
    verb.set_defaults(run=export)

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


def _add_export(verb: argparse.ArgumentParser) -> None:
    """The arguments of `vlmfx export`."""
    verb.add_argument("model", help='folder, hub id, or "scenes"')
    verb.add_argument(
        "out", help="the folder to write; what an earlier export to it made is used where nothing changed"
    )
    verb.add_argument("--plan", metavar="FILE", help="the buckets, as `vlmfx plan --out` writes them")
    verb.add_argument("--device", default="auto", help="auto, cpu or cuda")
    verb.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16")
    verb.add_argument("--march", default="native", help="native, or x86-64-v2, -v3 or -v4 for other processors too")
    verb.add_argument("--task", default="generate", help="generate or embed")
    verb.add_argument("--max-model-len", type=int, help="tokens of the longest prompt and answer")
    verb.add_argument("--max-num-seqs", type=int, default=16, help="sequences at once (16)")
    verb.add_argument("--copy-weights", action="store_true", help="put the weights into the bundle, too")
    verb.add_argument("--jobs", type=int, help="compiling processes at once; by default as processors and memory allow")


def export(args: argparse.Namespace) -> int:
    """`vlmfx export`: the bundle's folder, and how to run it."""
    from vlmfx.export import export

    names = "plan", "device", "dtype", "march", "task", "max_model_len", "max_num_seqs", "copy_weights", "jobs"
    made = export(args.model, args.out, **{name: getattr(args, name) for name in names})
    print(f"{args.out}: {len(made.programs)} programs of {made.model} for {made.host.device}, {made.dtype}")
    return 0


def _add_loading(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16")
    verb.add_argument("--device", default="auto", help="auto, cpu, cuda or mlu")
    verb.add_argument("--max-model-len", type=int)
    verb.add_argument("--chat-template", metavar="FILE", help="or the name of a shipped one")
    verb.add_argument("--revision")
    verb.add_argument("--trust-remote-code", action="store_true", help="accepted; no remote code is ever run")
    verb.add_argument(
        "--limit-mm-per-prompt",
        action="append",
        metavar="image=N,...",
        help='the most images and videos a prompt may hold; repeat, separate by commas, or give JSON ({"image": 2})',
    )
    verb.add_argument("--media-io-kwargs", metavar="JSON", help='how to sample videos: {"video": {"num_frames": 8}}')
    verb.add_argument("--mm-processor-kwargs", metavar="JSON", help='settings of the model\'s own: {"num_crops": 16}')
    verb.add_argument(
        "--allowed-local-media-path", metavar="DIR", help="file: URLs may lie below it; by default none may"
    )
    verb.add_argument("--allowed-media-domains", metavar="HOST,...", help="the only hosts to fetch from")
    verb.add_argument("--private-media-hosts", metavar="HOST[:PORT],...", help="hosts that may have a private address")
    verb.add_argument("--record", metavar="FILE", help="write all that is asked and done, for `vlmfx replay FILE`")


def _loading(args: argparse.Namespace) -> dict[str, Any]:
    """The options of LLM that `_add_loading` asks for."""
    names = (
        "dtype", "device", "max_model_len", "chat_template", "revision", "trust_remote_code", "limit_mm_per_prompt",
        "allowed_local_media_path", "allowed_media_domains", "private_media_hosts", "record",
    )  # fmt: skip
    options = {name: getattr(args, name) for name in names}
    return options | {name: _json(args, name) for name in ("media_io_kwargs", "mm_processor_kwargs")}


def _json(args: argparse.Namespace, name: str) -> Any:
    """The value of an option that is written in JSON; None without it."""
    text = getattr(args, name)
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise InvalidRequest(name, f"it is not JSON ({error}); quote it as in '{{\"name\": 1}}'.", found=text) from None


def generate(args: argparse.Namespace) -> int:
    """`vlmfx generate`: the answer, streamed to the terminal."""
    from vlmfx.llm import LLM

    params = _sampling(args)
    llm = LLM(args.model, **_loading(args))
    llm.generate(_prompt(args, args.question), params, on_text=lambda number, text: print(text, end="", flush=True))
    print()
    return 0


def embed(args: argparse.Namespace) -> int:
    """`vlmfx embed`: the vectors as a list of lists in JSON, or in a file: an array in .npy, "embeddings" in .safetensors."""
    import numpy as np
    from safetensors.torch import save_file

    from vlmfx.llm import LLM
    from vlmfx.offline import embed as vectors_of

    kind = Path(args.output).suffix if args.output else ""
    if kind not in ("", ".npy", ".safetensors") or (args.output and not kind):
        raise InvalidRequest("output", f"{args.output!r} ends in neither .npy nor .safetensors; name such a file.")
    if not args.text and (args.raw or not (args.image or args.video)):
        raise InvalidRequest("text", "there is nothing to embed; add --text, or --image or --video without --raw.")
    prompts = [_prompt(args, text) for text in args.text or [None]]
    llm = LLM(args.model, task="embed", **_loading(args))
    vectors = vectors_of(llm, prompts[0] if len(prompts) == 1 else prompts, args.dimensions)
    try:
        if kind == ".npy":
            np.save(args.output, vectors.numpy())
        elif kind:
            save_file({"embeddings": vectors}, args.output)
    except Exception as error:  # OSError, and safetensors' own
        raise InvalidRequest("output", f"{args.output} cannot be written ({error}); name another file.") from error
    if not kind:
        print(json.dumps(vectors.tolist()))
    return 0


def batch(args: argparse.Namespace) -> int:
    """`vlmfx batch`: results in a file, a summary on stderr; 0 also where lines failed."""
    from vlmfx.batch.run import run_batch
    from vlmfx.llm import LLM

    try:
        summary = run_batch(
            args.source,
            args.target,
            lambda task: LLM(args.model, task=task, max_num_seqs=args.max_num_seqs, **_loading(args)),
            served=args.served_model_name or args.model,
            task=args.task,
        )
    except KeyboardInterrupt:
        print("vlmfx: interrupted; run the same command again to go on.", file=sys.stderr)
        raise
    print(f"{args.target}: {summary}", file=sys.stderr)
    return 0


def serve(args: argparse.Namespace) -> int:
    """`vlmfx serve`: a server, until SIGTERM or SIGINT."""
    try:
        from vlmfx.server import serve as server
    except ModuleNotFoundError as error:
        raise VlmfxError(
            f"{error.name} is not installed; pip install 'vlmfx[serve]' brings what serving needs."
        ) from error
    from vlmfx.llm import LLM

    options = server_options(args)
    args.limit_mm_per_prompt = media_limits(args.limit_mm_per_prompt)

    def load() -> LLM:
        llm = LLM(args.model, task=args.task, **_loading(args), **engine_options(args))
        if args.warm_up:
            llm.warm_up()
        return llm

    return server.serve(load, options)


def replay(args: argparse.Namespace) -> int:
    """`vlmfx replay`: how much was run, and what went another way; 1 where something did."""
    from vlmfx.replay import replay

    options = {name: getattr(args, name) for name in ("device", "backend", "dtype") if getattr(args, name) is not None}
    replayed = replay(args.file, model=args.model, alone=args.alone, **options)
    print(replayed)
    return int(bool(replayed.differences))


def talk(args: argparse.Namespace) -> int:
    """`vlmfx chat`: a conversation on the terminal."""
    from vlmfx.llm import LLM
    from vlmfx.terminal import converse

    params = _sampling(args)
    llm = LLM(args.model, **_loading(args))
    return converse(llm, params, system=args.system, images=args.image, videos=args.video, shows_speed=args.speed)


def _sampling(args: argparse.Namespace) -> SamplingParams:
    """The sampling that the options of `_add_sampling` ask for: greedy without a temperature."""
    from vlmfx.engine.request import SamplingParams

    drawing = {
        name: getattr(args, name) for name in ("top_p", "top_k", "min_p", "seed") if getattr(args, name) is not None
    }
    if drawing and not args.temperature:
        raise InvalidRequest("temperature", f"{', '.join(drawing)} without it changes nothing; add --temperature 1.")
    return SamplingParams(
        temperature=args.temperature or 0.0,
        stop=args.stop,
        max_tokens=args.max_tokens,
        ignore_eos=args.ignore_eos,
        **drawing,
    )


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
        print(f"\nquestion  {question}\nanswer    {output.outputs[0].text}")
        print(f"speed     {metrics.prompt_tokens} prompt tokens, {metrics.speed}")
    return 0


def verify(args: argparse.Namespace) -> int:
    """`vlmfx verify`: the table of stages; 1 where one departs."""
    from vlmfx.parity.verify import verify

    report = verify(
        args.model,
        golden=args.golden,
        against=args.against,
        images=args.image,
        prompt=args.prompt,
        dtype=args.dtype,
        device=args.device,
    )
    print(report)
    return 0 if report.is_ok else 1


def doctor(args: argparse.Namespace) -> int:
    """`vlmfx doctor`: a line a check; 1 where something is broken."""
    from vlmfx.doctor import main

    return main(is_full=args.full, as_json=args.json)


def plan(args: argparse.Namespace) -> int:
    """`vlmfx plan`: the comparison of the plan with the default one; the plan in a file too."""
    from vlmfx.compile.planner import COMPILE_S, WEIGHTS, plan_trace
    from vlmfx.compile.trace import read_trace

    names = "max_graphs", "max_padding", "max_num_seqs", "max_num_batched_tokens", "max_patches", "patch_multiple"
    comparison = plan_trace(
        read_trace(args.trace),
        weights=WEIGHTS | _by_program("weight", args.weight, WEIGHTS),
        compile_s=COMPILE_S | _by_program("compile_seconds", args.compile_seconds, COMPILE_S),
        **{name: getattr(args, name) for name in names},
    )
    if args.out:
        try:
            Path(args.out).write_text(comparison.plan.to_json(), encoding="utf-8")
        except OSError as error:
            raise InvalidRequest("out", f"{args.out} cannot be written ({error}); name another file.") from error
    print(comparison)
    return 0


def _by_program(name: str, given: Sequence[str], programs: Collection[str]) -> dict[str, float]:
    """The numbers of an option that is written PROGRAM=X."""
    numbers = {}
    for text in given:
        program, _, number = text.partition("=")
        try:
            numbers[program] = float(number)
        except ValueError:
            numbers[program] = -1.0
        if program not in programs or not 0 <= numbers[program] < 1e9:
            raise InvalidRequest(name, f"it is {text!r}; write {'=, '.join(programs)}= and a number.", found=text)
    return numbers


def _prompt(args: argparse.Namespace, text: str | None) -> dict[str, Any]:
    """The prompt of --image, --video and a text: a chat message, or with --raw the text as it is."""
    if args.raw:
        return {"prompt": text, "multi_modal_data": {"image": args.image, "video": args.video}}
    return chat(args.image, text, args.video)


def chat(images: Sequence[str], text: str | None, videos: Sequence[str] = ()) -> dict[str, Any]:
    """A prompt of one user message: the images, the videos, then the text."""
    parts = [{"type": "image", "image": path} for path in images] + [
        {"type": "video", "video": path} for path in videos
    ]
    parts += [{"type": "text", "text": text}] if text is not None else []
    return {"messages": [{"role": "user", "content": parts}]}
