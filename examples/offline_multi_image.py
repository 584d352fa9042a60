"""Ask any of the vision-language models about several images at once.

    python examples/offline_multi_image.py --model-type phi3_v --image cat.jpg --image dog.jpg
    python examples/offline_multi_image.py --model-type qwen2_vl --method chat

With --method generate the prompt is written out, a placeholder for each image; with chat the images are parts of a message, and the
checkpoint's template writes the prompt. Without --image the images are the two halves of a picture that vlmfx ships."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import vlmfx
from vlmfx import LLM, SamplingParams

DEMO = Path(vlmfx.__file__).parent / "assets" / "demo.png"
CHATML = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{images}{question}<|im_end|>\n<|im_start|>assistant\n"
)
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Family:
    """A model to take by default, its prompt, and what stands in the prompt for an image ({number} counts from 1)."""

    model: str
    prompt: str
    image: str


FAMILIES = {
    "llava": Family("llava-hf/llava-1.5-7b-hf", "USER: {images}{question}\nASSISTANT:", "<image>\n"),
    "qwen2_vl": Family("Qwen/Qwen2-VL-2B-Instruct", CHATML, QWEN_IMAGE),
    "qwen2_5_vl": Family("Qwen/Qwen2.5-VL-3B-Instruct", CHATML, QWEN_IMAGE),
    "qwen3_vl": Family(
        "Qwen/Qwen3-VL-2B-Instruct",
        "<|im_start|>user\n{images}{question}<|im_end|>\n<|im_start|>assistant\n",
        QWEN_IMAGE,
    ),
    "phi3_v": Family(
        "microsoft/Phi-3.5-vision-instruct",
        "<|user|>\n{images}{question}<|end|>\n<|assistant|>\n",
        "<|image_{number}|>\n",
    ),
    "minicpm_v": Family("openbmb/MiniCPM-V-2_6", CHATML, "(<image>./</image>)\n"),
}


def halves(picture: Image.Image) -> list[Image.Image]:
    """The left and the right half of a picture."""
    middle = picture.width // 2
    return [picture.crop((left, 0, right, picture.height)) for left, right in ((0, middle), (middle, picture.width))]


def run_generate(llm: LLM, family: Family, question: str, images: list[Image.Image], params: SamplingParams) -> str:
    """The answer to a prompt that is written out."""
    marks = "".join(family.image.format(number=number) for number in range(1, len(images) + 1))
    prompt = family.prompt.format(images=marks, question=question)
    outputs = llm.generate({"prompt": prompt, "multi_modal_data": {"image": images}}, params)
    return outputs[0].outputs[0].text


def run_chat(llm: LLM, question: str, images: list[Image.Image], params: SamplingParams) -> str:
    """The answer to a message; "image_url" parts with data:, http or file URLs do as well."""
    parts = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    outputs = llm.chat(messages, params)
    return outputs[0].outputs[0].text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ask a vision-language model about several images.")
    parser.add_argument("--model-type", choices=FAMILIES, default="phi3_v")
    parser.add_argument("--model", metavar="FOLDER", help="a folder or hub id; by default one of the type's")
    parser.add_argument("--method", choices=["generate", "chat"], default="generate")
    parser.add_argument("--image", metavar="FILE", action="append", help="repeat for several")
    parser.add_argument("--question", default="What is the content of each image?")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--max-model-len", type=int, help="of prompt and answer together; by default all the model has")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args(argv)

    images: list[Image.Image] = [Image.open(path) for path in args.image or ()] or halves(Image.open(DEMO))
    family = FAMILIES[args.model_type]
    llm = LLM(
        model=args.model or family.model,
        dtype=args.dtype,
        trust_remote_code=True,  # accepted, as some of these ask for it elsewhere; no remote code is ever run
        max_model_len=args.max_model_len,
        limit_mm_per_prompt={"image": len(images)},  # the most a prompt may hold; without it, what fits the context
    )
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens)
    if args.method == "generate":
        print(run_generate(llm, family, args.question, images, params))
    else:
        print(run_chat(llm, args.question, images, params))


if __name__ == "__main__":
    main()
