"""`vlmfx chat`: what is asked is what LLM.chat is asked, and a terminal's user is not thrown out by a slip."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.golden_cases import TINY, load_model
from tests.pictures import picture
from tests.videos import container, noise
from vlmfx import LLM, SamplingParams
from vlmfx.cli import main
from vlmfx.terminal import Interrupt

DEMO = Path(__file__).parents[1] / "vlmfx" / "assets" / "demo.png"


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def converse(monkeypatch: pytest.MonkeyPatch, lines: list[str], *options: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main(["chat", "--model", str(TINY["qwen2_vl"]), "--device", "cpu", "--max-tokens", "5", *options])


def test_a_conversation_on_the_terminal(monkeypatch, capsys, tmp_path):
    path = tmp_path / "a picture.png"
    picture(40, 50).save(path)
    lines = [f"/image {path}", "What is it?", "", "And now?", "/new", "Alone", "/quit", "never asked"]
    assert converse(monkeypatch, lines, "--system", "Be brief.") == 0
    llm, params = LLM(load_model(TINY["qwen2_vl"])), SamplingParams.greedy(max_tokens=5)
    system = {"role": "system", "content": "Be brief."}
    first = [system, user({"type": "image", "image": path}, text("What is it?"))]
    answer = llm.chat(first, params)[0].outputs[0].text
    second = llm.chat([*first, {"role": "assistant", "content": answer}, user("And now?")], params)[0].outputs[0].text
    alone = llm.chat([system, user("Alone")], params)[0].outputs[0].text
    assert capsys.readouterr().out == f"{answer}\n{second}\n{alone}\n"


def test_what_goes_wrong_in_a_conversation_is_not_kept(monkeypatch, capsys, tmp_path):
    path = tmp_path / "a.png"
    picture(40, 50).save(path)
    lines = ["/image none.png", "/image http://127.0.0.1/a.png", "/help", f"/image {path}", "Too many", "Alone"]
    assert converse(monkeypatch, lines, "--image", str(path), "--limit-mm-per-prompt", "image=1") == 1
    captured = capsys.readouterr()
    llm, params = LLM(load_model(TINY["qwen2_vl"])), SamplingParams.greedy(max_tokens=5)
    assert captured.out == llm.chat([user("Alone")], params)[0].outputs[0].text + "\n"
    errors = captured.err.splitlines()
    assert "is not a file" in errors[0]
    assert "no public address" in errors[1]
    assert "/quit" in captured.err
    assert "limit_mm_per_prompt allows 1 image" in errors[-1]


class Terminal(io.StringIO):
    """Lines that somebody types; ^C is one that raises."""

    def isatty(self) -> bool:
        return True

    def readline(self, size: int | None = -1, /) -> str:  # type: ignore[override]
        line = super().readline()
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


def typed(monkeypatch: pytest.MonkeyPatch, lines: list[str], *options: str) -> tuple[int, list[Any]]:
    """The exit code of a conversation on a terminal, and the messages of each question. An answer that begins with "cut" is interrupted
    at its first text, one with "cut at once" before it."""
    real, asked = LLM.chat, list[Any]()

    def chat(self: LLM, messages: Any, params: Any, on_text: Any) -> Any:
        asked.append(messages)
        words = messages[-1]["content"][-1]["text"]
        if words.startswith("cut at once"):
            raise KeyboardInterrupt

        def told(number: int, new: str) -> None:
            if words.startswith("cut"):
                signal.raise_signal(signal.SIGINT)
            on_text(number, new)

        return real(self, messages, params, on_text=told)

    monkeypatch.setattr(LLM, "chat", chat)
    monkeypatch.setattr("sys.stdin", Terminal("".join(f"{line}\n" for line in lines)))
    options = ("--model", str(TINY["qwen2_vl"]), "--device", "cpu", "--max-tokens", "30", "--ignore-eos", *options)
    return main(["chat", *options]), asked


def test_an_answer_that_is_interrupted_is_kept_as_far_as_it_came(monkeypatch, capsys):
    status, asked = typed(monkeypatch, ["First", "cut this", "cut at once", "Last"])
    assert status == 0
    first, cut, _, last = asked
    assert cut == [*first, last[1], user(text("cut this"))]
    assert [message["role"] for message in last] == ["user", "assistant", "user", "assistant", "user"]
    assert last[2:3] + last[4:] == [user(text("cut this")), user(text("Last"))]
    assert 0 < len(last[3]["content"]) < len(last[1]["content"]), "some of it"
    captured = capsys.readouterr()
    assert last[3]["content"] in captured.out
    assert captured.err.count("interrupted") == 2
    assert captured.err.count("forgotten") == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_does_not_wait_for_text():
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.came
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_at_a_prompt_one_interrupt_is_a_slip_and_two_are_meant(monkeypatch, capsys):
    status, asked = typed(monkeypatch, ["^C", "One", "^C", "^C", "never"])
    assert status == 130
    assert len(asked) == 1
    assert capsys.readouterr().err.count("/quit or end of file") == 2


def test_what_is_piped_in_ends_at_an_interrupt(monkeypatch):
    def interrupted(*args: Any, **kwargs: Any) -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(LLM, "chat", interrupted)
    assert converse(monkeypatch, ["One", "Two"]) == 130


def test_commands(monkeypatch, capsys, tmp_path):
    names = ["a b.png", "c.png"]
    for name in names:
        picture(40, 50).save(tmp_path / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = [
        f"/image {tmp_path}/a b.png", "One", f"/image ~/c.png '{tmp_path}/a b.png' {tmp_path}/a\\ b.png", "/image", "/image 'open",
        f"/image {tmp_path}/c.png none.png", "Three", "/system Be brief.", "Four", "/image ~/c.png", "/new", "Five", "/system", "Six",
    ]  # fmt: skip
    status, asked = typed(monkeypatch, lines, "--speed", "--system", "At first.")
    assert status == 0
    images = [[Path(p["image"]).name for p in m[-1]["content"] if p["type"] == "image"] for m in asked]
    assert images == [["a b.png"], ["c.png", "a b.png", "a b.png"], [], [], []]
    systems = [[m["content"] for m in messages if m["role"] == "system"] for messages in asked]
    assert systems == [["At first."], ["At first."], ["Be brief."], ["Be brief."], []]
    assert [len(messages) for messages in asked] == [2, 4, 6, 2, 3]
    said = capsys.readouterr().err
    assert said.count("image of 40 x 50 goes with the next message") == 6
    assert "/image names nothing" in said
    assert said.count("is not a file") == 2
    assert said.count("tokens per second") == 5


def test_a_conversation_may_hold_a_video(monkeypatch, capsys, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(container(noise(6, 40, 56)))
    options = ["--media-io-kwargs", '{"video": {"num_frames": 2}}']
    assert converse(monkeypatch, [f"/video {path}", "What happens?"], *options) == 0
    llm = LLM(load_model(TINY["qwen2_vl"]), media_io_kwargs={"video": {"num_frames": 2}})
    message = user({"type": "video", "video": str(path)}, text("What happens?"))
    expected = llm.chat([message], SamplingParams.greedy(max_tokens=5))[0].outputs[0].text + "\n"
    assert capsys.readouterr().out == expected
    assert converse(monkeypatch, ["What happens?"], *options, "--video", str(path)) == 0
    assert capsys.readouterr().out == expected
    assert converse(monkeypatch, ["/video none.mp4"]) == 1
    assert "none.mp4" in capsys.readouterr().err


@pytest.mark.parametrize(("lines", "status"), [(b"\xff\n", 0), (b"/image none.png\n", 1)])
def test_what_is_piped_in_need_not_be_utf8(lines, status):
    command = [sys.executable, "-m", "vlmfx", "chat", "--max-tokens", "1", "--device", "cpu"]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, input=lines, capture_output=True, check=False, env=env)
    assert done.returncode == status, done.stderr
    assert b"Traceback" not in done.stderr


class Pty:
    """`vlmfx chat` on a terminal of its own."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "vlmfx", "chat", "--device", "cpu", *options]
        env = {**os.environ, "TERM": "dumb", "PYTHONPATH": str(Path(__file__).parents[1])}
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, env)

    def until(self, *ends: str, timeout: float = 60) -> str:
        """What it writes until it has written one of ends last."""
        found, end = b"", time.monotonic() + timeout
        while not found.decode(errors="replace").endswith(ends):
            assert time.monotonic() < end, found
            if select.select([self.file], [], [], 0.1)[0]:
                found += os.read(self.file, 65536)
        return found.decode().replace("\r\n", "\n")

    def types(self, keys: str) -> None:
        os.write(self.file, keys.encode())

    def status(self) -> int:
        """Its exit code; what is left to read is lost."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("it does not end")


def test_on_a_real_terminal():
    talk = Pty("--ignore-eos", "--max-tokens", "1500")
    talk.until("> ")
    for line in (f"/image {DEMO}", "Describe the picture."):
        talk.types(f"{line}\n")
        shown = talk.until("> ", " circle")
    assert "A red star" in shown
    talk.types("\x03")
    assert "interrupted" in talk.until("> ")
    talk.types("half a line")
    talk.until("half a line")
    time.sleep(0.5)  # Python's input() misses an interrupt that comes as it begins
    talk.types("\x03")
    assert "once more" in talk.until("> ")
    talk.types("\x04")
    assert talk.status() == 0
