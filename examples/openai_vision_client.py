"""Ask a server about one picture, several pictures or a video, with OpenAI's client; answers may come as a stream.

    vlmfx serve scenes
    python examples/openai_vision_client.py single
    python examples/openai_vision_client.py single --image https://example.com/photo.jpg --question "What is in this image?"
    python examples/openai_vision_client.py multi --image first.png --image second.png --question "What differs?" --stream
    python examples/openai_vision_client.py video --video clip.mp4 --question "What happens?"

A URL is fetched by the server, as long as its host has a public address; a file is sent along, in base64. Without --image it is a picture
that vlmfx ships, or its halves; without --video, frames of a window that moves over it."""

from __future__ import annotations

import argparse
import base64
import io
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openai import OpenAI
from PIL import Image

import vlmfx

DEMO = Path(vlmfx.__file__).parent / "assets" / "demo.png"
QUESTIONS = {
    "single": "What colour is the star?",
    "multi": "Which picture has more objects?",
    "video": "Is there a red star?",
}


def url_of(source: str) -> str:
    """A URL as it is, a file as a data: URL."""
    if "://" in source:
        return source
    kind = mimetypes.guess_type(source)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(Path(source).read_bytes()).decode()}"


def base64_jpeg(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return base64.b64encode(file.getvalue()).decode()


def halves() -> list[str]:
    """The left and the right half of the shipped picture, as URLs."""
    picture = Image.open(DEMO).convert("RGB")
    middle, height = picture.width // 2, picture.height
    parts = [picture.crop((x, 0, x + middle, height)) for x in (0, middle)]
    return [f"data:image/jpeg;base64,{base64_jpeg(part)}" for part in parts]


def wandering(num_frames: int = 4) -> str:
    """A video as its frames, JPEGs with commas between them: a window that moves over the shipped picture."""
    picture = Image.open(DEMO).convert("RGB")
    side = picture.width * 3 // 4
    places = [round((picture.width - side) * i / (num_frames - 1)) for i in range(num_frames)]
    frames = [picture.crop((x, x, x + side, x + side)) for x in places]
    return "data:video/jpeg;base64," + ",".join(map(base64_jpeg, frames))


def parts_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The media of the question; the server puts placeholders where they stand."""
    if args.kind == "video":
        return [{"type": "video_url", "video_url": {"url": url_of(args.video) if args.video else wandering()}}]
    urls = [url_of(source) for source in args.image] or (halves() if args.kind == "multi" else [url_of(str(DEMO))])
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ask a server about pictures or a video, with OpenAI's client.")
    parser.add_argument("kind", choices=QUESTIONS)
    parser.add_argument("--image", action="append", default=[], metavar="FILE|URL", help="repeat for several")
    parser.add_argument("--video", metavar="FILE|URL")
    parser.add_argument("--question")
    parser.add_argument("--stream", action="store_true", help="print the answer as it comes")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--api-key", default="EMPTY", help="one of the server's --api-key, if it has any")
    args = parser.parse_args(argv)

    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    content = [*parts_of(args), {"type": "text", "text": args.question or QUESTIONS[args.kind]}]
    request: dict[str, Any] = {
        "model": client.models.list().data[0].id,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_completion_tokens": args.max_tokens,
    }
    if args.stream:
        for chunk in client.chat.completions.create(**request, stream=True):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
    else:
        print(client.chat.completions.create(**request).choices[0].message.content)


if __name__ == "__main__":
    main()
