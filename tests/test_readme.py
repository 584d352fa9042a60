"""The README's examples run as they stand, and the commands it names exist."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlmfx.cli import _parser
from vlmfx.processing.chat import load_chat_template

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TAPS = (ROOT / "docs" / "taps.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README + TAPS, re.S)


@pytest.fixture
def desk(tmp_path):
    """A folder with the picture that the examples open."""
    shutil.copy(ROOT / "vlmfx/assets/demo.png", tmp_path / "picture.png")
    return tmp_path


def run(args, desk):
    return subprocess.run([sys.executable, *args], cwd=desk, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("number", range(len(PYTHON_BLOCKS)))
def test_python_block_runs(desk, number):
    done = run(["-c", PYTHON_BLOCKS[number]], desk)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_first_example_prints_what_the_readme_says(desk):
    expected = re.search(r"prints `(.*?)` for", README)
    assert expected is not None
    assert run(["-c", PYTHON_BLOCKS[0]], desk).stdout.strip() == expected[1]


def test_taps_example_prints_what_its_page_says(desk):
    expected = re.search(r"prints `(.*?)`\.", TAPS)
    assert expected is not None
    assert run(["-c", PYTHON_BLOCKS[-1]], desk).stdout.strip() == expected[1]


def test_command_line_example_answers(desk):
    done = run(["-m", "vlmfx", "generate", "--image", "picture.png", "How many objects are there?"], desk)
    assert (done.returncode, done.stdout.strip()) == (0, "4"), done.stderr


def test_command_line_error_is_one_sentence(desk):
    done = run(["-m", "vlmfx", "generate", "--image", "missing.png", "What is this?"], desk)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "missing.png" in done.stderr


def test_demo_prints_question_answer_and_speed(desk):
    done = run(["-m", "vlmfx", "demo"], desk)
    assert done.returncode == 0, done.stderr
    for word in ("picture", "question", "answer", "tokens per second"):
        assert word in done.stdout


def commands():
    """The words of every vlmfx command in the README's blocks, comments left out."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, re.S | re.M)
    return [
        shlex.split(line, comments=True)[1:] for b in blocks for line in b.splitlines() if line.startswith("vlmfx ")
    ]


def test_the_readme_has_commands():
    assert {words[0] for words in commands()} >= {"generate", "chat", "embed", "verify", "doctor"}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_that_the_readme_shows_are_right(words):
    arguments = _parser().parse_args(words)  # SystemExit for a flag that is not there
    template = getattr(arguments, "chat_template", None)
    if template is not None:
        assert load_chat_template("", template)


def test_make_targets_that_the_readme_names_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (\S+)", README, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target
