"""Every offline example of the reference text (a page of vLLM's documentation, "Using VLMs") runs, with the import changed alone.

The code of the functions in EXAMPLES is the page's; what the page leaves open as "..." is a picture, a tensor or a list of frames here.
The hub ids it names lead to tiny checkpoints of the same architecture. What each example prints is compared with the same request
written in another way."""

from __future__ import annotations

import base64
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from tests.golden_cases import COMMITTED, SHARED
from tests.pictures import encoded, picture
from vlmfx import LLM, checkpoint
from vlmfx.processing.prompt import prepare

# The page's lines stay as the page breaks them.
# fmt: off

PAGE = SHARED.parent / "reference" / "using_vlms.rst"
MODELS = {
    "llava-hf/llava-1.5-7b-hf": COMMITTED / "models" / "llava-b",
    "microsoft/Phi-3.5-vision-instruct": COMMITTED / "models" / "phi3v-tiny",
    "Qwen/Qwen2-VL-2B-Instruct": COMMITTED / "models" / "qwen2vl-tiny",
    "openbmb/MiniCPM-V-2_6": COMMITTED / "models" / "minicpmv-tiny",
}


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that has the models of the page, small."""
    monkeypatch.setattr(checkpoint, "resolve", lambda model, **options: MODELS[model])


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Two picture files."""
    names = [str(tmp_path / f"{number}.png") for number in range(2)]
    for number, name in enumerate(names):
        picture(60 + 30 * number, 40, number).save(name)
    return names


def answer(llm: LLM, *prompts: dict[str, Any]) -> str:
    """What is printed for these prompts, each alone in its batch."""
    return "".join(f"{llm.generate(prompt)[0].outputs[0].text}\n" for prompt in prompts)


def features(llm: LLM, prompt: str, image: PIL.Image.Image) -> torch.Tensor:
    """(rows, hidden): what the model makes of an image."""
    model = llm.model
    vision = prepare(model.processor, {"prompt": prompt, "multi_modal_data": {"image": image}}).vision
    with torch.no_grad():
        rows: torch.Tensor = model.functions.encode(model.params, model.config, vision)
    return rows


def single_image(path: str) -> tuple[LLM, str, Any]:
    llm = LLM(model="llava-hf/llava-1.5-7b-hf")

    # Refer to the HuggingFace repo for the correct format to use
    prompt = "USER: <image>\nWhat is the content of this image?\nASSISTANT:"

    # Load the image using PIL.Image
    image = PIL.Image.open(path)

    # Single prompt inference
    outputs = llm.generate({
        "prompt": prompt,
        "multi_modal_data": {"image": image},
    })

    for o in outputs:
        generated_text = o.outputs[0].text
        print(generated_text)
    return llm, prompt, image


def test_single_image(paths, capsys):
    llm, prompt, image = single_image(paths[0])
    printed = capsys.readouterr().out
    parts = [{"type": "image", "image": paths[0]}, {"type": "text", "text": "What is the content of this image?"}]
    messages = [{"role": "user", "content": parts}]
    chatted = llm.chat(messages, chat_template="template_llava.jinja")
    assert printed == f"{chatted[0].outputs[0].text}\n"
    assert printed != answer(llm, {"prompt": prompt, "multi_modal_data": {"image": picture(50, 50, 7)}})
    assert printed == answer(llm, {"prompt": prompt, "multi_modal_data": {"image": image}})


def image_embeds_as_input(llm: LLM, prompt: str, rows: torch.Tensor) -> None:
    # Inference with image embeddings as input
    image_embeds = rows[None]
    outputs = llm.generate({
        "prompt": prompt,
        "multi_modal_data": {"image": image_embeds},
    })

    for o in outputs:
        generated_text = o.outputs[0].text
        print(generated_text)


def test_image_embeds(paths, capsys):
    llm, prompt, image = single_image(paths[0])
    expected = capsys.readouterr().out
    image_embeds_as_input(llm, prompt, features(llm, prompt, image))
    assert capsys.readouterr().out == expected


