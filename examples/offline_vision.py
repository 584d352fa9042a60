"""Ask any of the vision-language models about one image, or one video.

    python examples/offline_vision.py --model-type qwen2_vl
    python examples/offline_vision.py --model-type llava --image cat.jpg --num-prompts 4
    python examples/offline_vision.py --model-type qwen3_vl --modality video --video clip.mp4 --num-frames 8

Prompts are written out, placeholders and all, as each model's page on the hub writes them; `llm.chat` (see
offline_multi_image.py) fills them in by itself. Without --image the question is about a picture that vlmfx ships; without
--video, about a look that wanders over it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

import vlmfx
from vlmfx import LLM, SamplingParams

DEMO = Path(vlmfx.__file__).parent / "assets" / "demo.png"
CHATML = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{media}{question}<|im_end|>\n<|im_start|>assistant\n"
)
QWEN_IMAGE, QWEN_VIDEO = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))


@dataclass(frozen=True)
class Family:
    """A model to take by default, its prompt, and what stands in the prompt for an image and a video."""

    model: str
    prompt: str
    image: str
    video: str | None = None


FAMILIES = {
    "llava": Family("llava-hf/llava-1.5-7b-hf", "USER: {media}{question}\nASSISTANT:", "<image>\n"),
    "qwen2_vl": Family("Qwen/Qwen2-VL-2B-Instruct", CHATML, QWEN_IMAGE, QWEN_VIDEO),
    "qwen2_5_vl": Family("Qwen/Qwen2.5-VL-3B-Instruct", CHATML, QWEN_IMAGE, QWEN_VIDEO),
    "qwen3_vl": Family(
        "Qwen/Qwen3-VL-2B-Instruct",
        "<|im_start|>user\n{media}{question}<|im_end|>\n<|im_start|>assistant\n",
        QWEN_IMAGE,
        QWEN_VIDEO,
    ),
    "phi3_v": Family(
        "microsoft/Phi-3.5-vision-instruct",
        "<|user|>\n{media}{question}<|end|>\n<|assistant|>\n",
        "<|image_1|>\n",
    ),
    "minicpm_v": Family("openbmb/MiniCPM-V-2_6", CHATML, "(<image>./</image>)\n"),
}


def wandering(picture: Image.Image, num_frames: int) -> list[Image.Image]:
    """Frames of a video: a window of 3/4 of the picture's sides that moves from its upper left to its lower right corner."""
    width, height = (side * 3 // 4 for side in picture.size)
    steps = [i / max(1, num_frames - 1) for i in range(num_frames)]
    corners = [(round((picture.width - width) * t), round((picture.height - height) * t)) for t in steps]
    return [picture.crop((x, y, x + width, y + height)) for x, y in corners]


def prompt_for(args: argparse.Namespace) -> dict[str, Any]:
    """The prompt of the model, and the image or video that belongs to it."""
    family = FAMILIES[args.model_type]
    if args.modality == "image":
        media: Any = Image.open(args.image)
        question = args.question or "What is in this image?"
        mark = family.image
    else:
        media = args.video or wandering(Image.open(args.image).convert("RGB"), args.num_frames)
        question = args.question or "What is shown in this video?"
        mark = family.video or ""
    return {
        "prompt": family.prompt.format(media=mark, question=question),
        "multi_modal_data": {args.modality: media},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ask a vision-language model about an image or a video.")
    parser.add_argument("--model-type", choices=FAMILIES, default="llava")
    parser.add_argument("--model", metavar="FOLDER", help="a folder or hub id; by default one of the type's")
    parser.add_argument("--image", metavar="FILE", default=str(DEMO))
    parser.add_argument("--video", metavar="FILE")
    parser.add_argument("--modality", choices=["image", "video"], default="image")
    parser.add_argument("--num-frames", type=int, default=8, help="frames to take of a video")
    parser.add_argument("--num-prompts", type=int, default=1, help="how often to ask, in one batch")
    parser.add_argument("--question")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args(argv)
    if args.modality == "video" and FAMILIES[args.model_type].video is None:
        parser.error(f"{args.model_type} takes no video; use one of the Qwen models")

    llm = LLM(
        model=args.model or FAMILIES[args.model_type].model,
        dtype=args.dtype,
        trust_remote_code=True,  # accepted, as some of these ask for it elsewhere; no remote code is ever run
        media_io_kwargs={"video": {"num_frames": args.num_frames}},
    )
    prompts = [prompt_for(args)] * args.num_prompts
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=args.max_tokens))
    for output in outputs:
        print(output.outputs[0].text)


if __name__ == "__main__":
    main()
