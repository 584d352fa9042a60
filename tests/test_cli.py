"""The command line: an answer on stdout and 0, or one sentence on stderr and 1."""

from __future__ import annotations

import json

import pytest

from tests.golden_cases import EVERY, TINY, load_model
from tests.pictures import about, picture
from tests.videos import container, noise
from vlmfx import LLM, SamplingParams, __version__
from vlmfx.cli import main
from vlmfx.compile.buckets import Plan
from vlmfx.engine.request import RequestMetrics


@pytest.fixture(params=EVERY)
def folder(request: pytest.FixtureRequest) -> str:
    return str(EVERY[request.param])


def test_generate_prints_the_answer(folder, tmp_path, capsys):
    path = tmp_path / "picture.png"
    picture(40, 50).save(path)
    model = load_model(next(f for f in EVERY.values() if str(f) == folder))
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


@pytest.fixture
def clip(tmp_path) -> str:
    path = tmp_path / "clip.mp4"
    path.write_bytes(container(noise(6, 40, 56)))
    return str(path)


TWO_FRAMES = {"video": {"num_frames": 2}}


def test_generate_takes_videos_and_settings(clip, capsys):
    folder = str(TINY["qwen2_vl"])
    llm = LLM(load_model(TINY["qwen2_vl"]), media_io_kwargs=TWO_FRAMES, mm_processor_kwargs={"max_pixels": 4000})
    options = ["--media-io-kwargs", json.dumps(TWO_FRAMES), "--mm-processor-kwargs", '{"max_pixels": 4000}']
    arguments = ["generate", "--model", folder, "--device", "cpu", "--max-tokens", "6", "--video", clip, *options]
    parts = [{"type": "video", "video": clip}, {"type": "text", "text": "What?"}]
    raw = "<|vision_start|><|video_pad|><|vision_end|>What?"
    params = SamplingParams.greedy(max_tokens=6)
    for more, prompt in (
        (["What?"], {"messages": [{"role": "user", "content": parts}]}),
        (["--raw", raw], {"prompt": raw, "multi_modal_data": {"video": [clip]}}),
    ):
        assert main([*arguments, *more]) == 0
        assert capsys.readouterr().out == llm.generate(prompt, params)[0].outputs[0].text + "\n"


def test_embed_takes_videos(clip, capsys):
    options = ["--device", "cpu", "--dtype", "float32", "--media-io-kwargs", json.dumps(TWO_FRAMES)]
    assert main(["embed", "--model", str(TINY["qwen2_vl"]), "--video", clip, *options]) == 0
    (vector,) = json.loads(capsys.readouterr().out)
    prompt = {"messages": [{"role": "user", "content": [{"type": "video", "video": clip}]}]}
    llm = LLM(load_model(TINY["qwen2_vl"]), task="embed", media_io_kwargs=TWO_FRAMES)
    assert vector == pytest.approx(llm.embed(prompt)[0].outputs.embedding, abs=1e-6)


@pytest.mark.parametrize(
    ("option", "text", "says"),
    [
        ("--media-io-kwargs", "{", "media_io_kwargs: it is not JSON"),
        ("--mm-processor-kwargs", "num_crops=4", "mm_processor_kwargs: it is not JSON"),
        ("--mm-processor-kwargs", "[1]", "mm_processor_kwargs: it is a list"),
        ("--media-io-kwargs", '{"video": 3}', "media_io_kwargs: it is"),
    ],
)
def test_settings_that_are_wrong_are_told(option, text, says, capsys):
    assert main(["generate", "What?", "--model", str(TINY["llava"]), option, text]) == 1
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("tokens", "first", "rest", "says"),
    [
        (11, 0.25, 0.5, "first token after 250 ms, then 20 tokens per second"),
        (1, 0.25, 0.0, "first token after 250 ms, then 0 tokens per second"),
        (0, None, None, "no token"),
    ],
)
def test_speed_is_that_of_the_tokens_after_the_first(tokens, first, rest, says):
    metrics = RequestMetrics(prompt_tokens=3, output_tokens=tokens, time_to_first_token_s=first, decode_s=rest)
    assert metrics.speed == says


@pytest.fixture
def trace(tmp_path) -> str:
    path = tmp_path / "requests.jsonl"
    path.write_text(
        '{"num_tokens": 300, "num_patches": 1024}\n{"num_tokens": 20, "max_tokens": 16}\n', encoding="utf-8"
    )
    return str(path)


def test_plan_prints_a_table_and_writes_the_plan(trace, tmp_path, capsys):
    out = tmp_path / "plan.json"
    options = ["--max-graphs", "16", "--max-num-seqs", "8", "--weight", "encode=2", "--compile-seconds", "prefill=3"]
    assert main(["plan", "--trace", trace, *options, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    plan = Plan.from_json(out.read_text(encoding="utf-8"))
    assert (plan.encode, plan.decode, plan.max_graphs) == ((1024, 16384), (1, 2, 4, 8), 16)
    assert "encode, patches: 1024 16384\n" in told
    assert "(--max-num-seqs)" in told
    assert f"{len(plan.prefill) * 3} s\n" in told


def test_plan_takes_as_few_graphs_as_a_share_needs(trace, capsys):
    assert main(["plan", "--trace", trace, "--max-padding", "0.2"]) == 0
    assert "prefill, tokens: 32 304 8192\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--max-padding", "0.001"], "max_padding: 0.001 is not reached"),
        (["--max-graphs", "3"], "max_graphs is 3, but the coarsest ladders have 9 rungs"),
        (["--weight", "decode=1"], "weight: it is 'decode=1'; write encode=, prefill=, pool= and a number"),
        (["--weight", "encode=nan"], "weight: it is 'encode=nan'"),
        (["--compile-seconds", "encode"], "compile_seconds: it is 'encode'"),
        (["--trace", "no/such.jsonl"], "trace: no/such.jsonl cannot be read"),
        (["--out", "no/such/plan.json"], "out: no/such/plan.json cannot be written"),
    ],
)
def test_a_plan_that_cannot_be_made_is_told(trace, options, says, capsys):
    assert main(["plan", "--trace", trace, *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
    assert captured.err.count("\n") == 1


def test_plan_names_the_bad_line_of_a_trace(trace, capsys):
    with open(trace, "a", encoding="utf-8") as file:
        file.write('{"tokens": 3}\n')
    assert main(["plan", "--trace", trace]) == 1
    assert "trace, line 3: num_tokens is missing" in capsys.readouterr().err
