"""Embed texts and images with VLM2Vec or DSE-Qwen2-VL, and rank images by a question.

    python examples/offline_embedding.py --model-type dse --image page1.png --image page2.png --query "total revenue"
    python examples/offline_embedding.py --model-type vlm2vec --dtype bfloat16

Both models want their prompts in a form of their own, which is what the two functions below write. The templates they name come
with vlmfx. Without --image the images are the two halves of a picture that vlmfx ships."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import vlmfx
from vlmfx import LLM

DEMO = Path(vlmfx.__file__).parent / "assets" / "demo.png"
MODELS = {"vlm2vec": "TIGER-Lab/VLM2Vec-Full", "dse": "MrLight/dse-qwen2-2b-mrl-v1"}
TEMPLATES = {"vlm2vec": "template_vlm2vec.jinja", "dse": "template_dse_qwen2_vl.jinja"}


def message(*parts: Any) -> dict[str, Any]:
    """A prompt of one user message; strings are its texts, all else its images."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"messages": [{"role": "user", "content": content}]}


def query_prompt(model_type: str, query: str) -> dict[str, Any]:
    """What to write for a text that looks for images."""
    if model_type == "vlm2vec":
        return message(f"Find me an everyday image that matches the given caption: {query}")
    # DSE was trained with an image in every prompt: a text brings a small black one, of 56 x 56 pixels, which become 4 tokens.
    return message(Image.new("RGB", (56, 56)), f"Query: {query}")


def image_prompt(model_type: str, image: Image.Image) -> dict[str, Any]:
    """What to write for an image that is looked for."""
    instruction = "Represent the given image." if model_type == "vlm2vec" else "What is shown in this image?"
    return message(image, instruction)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Rank images by a question, by embeddings.")
    parser.add_argument("--model-type", choices=MODELS, default="dse")
    parser.add_argument("--model", metavar="FOLDER", help="a folder or hub id; by default one of the type's")
    parser.add_argument("--image", metavar="FILE", action="append", help="repeat for several")
    parser.add_argument("--query", default="a star")
    parser.add_argument("--dimensions", type=int, help="keep so many numbers of each vector (DSE was trained for it)")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args(argv)

    images: dict[str, Image.Image] = {path: Image.open(path) for path in args.image or ()}
    if not images:
        demo = Image.open(DEMO)
        middle = demo.width // 2
        images = {
            "left half": demo.crop((0, 0, middle, demo.height)),
            "right half": demo.crop((middle, 0, demo.width, demo.height)),
        }
    llm = LLM(
        model=args.model or MODELS[args.model_type],
        task="embed",
        chat_template=TEMPLATES[args.model_type],
        dtype=args.dtype,
        trust_remote_code=True,  # accepted, as VLM2Vec asks for it elsewhere; no remote code is ever run
    )
    prompts = [query_prompt(args.model_type, args.query)]
    prompts += [image_prompt(args.model_type, image) for image in images.values()]
    vectors = vlmfx.embed(llm, prompts, args.dimensions)  # (1 + images, dimensions), each of length 1
    similarity = vectors[1:] @ vectors[0]
    for value, name in sorted(zip(similarity.tolist(), images, strict=True), reverse=True):
        print(f"{value:.4f}  {name}")


if __name__ == "__main__":
    main()