def embeds_with_image_grid_thw(llm: LLM, prompt: str, rows: torch.Tensor, grid: torch.Tensor) -> None:
    # Inference with image embeddings as input with additional parameters
    # Specifically, we are conducting a trial run of Qwen2VL and MiniCPM-V with the new input format, which utilizes additional parameters.
    mm_data = {}

    image_embeds = rows[None]
    # For Qwen2VL, image_grid_thw is needed to calculate positional encoding.
    mm_data['image'] = {
        "image_embeds": image_embeds,
        "image_grid_thw": grid
    }

    outputs = llm.generate({
        "prompt": prompt,
        "multi_modal_data": mm_data,
    })

    for o in outputs:
        generated_text = o.outputs[0].text
        print(generated_text)


def test_embeds_with_image_grid_thw(paths, capsys):
    llm = LLM(model="Qwen/Qwen2-VL-2B-Instruct")
    prompt = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    image = PIL.Image.open(paths[0])  # 60 x 40: resized to 56 x 84, 4 x 6 patches of 14, in blocks of 2 x 2
    rows = features(llm, prompt, image)
    assert rows.shape[0] == 6
    embeds_with_image_grid_thw(llm, prompt, rows, torch.tensor([[1, 4, 6]]))
    expected = answer(llm, {"prompt": prompt, "multi_modal_data": {"image": image}})
    assert capsys.readouterr().out == expected


def embeds_with_image_size_list(llm: LLM, prompt: str, rows: torch.Tensor, image: PIL.Image.Image) -> None:
    mm_data = {}

    image_embeds = rows[None]
    # For MiniCPM-V, image_size_list is needed to calculate details of the sliced image.
    mm_data['image'] = {
        "image_embeds": image_embeds,
        "image_size_list": [image.size] # list of image sizes
    }

    outputs = llm.generate({
        "prompt": prompt,
        "multi_modal_data": mm_data,
    })

    for o in outputs:
        generated_text = o.outputs[0].text
        print(generated_text)


def test_embeds_with_image_size_list(paths, capsys):
    llm = LLM(model="openbmb/MiniCPM-V-2_6", trust_remote_code=True)
    prompt = "<|im_start|>user\n(<image>./</image>)\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    image = PIL.Image.open(paths[0])
    embeds_with_image_size_list(llm, prompt, features(llm, prompt, image), image)
    expected = answer(llm, {"prompt": prompt, "multi_modal_data": {"image": image}})
    assert capsys.readouterr().out == expected


def batch_inference(llm: LLM, paths: list[str]) -> None:
    # Batch inference
    image_1 = PIL.Image.open(paths[0])
    image_2 = PIL.Image.open(paths[1])
    outputs = llm.generate(
        [
            {
                "prompt": "USER: <image>\nWhat is the content of this image?\nASSISTANT:",
                "multi_modal_data": {"image": image_1},
            },
            {
                "prompt": "USER: <image>\nWhat's the color of this image?\nASSISTANT:",
                "multi_modal_data": {"image": image_2},
            }
        ]
    )

    for o in outputs:
        generated_text = o.outputs[0].text
        print(generated_text)


def test_batch_inference(paths, capsys):
    llm = LLM(model="llava-hf/llava-1.5-7b-hf")
    batch_inference(llm, paths)
    questions = ("What is the content of this image?", "What's the color of this image?")
    prompts = [
        {"prompt": f"USER: <image>\n{question}\nASSISTANT:", "multi_modal_data": {"image": path}}
        for question, path in zip(questions, paths, strict=True)
    ]
    assert capsys.readouterr().out == answer(llm, *prompts)


def multi_image(paths: list[str]) -> LLM:
    llm = LLM(
        model="microsoft/Phi-3.5-vision-instruct",
        trust_remote_code=True,  # Required to load Phi-3.5-vision
        max_model_len=4096,  # Otherwise, it may not fit in smaller GPUs
        limit_mm_per_prompt={"image": 2},  # The maximum number to accept
    )

    # Refer to the HuggingFace repo for the correct format to use
    prompt = "<|user|>\n<|image_1|>\n<|image_2|>\nWhat is the content of each image?<|end|>\n<|assistant|>\n"

    # Load the images using PIL.Image
    image1 = PIL.Image.open(paths[0])
    image2 = PIL.Image.open(paths[1])

    outputs = llm.generate({
        "prompt": prompt,
        "multi_modal_data": {
            "image": [image1, image2]
        },
    })

    for o in outputs:
        generated_text = o.outputs[0].text
        print(generated_text)
    return llm


