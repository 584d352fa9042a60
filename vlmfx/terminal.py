"""A conversation on the terminal: a line is a message, the answer streams, and the history stays."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from vlmfx.engine.request import SamplingParams
from vlmfx.errors import VlmfxError
from vlmfx.llm import LLM
from vlmfx.processing.images import image_size
from vlmfx.processing.media import load
from vlmfx.processing.messages import Media
from vlmfx.processing.video import probe, sampling_of

HELP = (
    "a line is a message; /image or /video and a FILE or URL adds a picture or video to the next one, "
    "/new forgets all, /quit or end of file ends"
)


def converse(
    llm: LLM,
    params: SamplingParams,
    *,
    system: str | None = None,
    images: Sequence[str] = (),
    videos: Sequence[str] = (),
) -> int:
    """Runs until /quit or the end of stdin; images and videos go with the first message.

    Returns 1 where stdin is no terminal and a message or a medium failed, else 0.
    A message that fails, or whose answer is interrupted, is not kept. What is said about the conversation goes to stderr."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _edit_lines()
        _say(HELP)
    opening: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    history = list(opening)
    media = [_medium(llm, "image", path) for path in images] + [_medium(llm, "video", path) for path in videos]
    status = 0
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            if is_terminal:
                print()
            return status
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return status
        if command == "/new":
            history, media = list(opening), []
        elif command in ("/image", "/video"):
            try:
                media.append(_medium(llm, command[1:], rest.strip()))
            except VlmfxError as error:
                _say(str(error))
                status = int(not is_terminal)
        elif command.startswith("/"):
            _say(HELP)
        elif line:
            message = {"role": "user", "content": [*media, {"type": "text", "text": line}]}
            answer = _answer(llm, [*history, message], params)
            if answer is not None:
                history += [message, {"role": "assistant", "content": answer}]
            elif not is_terminal:
                status = 1
            media = []


def _answer(llm: LLM, messages: list[dict[str, Any]], params: SamplingParams) -> str | None:
    """The answer, streamed to stdout; None where there is none."""
    try:
        (output,) = llm.chat(messages, params, on_text=lambda number, text: print(text, end="", flush=True))
    except VlmfxError as error:
        _say(str(error))
        return None
    except KeyboardInterrupt:
        print()
        _say("interrupted; the message is forgotten")
        return None
    print()
    return output.outputs[0].text


def _medium(llm: LLM, kind: str, source: str) -> dict[str, Any]:
    """The part of an image or video, looked at now so that a wrong name shows at once; a URL is fetched this one time."""
    value = load(Media(kind, source, kind), llm.model.processor.media)
    if kind == "image":
        image_size(value, field=kind)
    else:
        probe(value, sampling_of(llm.model.processor.media_io_kwargs), field=kind)
    return {"type": kind, kind: value}


def _edit_lines() -> None:
    """Arrow keys and history for input(), where Python has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401


def _say(text: str) -> None:
    print(f"vlmfx: {text}", file=sys.stderr)
