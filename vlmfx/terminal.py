"""A conversation on the terminal: a line is a message, the answer streams, and the history stays."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from vlmfx.engine.request import SamplingParams
from vlmfx.errors import VlmfxError
from vlmfx.llm import LLM
from vlmfx.processing.images import image_size
from vlmfx.processing.media import SCHEME, load
from vlmfx.processing.messages import Media
from vlmfx.processing.video import probe, sampling_of

HELP = """a line is a message; lines that are none:
  /image FILE or URL ...   images for the next message
  /video FILE or URL ...   videos for it
  /system TEXT             the system message from now on; without TEXT there is none
  /new                     forget all but the system message
  /quit                    end, as end of file does
^C ends an answer, of which what was said by then is kept"""


def converse(
    llm: LLM,
    params: SamplingParams,
    *,
    system: str | None = None,
    images: Sequence[str] = (),
    videos: Sequence[str] = (),
    shows_speed: bool = False,
) -> int:
    """Runs until /quit or the end of stdin; images and videos go with the first message.

    Returns 1 where stdin is no terminal and a message or a medium failed, else 0. What is said about the conversation goes to stderr.
    Raises VlmfxError for the images and videos, and KeyboardInterrupt where stdin is no terminal or ^C comes twice at a prompt."""
    is_terminal = sys.stdin.isatty()
    talk = Conversation(llm, params, system=system, is_terminal=is_terminal, shows_speed=shows_speed)
    if is_terminal:
        _edit_lines()
        _say("a line is a message; /help tells what else there is")
    talk.attach("image", images)
    talk.attach("video", videos)
    status, is_leaving = 0, False
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
            is_leaving = False
            if line == "/quit":
                return status
            talk.take(line)
        except EOFError:
            if is_terminal:
                print()
            return status
        except VlmfxError as error:
            _say(str(error))
            status = int(not is_terminal)
        except KeyboardInterrupt:
            print()
            if is_leaving or not is_terminal:
                raise
            _say("/quit or end of file ends, or ^C once more")
            is_leaving = True


class Conversation:
    """What was said so far, and the media that go with the next message."""

    def __init__(
        self, llm: LLM, params: SamplingParams, *, system: str | None, is_terminal: bool, shows_speed: bool
    ) -> None:
        self.llm, self.params, self.system = llm, params, system
        self.is_terminal, self.shows_speed = is_terminal, shows_speed
        self.history: list[dict[str, Any]] = []
        self.media: list[dict[str, Any]] = []

    def take(self, line: str) -> None:
        """A message or a command. Raises VlmfxError; a message that fails is not kept."""
        command, _, rest = line.partition(" ")
        if command in ("/image", "/video"):
            self.attach(command[1:], _sources(rest.strip()) or [""])
        elif command == "/system":
            self.system = rest.strip() or None
        elif command == "/new":
            self.history, self.media = [], []
        elif command.startswith("/"):
            _say(HELP)
        elif line:
            self.ask(line)

    def attach(self, kind: str, sources: Iterable[str]) -> None:
        """Images or videos for the next message, looked at now so that a wrong name shows at once; a URL is fetched this one time.

        Raises VlmfxError, and then none is added."""
        made, processor = [], self.llm.model.processor
        for source in sources:
            if not source:
                raise VlmfxError(f"/{kind} names nothing; write a FILE or URL after it.")
            value = load(Media(kind, source, kind), processor.media)
            if kind == "image":
                height, width = image_size(value, field=kind)
                what = f"{width} x {height}"
            else:
                what = f"{probe(value, sampling_of(processor.media_io_kwargs), field=kind).num_frames} frames"
            made.append({"type": kind, kind: value})
            if self.is_terminal:
                _say(f"{kind} of {what} goes with the next message")
        self.media += made

    def ask(self, text: str) -> None:
        """The answer to a message, streamed to stdout. Raises VlmfxError."""
        message = {"role": "user", "content": [*self.media, {"type": "text", "text": text}]}
        opening = [{"role": "system", "content": self.system}] if self.system else []
        said: list[str] = []

        def show(number: int, new: str) -> None:
            said.append(new)
            print(new, end="", flush=True)
            if interrupt.came:
                raise KeyboardInterrupt

        self.media = []
        try:
            with Interrupt() as interrupt:
                (output,) = self.llm.chat([*opening, *self.history, message], self.params, on_text=show)
        except KeyboardInterrupt:
            if not self.is_terminal:
                raise
            print()
            _say("interrupted" if said else "interrupted; the message is forgotten")
            if said:
                self._keep(message, "".join(said))
            return
        print()
        self._keep(message, output.outputs[0].text)
        if self.shows_speed and output.metrics is not None:
            _say(f"{output.metrics.prompt_tokens} prompt tokens, {output.metrics.speed}")

    def _keep(self, message: dict[str, Any], answer: str) -> None:
        self.history += [message, {"role": "assistant", "content": answer}]


class Interrupt:
    """Notes the first ^C, so that no step of the engine is cut in two by it; a second one is raised as ever."""

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *args: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, *args: Any) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True


def _sources(text: str) -> list[str]:
    """The files and URLs that a command names: one file as it is, spaces and all, or several, quoted or escaped as in a shell and as
    terminals write files that are dropped on them."""
    if os.path.exists(os.path.expanduser(text)):
        return [os.path.expanduser(text)]
    words = [text]
    with suppress(ValueError):  # an open quote
        words = shlex.split(text)
    return [word if SCHEME.match(word) else os.path.expanduser(word) for word in words]


def _edit_lines() -> None:
    """Arrow keys, history and the completion of file names for input(), where Python has readline."""
    with suppress(ImportError):
        import readline

        readline.set_completer_delims(" \t\n")
        readline.parse_and_bind("tab: complete")


def _say(text: str) -> None:
    print(f"vlmfx: {text}", file=sys.stderr)
