"""What HTTP costs: requests a second at 64 at once of the bare AsyncEngine, of whole answers over HTTP, and of streams.

    python scripts/bench_serve.py [--at-once 64] [--requests 128] [--max-tokens 16] [--rounds 10]

One process has the shipped model, its engine and the server; this one is the client, over so many connections that stay open. The three
ways take turns, each round with empty caches: 16 generated pictures, each sent anew with every question. The bare engine gets the same
prompts, parsed, in the server's process and loop, and makes, runs and gathers them there. For streams it also tells how long after the
engine's first token the first bytes were here, in the mean, beside the length of a step. On a machine that does other work as well the
last two columns say more than the medians."""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from statistics import mean, median
from typing import Any

NUM_PICTURES = 16
ASKED = ["What colours are there?", "How many objects are there?", "Describe the picture.", "Is there a red circle?"]
CHAT, BARE, RESET, NOTES = "/v1/chat/completions", "/bench/bare", "/bench/reset", "/bench/notes"


def bodies(num: int, max_tokens: int) -> list[dict[str, Any]]:
    """Of so many chats, all of which are as long as they may be."""
    import scenes

    urls = []
    for seed in range(NUM_PICTURES):
        file = io.BytesIO()
        scenes.sample(seed, split="heldout", kind="objects").images[0].save(file, "PNG")
        urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    made = []
    for i in range(num):
        parts = [{"type": "image_url", "image_url": {"url": urls[i % NUM_PICTURES]}}]
        content = [*parts, {"type": "text", "text": f"{ASKED[i // NUM_PICTURES % len(ASKED)]} {i}"}]
        made.append({"messages": [{"role": "user", "content": content}], "temperature": 0})
        made[-1] |= {"max_tokens": max_tokens, "ignore_eos": True}
    return made


async def all_of(work: Callable[[Any], Awaitable[None]], items: Sequence[Any], at_once: int) -> float:
    """Seconds for all items, so many at once."""
    waiting = list(items)[::-1]

    async def worker() -> None:
        while waiting:
            await work(waiting.pop())

    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return time.perf_counter() - start


def serve(args: argparse.Namespace) -> None:
    """The server's process: tells its port, and serves until its stdin ends."""
    import threading

    import uvicorn
    from fastapi import Request, Response

    import vlmfx
    from vlmfx.engine.observer import Observer
    from vlmfx.openai.requests import chat_request
    from vlmfx.server import serve as server
    from vlmfx.server.addresses import bind
    from vlmfx.server.app import create_app
    from vlmfx.server.options import ServerOptions
    from vlmfx.server.replies import json_reply

    class FirstTokens(Observer):
        """When each request's first token was read."""

        def __init__(self) -> None:
            self.at: dict[int, float] = {}

        def read(self, drawn: Any) -> None:
            now = time.perf_counter()
            for text, *_ in drawn:
                self.at.setdefault(text.request.number, now)

    llm = vlmfx.LLM("scenes", dtype=args.dtype, device=args.device, max_num_seqs=args.at_once)
    llm.warm_up()
    first = llm.engine.observer = FirstTokens()
    options = ServerOptions(names=("scenes",), host="127.0.0.1", port=0)
    server._log_to_stderr()
    service = server.service_of(llm, options)
    engine = service.engine
    prompts = [chat_request(body) for body in bodies(args.requests, args.max_tokens)]

    async def bare(request: Request) -> Response:
        async def one(asked: Any) -> None:
            prompt, params = asked
            make = lambda numbers: [engine.make(numbers[0], prompt, params)]  # noqa: E731
            async with aclosing(engine.events(make)) as events:
                async for _ in events:
                    pass

        return json_reply(await all_of(one, prompts, args.at_once))

    async def reset(request: Request) -> Response:
        assert await engine.reset_prefix_cache()
        first.at.clear()
        return json_reply([llm.engine.counters.num_steps, time.thread_time()])

    async def notes(request: Request) -> Response:
        return json_reply([llm.engine.counters.num_steps, time.thread_time(), mean(first.at.values())])

    app = create_app(service)
    for path, handler in ((BARE, bare), (RESET, reset), (NOTES, notes)):
        app.add_route(path, handler, methods=["POST"])
    listeners = bind(options)
    for listener in listeners:
        listener.listen(args.at_once)
    web = uvicorn.Server(uvicorn.Config(app, access_log=False, log_config=None, lifespan="off", timeout_keep_alive=600))

    def end() -> None:
        sys.stdin.read()
        web.should_exit = True

    threading.Thread(target=end, daemon=True).start()
    print(listeners[0].getsockname()[1], flush=True)
    web.run(sockets=listeners)
    engine.close()
    service.close()


