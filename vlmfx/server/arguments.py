"""The arguments of `vlmfx serve`, under vLLM's names, and the options they make. Plain Python: `vlmfx --help` reads it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vlmfx.errors import InvalidRequest
from vlmfx.server.options import MEDIA_LIMITS, ServerOptions, keys_of, names_of

DEFAULTS = ServerOptions(names=("model",))
MIB = 2**20


def add_server(verb: argparse.ArgumentParser) -> None:
    """Where to listen, whom to let in, how much to take."""
    verb.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="what clients call the model; by default MODEL as it is given",
    )
    verb.add_argument("--host", help="the address to listen at; by default every one of this machine")
    verb.add_argument("--port", type=int, default=DEFAULTS.port, help="8000; 0 takes a free one")
    verb.add_argument("--uds", metavar="PATH", help="listen at a socket file instead")
    verb.add_argument("--root-path", default="", help="what a proxy puts before every path")
    verb.add_argument("--ssl-keyfile", metavar="FILE")
    verb.add_argument("--ssl-certfile", metavar="FILE")
    verb.add_argument(
        "--api-key", nargs="+", action="extend", default=[], metavar="KEY",
        help="requests must carry one of the keys; repeat for several; VLMFX_API_KEY, or VLLM_API_KEY, is one more",
    )  # fmt: skip
    verb.add_argument(
        "--allowed-hosts", nargs="+", action="extend", default=[], metavar="NAME",
        help="names that requests may ask for this server by; * for any; by default localhost and addresses where the server "
        "listens at a loopback address and has no key, else any",
    )  # fmt: skip
    for name, says in (("origins", "pages that may use the server"), ("methods", "of those"), ("headers", "of those")):
        verb.add_argument(f"--allowed-{name}", metavar="JSON", help=f"{says}, as a list in JSON")
    verb.add_argument("--allow-credentials", action="store_true", help="whether those may send cookies")
    verb.add_argument(
        "--trust-request-chat-template", action="store_true", help="render chat templates that requests bring"
    )
    verb.add_argument(
        "--max-connections", type=int, default=DEFAULTS.max_connections, help="that are open at once (1024)"
    )
    verb.add_argument(
        "--header-timeout", type=float, default=DEFAULTS.header_timeout_s, help="seconds for headers to come (30)"
    )
    verb.add_argument(
        "--max-waiting", type=int, default=DEFAULTS.max_waiting, help="requests that may wait for others (1024)"
    )
    verb.add_argument("--max-body-mib", type=int, default=DEFAULTS.max_body_bytes // MIB, help="of a request (64)")
    verb.add_argument(
        "--max-held-mib", type=int, default=DEFAULTS.max_held_bytes // MIB, help="of requests together (512)"
    )
    verb.add_argument(
        "--max-image-pixels", type=int, default=DEFAULTS.max_image_pixels, help="of one picture or frame (178956970)"
    )
    verb.add_argument("--body-timeout", type=float, default=DEFAULTS.body_timeout_s, help="seconds for a body to come")
    verb.add_argument("--request-timeout", type=float, help="seconds from a request to the end of its answer")
    verb.add_argument(
        "--drain-timeout", type=float, default=DEFAULTS.drain_timeout_s, help="seconds to finish in at SIGTERM (30)"
    )
    verb.add_argument(
        "--page", action=argparse.BooleanOptionalAction, default=True, help="a page at / to try the model on"
    )
    verb.add_argument(
        "--image-store-mib", type=int, default=DEFAULTS.max_image_store_bytes // MIB,
        help="of images that are sent to /v1/images to be asked about later (256); 0 keeps none",
    )  # fmt: skip
    verb.add_argument(
        "--image-ttl", type=float, default=DEFAULTS.image_ttl_s, help="seconds to keep one that nobody uses (3600)"
    )
    verb.add_argument("--metrics-prefix", choices=["vlmfx", "vllm"], default="vlmfx", help="of names in /metrics")
    verb.add_argument("--log-format", choices=["text", "json"], default="text")


def add_engine(verb: argparse.ArgumentParser) -> None:
    """How programs run, and how much the engine may hold and do at once."""
    verb.add_argument("--backend", default="auto", help="auto, eager, cuda_graph, mlu_graph or inductor")
    verb.add_argument("--enforce-eager", action="store_true", help="the same as --backend eager")
    verb.add_argument("--plan", metavar="FILE", help="the sizes to compile, as `vlmfx plan --out` writes them")
    verb.add_argument("--strict", action="store_true", help="refuse what the plan does not cover")
    verb.add_argument(
        "--warm-up", action=argparse.BooleanOptionalAction, default=True, help="make all programs before serving"
    )
    verb.add_argument("--max-num-seqs", type=int, help="texts that are generated at once; 128 on a GPU, 16 elsewhere")
    verb.add_argument("--max-num-batched-tokens", type=int, help="of prompts in a step (8192)")
    verb.add_argument("--gpu-memory-utilization", type=float, help="share of a GPU's memory to use (0.9)")
    verb.add_argument("--kv-cache-memory-bytes", type=int)
    verb.add_argument("--num-gpu-blocks-override", type=int, help="blocks of 16 tokens in the KV cache, on any device")
    verb.add_argument("--mm-feature-cache-bytes", type=int, help="of encoded images that are kept for other requests")
    verb.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction)
    verb.add_argument("--async-scheduling", action=argparse.BooleanOptionalAction)
    verb.add_argument("--tensor-parallel-size", type=int, help="1; more is not to be had yet")


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of LLM that `add_engine` asks for, those that are given."""
    names = (
        "backend", "enforce_eager", "plan", "strict", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization",
        "kv_cache_memory_bytes", "num_gpu_blocks_override",
        "mm_feature_cache_bytes", "enable_prefix_caching", "async_scheduling", "tensor_parallel_size",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def media_limits(given: list[str] | None) -> list[str]:
    """--limit-mm-per-prompt with the limits of a server before it, which those that are given replace."""
    return [",".join(f"{name}={limit}" for name, limit in MEDIA_LIMITS.items()), *(given or [])]


def server_options(args: argparse.Namespace) -> ServerOptions:
    """The options that `add_server` asks for. Raises InvalidRequest."""
    lists: dict[str, Any] = {}
    for name in ("allowed_origins", "allowed_methods", "allowed_headers"):
        if getattr(args, name) is not None:
            lists[name] = names_of(_json(getattr(args, name), name), name)
    same = (
        "host", "port", "uds", "root_path", "ssl_keyfile", "ssl_certfile", "allow_credentials", "trust_request_chat_template",
        "page", "max_connections", "max_image_pixels", "max_waiting", "metrics_prefix", "log_format",
    )  # fmt: skip
    return ServerOptions(
        names=tuple(args.served_model_name or [args.model]),
        allowed_hosts=tuple(args.allowed_hosts),
        api_keys=keys_of(args.api_key),
        max_body_bytes=args.max_body_mib * MIB,
        max_held_bytes=args.max_held_mib * MIB,
        header_timeout_s=args.header_timeout,
        body_timeout_s=args.body_timeout,
        request_timeout_s=args.request_timeout,
        drain_timeout_s=args.drain_timeout,
        max_image_store_bytes=args.image_store_mib * MIB,
        image_ttl_s=args.image_ttl,
        **{name: getattr(args, name) for name in same},
        **lists,
    )


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        message = f"""it is not JSON ({error}); quote it as in '["https://example.com"]'."""
        raise InvalidRequest(name, message, found=text) from None
