"""Vectors of pictures and texts from a server, by plain requests, and how alike they are.

    vlmfx serve TIGER-Lab/VLM2Vec-Full --task embedding --max-model-len 4096 --chat-template template_vlm2vec.jinja
    python examples/embedding_client.py vlm2vec --image cat.jpg --text "a cat" --text "a dog"

    vlmfx serve MrLight/dse-qwen2-2b-mrl-v1 --task embedding --max-model-len 8192 --chat-template template_dse_qwen2_vl.jinja
    python examples/embedding_client.py dse --image page.png --text "total revenue" --dimensions 256

OpenAI's embeddings take texts; beside these the server takes `messages`, with pictures. Each model was trained on prompts of a form of
its own, which is what the two functions below write. Without --image the picture is one that vlmfx ships."""

from __future__ import annotations

import argparse
import base64
import io
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
from PIL import Image

import vlmfx

DEMO = Path(vlmfx.__file__).parent / "assets" / "demo.png"


def url_of(source: str) -> str:
    """A URL as it is, which the server fetches; a file as a data: URL."""
    if "://" in source:
        return source
    kind = mimetypes.guess_type(source)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(Path(source).read_bytes()).decode()}"


def black_png() -> str:
    """56 x 56 black pixels, the least that Qwen2-VL takes, as a URL."""
    file = io.BytesIO()
    Image.new("RGB", (56, 56)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def image_parts(model_type: str, url: str) -> list[dict[str, Any]]:
    """What to send for a picture."""
    says = "Represent the given image." if model_type == "vlm2vec" else "What is shown in this image?"
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": says}]


def text_parts(model_type: str, text: str) -> list[dict[str, Any]]:
    """What to send for a text that looks for pictures. DSE was trained with a picture in every prompt: a text brings a small one."""
    if model_type == "vlm2vec":
        return [{"type": "text", "text": f"Find me an everyday image that matches the given caption: {text}"}]
    return [{"type": "image_url", "image_url": {"url": black_png()}}, {"type": "text", "text": f"Query: {text}"}]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Vectors of pictures and texts from a server, by requests.")
    parser.add_argument("model_type", choices=["vlm2vec", "dse"])
    parser.add_argument("--image", action="append", metavar="FILE|URL", help="repeat for several")
    parser.add_argument("--text", action="append", help="repeat for several")
    parser.add_argument("--dimensions", type=int, help="keep so many numbers of each vector (DSE was trained for it)")
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--api-key", default="EMPTY", help="one of the server's --api-key, if it has any")
    args = parser.parse_args(argv)

    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {args.api_key}"
    model = session.get(f"{args.base_url}/models").json()["data"][0]["id"]

    def vector(parts: list[dict[str, Any]]) -> list[float]:
        """Of unit length."""
        body = {"model": model, "messages": [{"role": "user", "content": parts}], "encoding_format": "float"}
        if args.dimensions is not None:
            body["dimensions"] = args.dimensions
        response = session.post(f"{args.base_url}/embeddings", json=body)
        response.raise_for_status()
        return response.json()["data"][0]["embedding"]

    texts = {text: vector(text_parts(args.model_type, text)) for text in args.text or ["a star", "a page of text"]}
    for image in args.image or [str(DEMO)]:
        mine = vector(image_parts(args.model_type, url_of(image)))
        for text, other in texts.items():
            print(f"{sum(a * b for a, b in zip(mine, other, strict=True)):.4f}  {image}  {text}")


if __name__ == "__main__":
    main()
