"""The command line: an answer on stdout and 0, or one sentence on stderr and 1."""

from __future__ import annotations

import pytest

from tests.golden_cases import TINY, load_model
from tests.pictures import about, picture
from vlmfx import LLM, SamplingParams, __version__
from vlmfx.cli import main


@pytest.fixture(params=TINY)
def folder(request: pytest.FixtureRequest) -> str:
    return str(TINY[request.param])


def test_generate_prints_the_answer(folder, tmp_path, capsys):
    path = tmp_path / "picture.png"
    picture(40, 50).save(path)
    model = load_model(next(f for f in TINY.values() if str(f) == folder))
    message = [{"role": "user", "content": [{"type": "image", "image": path}, {"type": "text", "text": "What is it?"}]}]
    params = SamplingParams.greedy(max_tokens=8)
    for options, prompt in (
        ([], {"messages": message}),
        (["--raw"], about(model, path)),
    ):
        question = "What is it?" if not options else prompt["prompt"]
        arguments = [
            "generate",
            question,
            "--model",
            folder,
            "--image",
            str(path),
            "--max-tokens",
            "8",
            "--device",
            "cpu",
        ]
        assert main([*arguments, *options]) == 0
        assert capsys.readouterr().out == LLM(model).generate(prompt, params)[0].outputs[0].text + "\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--image", "no/such.png"], "is not a file"),
        (["--temperature", "-1"], "temperature: found -1.0"),
        (["--max-tokens", "0"], "max_tokens: found 0"),
        (["--dtype", "int3"], 'dtype is "int3"'),
        (["--max-model-len", "1"], "max_model_len: it is 1"),
        (["--chat-template", "no/such.jinja"], "chat_template"),
    ],
)
def test_an_error_is_one_sentence_on_stderr(folder, arguments, says, capsys):
    assert main(["generate", "What?", "--model", folder, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("vlmfx: ")
    assert says in captured.err
    assert captured.err.endswith(".\n")
    assert captured.err.count("\n") == 1


def test_version_and_wrong_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert __version__ in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["generate"])
    assert caught.value.code == 2
