"""Read a receipt into JSON that has the form of a schema, from a server.

    vlmfx serve scenes
    python examples/structured_output.py
    python examples/structured_output.py --whole --image receipt.jpg          # with a larger model

The receipt is drawn by this script, unless --image names one. `scenes` is a small model that reads a word at a time, so the receipt is
cut where nothing is printed, and each piece is asked about: a price has the schema of a number, which leaves the model nothing else to
write. With --whole one request asks for the whole receipt, by the whole schema: for models that know what a receipt is."""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

from openai import OpenAI
from PIL import Image, ImageDraw, ImageFont, ImageOps

ITEMS = {"Bread": 3.25, "Milk": 1.49, "Apples": 4.6}
PRICE = {"type": "number", "minimum": 0}
ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 40}, "price": PRICE},
    "required": ["name", "price"],
    "additionalProperties": False,
}
RECEIPT = {
    "type": "object",
    "properties": {"items": {"type": "array", "items": ITEM, "maxItems": 50}, "total": PRICE},
    "required": ["items", "total"],
    "additionalProperties": False,
}


def draw_receipt() -> Image.Image:
    """A name and a price a line, and the total at the end."""
    rows = [*ITEMS.items(), ("Total", sum(ITEMS.values()))]
    picture = Image.new("RGB", (420, 30 + 60 * len(rows)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(34)
    for place, (name, price) in enumerate(rows):
        pen.text((25, 25 + 60 * place), name, fill="black", font=font)
        pen.text((395, 25 + 60 * place), f"{price:.2f}", fill="black", font=font, anchor="ra")
    return picture


def pieces(picture: Image.Image, axis: int, gap: int) -> Iterator[Image.Image]:
    """What lies between blank bands of at least so many pixels, from the top (axis 1) or from the left (axis 0), with a margin."""
    ink = ImageOps.invert(picture.convert("L")).point(lambda value: 255 * (value > 96))
    length, other = picture.size[axis], picture.size[1 - axis]
    band = (lambda i: (0, i, other, i + 1)) if axis else (lambda i: (i, 0, i + 1, other))
    marked = [i for i in range(length) if ink.crop(band(i)).getbbox()]
    starts = [i for place, i in enumerate(marked) if place == 0 or i - marked[place - 1] > gap]
    for start, following in zip(starts, [*starts[1:], length], strict=True):
        end = max(i for i in marked if i < following) + 1
        box = (0, start, other, end) if axis else (start, 0, end, other)
        yield ImageOps.expand(picture.crop(box), 28, "white")


def ask(client: OpenAI, model: str, picture: Image.Image, question: str, schema: dict[str, Any] | None) -> str:
    """The answer about a picture; where there is a schema, JSON that has its form."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    more: dict[str, Any] = {}
    if schema is not None:
        more["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    messages = [{"role": "user", "content": content}]
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=1000, **more)
    return answer.choices[0].message.content or ""


def read_in_pieces(client: OpenAI, model: str, picture: Image.Image) -> dict[str, Any]:
    """The receipt, a word or a number at a time."""
    rows = []
    for line in pieces(picture, axis=1, gap=10):
        name, price = pieces(line, axis=0, gap=40)
        read = ask(client, model, name, "What word is written here?", None)
        rows.append(
            {"name": read, "price": json.loads(ask(client, model, price, "What number is written here?", PRICE))}
        )
    *items, total = rows
    return {"items": items, "total": total["price"]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Read a receipt into JSON by a schema.")
    parser.add_argument("--image", metavar="FILE", help="by default a receipt that is drawn")
    parser.add_argument("--whole", action="store_true", help="ask for all of it at once")
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--api-key", default="EMPTY", help="one of the server's --api-key, if it has any")
    args = parser.parse_args(argv)

    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    model = client.models.list().data[0].id
    picture = Image.open(args.image).convert("RGB") if args.image else draw_receipt()
    if args.whole:
        receipt = json.loads(ask(client, model, picture, "Read this receipt: its items and the total.", RECEIPT))
    else:
        receipt = read_in_pieces(client, model, picture)
    print(json.dumps(receipt, indent=2))
    total = round(sum(item["price"] for item in receipt["items"]), 2)
    print(f"the items cost {total:.2f} together, and the receipt says {receipt['total']:.2f}")


if __name__ == "__main__":
    main()
