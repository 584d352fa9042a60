"""The examples run as they stand, on tiny checkpoints; what they print is what the library answers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from tests.golden_cases import COMMITTED, TINY, load_model
from tests.pictures import picture
from vlmfx import LLM, SamplingParams, embed
from vlmfx.checkpoint import FAMILIES

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MODELS = COMMITTED / "models"
FOLDERS = {
    "llava": MODELS / "llava-b",
    "qwen2_vl": MODELS / "qwen2vl-tiny",
    "qwen2_5_vl": MODELS / "qwen25vl-tiny",
    "qwen3_vl": MODELS / "qwen3vl-tiny",
    "phi3_v": MODELS / "phi3v-tiny",
    "minicpm_v": MODELS / "minicpmv-tiny",
}
WITH_VIDEO = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def path(tmp_path: Path) -> Path:
    picture(80, 60).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_every_family_has_its_model():
    for name in ("offline_vision", "offline_multi_image"):
        assert set(example(name).FAMILIES) == set(FAMILIES.values()) == set(FOLDERS)


def test_the_examples_are_short():
    for file in EXAMPLES.glob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) < 150


def chatted(family: str, *images: Image.Image, text: str, kind: str = "image") -> str:
    parts = [{"type": kind, kind: image} for image in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    llm = LLM(load_model(FOLDERS[family]))
    output = llm.chat(messages, SamplingParams(temperature=0, max_tokens=6))[0]
    return output.outputs[0].text


def llava_answer(prompt: str, *paths: Path) -> str:
    """Six greedy tokens of the prompt as its page on the hub writes it."""
    request = {"prompt": prompt, "multi_modal_data": {"image": [Image.open(path) for path in paths]}}
    params = SamplingParams(temperature=0, max_tokens=6)
    return LLM(load_model(FOLDERS["llava"])).generate(request, params)[0].outputs[0].text


@pytest.mark.parametrize("family", FOLDERS)
def test_vision(family, path, capsys):
    options = ["--model", str(FOLDERS[family]), "--dtype", "float32", "--max-tokens", "6"]
    example("offline_vision").main(["--model-type", family, *options, "--image", str(path), "--num-prompts", "2"])
    printed = capsys.readouterr().out
    if family == "llava":  # its template has a space where the usual prompt has a line break
        expected = llava_answer("USER: <image>\nWhat is in this image?\nASSISTANT:", path)
        assert expected.strip()
    else:  # the prompt that is written out is the one the checkpoint's template writes
        expected = chatted(family, Image.open(path), text="What is in this image?")
    assert printed == f"{expected}\n" * 2


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_video(family, capsys):
    options = ["--model", str(FOLDERS[family]), "--dtype", "float32", "--max-tokens", "6", "--num-frames", "4"]
    module = example("offline_vision")
    module.main(["--model-type", family, "--modality", "video", *options])
    frames = module.wandering(Image.open(module.DEMO).convert("RGB"), 4)
    assert len({frame.tobytes() for frame in frames}) == 4
    expected = chatted(family, frames, text="What is shown in this video?", kind="video")
    assert capsys.readouterr().out == f"{expected}\n"


def test_a_model_without_video_says_so(capsys):
    with pytest.raises(SystemExit):
        example("offline_vision").main(["--model-type", "llava", "--modality", "video"])
    assert "llava takes no video; use one of the Qwen models" in capsys.readouterr().err


@pytest.mark.parametrize("family", FOLDERS)
def test_multi_image(family, path, capsys):
    module = example("offline_multi_image")
    given = ["--model-type", family, "--model", str(FOLDERS[family]), "--dtype", "float32", "--max-tokens", "6"]
    printed = []
    for method in ("generate", "chat"):
        module.main([*given, "--method", method, "--image", str(path), "--image", str(module.DEMO)])
        printed.append(capsys.readouterr().out)
    images = [Image.open(path), Image.open(module.DEMO)]
    assert printed[1] == f"{chatted(family, *images, text='What is the content of each image?')}\n"
    if family == "llava":
        prompt = "USER: <image>\n<image>\nWhat is the content of each image?\nASSISTANT:"
        assert printed[0] == f"{llava_answer(prompt, path, module.DEMO)}\n"
    else:
        assert printed[0] == printed[1]
    module.main(given)
    assert capsys.readouterr().out


def test_embedding(path, capsys):
    module = example("offline_embedding")
    folder = TINY["qwen2_vl"]
    given = ["--model-type", "dse", "--model", str(folder), "--dtype", "float32", "--query", "a star"]
    module.main([*given, "--image", str(path), "--image", str(module.DEMO), "--dimensions", "8"])
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    head, tail = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    texts = [(Image.new("RGB", (56, 56)), "Query: a star")]
    texts += [(Image.open(file), "What is shown in this image?") for file in (path, module.DEMO)]
    prompts = [
        {"prompt": f"{system}{head}{text}{tail}<|endoftext|>", "multi_modal_data": {"image": image}}
        for image, text in texts
    ]
    vectors = embed(load_model(folder), prompts, 8, use_tqdm=False)
    expected = {str(path): float(vectors[1] @ vectors[0]), str(module.DEMO): float(vectors[2] @ vectors[0])}
    assert {name: float(value) for value, name in lines} == pytest.approx(expected, abs=1e-4)
    assert float(lines[0][0]) >= float(lines[1][0])


def test_embedding_of_vlm2vec(capsys):
    module = example("offline_embedding")
    module.main(["--model-type", "vlm2vec", "--model", str(FOLDERS["phi3_v"]), "--dtype", "float32"])
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert {name for _, name in lines} == {"left half", "right half"}
    halves = [Image.open(module.DEMO).crop(box) for box in ((0, 0, 126, 252), (126, 0, 252, 252))]
    prompts = ["Find me an everyday image that matches the given caption: a star"]
    prompts += [
        {"prompt": "<|image_1|> Represent the given image.", "multi_modal_data": {"image": half}}  # type: ignore[misc]
        for half in halves
    ]
    vectors = embed(load_model(FOLDERS["phi3_v"]), prompts, use_tqdm=False)
    expected = {"left half": float(vectors[1] @ vectors[0]), "right half": float(vectors[2] @ vectors[0])}
    assert {name: float(value) for value, name in lines} == pytest.approx(expected, abs=1e-4)


def test_pages_are_found_again(tmp_path, capsys):
    module, paths = example("page_retrieval"), [str(tmp_path / f"{name}.png") for name in ("a", "b", "c")]
    for seed, file in enumerate(paths):
        picture(90, 120, seed).save(file)
    index = str(tmp_path / "pages.npz")
    options = ["--model", str(TINY["qwen2_vl"]), "--dtype", "float32", "--index", index, "--dimensions", "16"]
    module.main([*options, "--pages", *paths[:2]])
    module.main([*options, "--pages", *paths[1:]])
    assert capsys.readouterr().out == "".join(f"{index} has {count} pages of 16 numbers\n" for count in (2, 3))
    module.main([*options, "--query", "a star", "--query", "a word", "--top-k", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[::3] == ["a star", "a word"]
    llm = LLM(str(TINY["qwen2_vl"]), task="embed", chat_template="template_dse_qwen2_vl", dtype="float32")
    prompts = [module.prompt(Image.open(file), "What is shown in this image?") for file in paths]
    prompts.append(module.prompt(Image.new("RGB", (56, 56)), "Query: a star"))
    vectors = embed(llm, prompts, 16, use_tqdm=False)
    scores = dict(zip(paths, (vectors[:3] @ vectors[3]).tolist(), strict=True))
    expected = sorted(paths, key=lambda file: -scores[file])[:2]
    assert [line.split()[1] for line in lines[1:3]] == expected
    assert [float(line.split()[0]) for line in lines[1:3]] == pytest.approx(
        [scores[file] for file in expected], abs=1e-4
    )


def test_pages_are_drawn_where_none_are_given(capsys):
    example("page_retrieval").main(["--model", str(TINY["qwen2_vl"]), "--dtype", "float32"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert {line.split()[1] for line in lines[1:4]} == {"invoice", "recipe", "letter"}


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_each_says_what_it_shows_and_how_it_is_used(file, capsys):
    module = example(file.stem)
    assert f"python examples/{file.name}" in (module.__doc__ or "")
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out