class Connection:
    """One that stays open; plain HTTP/1.1, as a client that costs more would take time from the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def post(self, path: str, body: bytes) -> tuple[bytes, float]:
        """(the answer's body, when its first bytes were here)."""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.writer.write(head.encode() + body)
        lines = (await self.reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        assert lines[0].endswith(b" 200 ok"), lines[0]
        size = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length")), None)
        if size is not None:
            return await self.reader.readexactly(size), time.perf_counter()
        parts, first_at = [], 0.0
        while size := int(await self.reader.readline(), 16):
            first_at = first_at or time.perf_counter()
            parts.append(await self.reader.readexactly(size))
            await self.reader.readline()
        await self.reader.readline()
        return b"".join(parts), first_at


async def measure(port: int, args: argparse.Namespace) -> None:
    """The rounds, and the table of them."""
    idle = [Connection(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(args.at_once)]
    asked = bodies(args.requests, args.max_tokens)
    whole = [json.dumps(body).encode() for body in asked]
    streamed = [json.dumps({**body, "stream": True}).encode() for body in asked]
    delays, steps = [], []

    async def post(path: str, body: bytes = b"{}") -> Any:
        return json.loads((await idle[0].post(path, body))[0])

    async def over_http(bodies: Sequence[bytes]) -> tuple[float, list[float]]:
        first_at = []

        async def one(body: bytes) -> None:
            connection = idle.pop()
            answer, at = await connection.post(CHAT, body)
            assert b'"finish_reason":"length"' in answer, answer[-300:]
            first_at.append(at)
            idle.append(connection)

        return await all_of(one, bodies, args.at_once), first_at

    taken: dict[str, list[float]] = {"bare AsyncEngine": [], "HTTP": [], "HTTP, streams": []}
    loop: dict[str, list[float]] = {name: [] for name in taken}
    for number in range(args.rounds + 1):
        for name, seconds in taken.items():
            steps_before, loop_before = await post(RESET)
            if name == "bare AsyncEngine":
                seconds.append(await post(BARE))
            else:
                found, first_at = await over_http(streamed if "streams" in name else whole)
                seconds.append(found)
            steps_after, loop_after, first_token = await post(NOTES)
            loop[name].append(1e3 * (loop_after - loop_before) / args.requests)
            if number and "streams" in name:
                delays.append(mean(first_at) - first_token)
                steps.append(seconds[-1] / (steps_after - steps_before))
    print(
        f"{args.requests} requests of a picture and {args.max_tokens} tokens, {args.at_once} at once, {args.dtype}; "
        f"medians of {args.rounds} rounds.\n\n"
        "| way | requests/s | share of bare (least–most of a round) | share, fastest rounds | ms of the loop's thread a request |\n"
        "|---|---|---|---|---|"
    )
    for name, seconds in taken.items():
        shares = [a / b for a, b in zip(taken["bare AsyncEngine"][1:], seconds[1:], strict=True)]
        speed = args.requests / median(seconds[1:])
        span, fastest = f"{min(shares):.3f}–{max(shares):.3f}", min(taken["bare AsyncEngine"][1:]) / min(seconds[1:])
        print(
            f"| {name} | {speed:.1f} | {median(shares):.3f} ({span}) | {fastest:.3f} | {median(loop[name][1:]):.2f} |"
        )
    print(
        f"\nFirst bytes {1e3 * median(delays):.1f} ms after the first token, in the mean; a step takes {1e3 * median(steps):.1f} ms."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve(args)
        return 0
    command = [sys.executable, __file__, "--serve", *(sys.argv[1:] if argv is None else argv)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            asyncio.run(measure(int(process.stdout.readline()), args))
        finally:
            process.stdin.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