def test_multi_image(paths, capsys):
    llm = multi_image(paths)
    parts = [{"type": "image", "image": path} for path in paths]
    question = {"type": "text", "text": "What is the content of each image?"}
    (chatted,) = llm.chat([{"role": "user", "content": [*parts, question]}])
    assert capsys.readouterr().out == f"{chatted.outputs[0].text}\n"
    assert llm.model.max_model_len == 4096


def encode_image(frame: PIL.Image.Image) -> str:
    """A frame as the page sends it: a JPEG file in base64."""
    return base64.b64encode(encoded(frame, "JPEG")).decode()


def video_as_images(frames: list[PIL.Image.Image]) -> LLM:
    # Specify the maximum number of frames per video to be 4. This can be changed.
    llm = LLM("Qwen/Qwen2-VL-2B-Instruct", limit_mm_per_prompt={"image": 4})

    # Create the request payload.
    video_frames = frames
    message = {
        "role": "user",
        "content": [
            {"type": "text", "text": "Describe this set of frames. Consider the frames to be a part of the same video."},
        ],
    }
    for i in range(len(video_frames)):
        base64_image = encode_image(video_frames[i]) # base64 encoding.
        new_image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{base64_image}"}}
        message["content"].append(new_image)  # type: ignore[attr-defined]

    # Perform inference and log output.
    outputs = llm.chat([message])

    for o in outputs:
        generated_text = o.outputs[0].text
        print(generated_text)
    return llm


def test_video_as_images(capsys):
    frames = [picture(60, 40, seed) for seed in range(4)]
    llm = video_as_images(frames)
    decoded = [PIL.Image.open(io.BytesIO(base64.b64decode(encode_image(frame)))) for frame in frames]
    question = "Describe this set of frames. Consider the frames to be a part of the same video."
    marks = "<|vision_start|><|image_pad|><|vision_end|>" * 4
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{question}{marks}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert capsys.readouterr().out == answer(llm, {"prompt": prompt, "multi_modal_data": {"image": decoded}})
    with pytest.raises(Exception, match="5 were given but limit_mm_per_prompt allows 4 images"):
        video_as_images([*frames, frames[0]])


EXAMPLES: tuple[Callable[..., Any], ...] = (
    single_image, image_embeds_as_input, embeds_with_image_grid_thw, embeds_with_image_size_list, batch_inference, multi_image,
    video_as_images,
)  # fmt: skip


def code_of_the_page() -> list[str]:
    """The lines of the page's offline code, without blanks, comments and indentation (which the stored page has lost)."""
    lines, is_code = [], False
    offline = PAGE.read_text(encoding="utf-8").partition("Offline Inference\n")[2].partition("Online Inference\n")[0]
    for line in offline.splitlines():
        if line.startswith(".. code-block:: python"):
            is_code = True
        elif line[:1].isupper() or line.startswith((".. ", "* ")):
            is_code = False
        elif is_code:
            lines.append(line)
    return plain(lines)


def plain(lines: list[str]) -> list[str]:
    bare = [line.partition("  #")[0].partition(" # ")[0].strip().rstrip(",") for line in lines]
    return [line for line in bare if line and not line.startswith("#")]


@pytest.mark.skipif(not PAGE.exists(), reason="the reference text is not beside the checkout")
def test_the_code_is_the_pages():
    """Line by line; only lines that the page leaves open differ."""
    mine = {line for example in EXAMPLES for line in plain(inspect.getsource(example).splitlines())}
    page = code_of_the_page()
    assert len(page) > 60
    assert [line for line in page if line not in mine and "..." not in line] == []
    # and what is not on the page: signatures, results, and what stands for "..."
    others = [line for line in mine - set(page) if not line.startswith(("def ", "return llm"))]
    assert sorted(line.partition("= ")[0].strip() for line in others if "grid" not in line) == [
        "image", "image1", "image2", "image_1", "image_2", "image_embeds", "video_frames",
    ]  # fmt: skip
