"""Find the pages that answer a question among pictures of pages, without reading a word of them: an index of their vectors.

    python examples/page_retrieval.py --index pages.npz --pages scans/*.png         # once; further pages are added to it
    python examples/page_retrieval.py --index pages.npz --query "total revenue" --query "who signed?" --top-k 3

The model is DSE-Qwen2-VL (MrLight/dse-qwen2-2b-mrl-v1), which was trained on screenshots of pages and runs in this process. Its vectors
may be cut: --dimensions 512 makes a third of the index. Of a PDF take pictures first, as by `pdftoppm -r 100 -png report.pdf page`.
Without --pages and --index three small pages are drawn and searched."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import vlmfx
from vlmfx import LLM

DRAWN = {
    "invoice": "INVOICE 2041\n\nPaper      12.00\nInk        30.50\n\nTotal      42.50",
    "recipe": "PANCAKES\n\n2 eggs\n200 g flour\n0.4 l milk\n\nWhisk, rest, fry.",
    "letter": "Dear Ada,\n\nthe engine runs.\nCome and see it.\n\nCharles",
}


def draw_page(text: str) -> Image.Image:
    page = Image.new("RGB", (448, 560), "white")
    ImageDraw.Draw(page).multiline_text((40, 50), text, fill="black", font=ImageFont.load_default(30), spacing=14)
    return page


def prompt(image: Image.Image, text: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
    }


def page_vectors(llm: LLM, pages: Sequence[Image.Image], dimensions: int | None) -> np.ndarray:
    """(pages, dimensions), each of length 1."""
    return vlmfx.embed(llm, [prompt(page, "What is shown in this image?") for page in pages], dimensions).numpy()


def query_vector(llm: LLM, query: str, dimensions: int | None) -> np.ndarray:
    """(dimensions,) of length 1. DSE was trained with a picture in every prompt: a question brings a small black one."""
    return vlmfx.embed(llm, prompt(Image.new("RGB", (56, 56)), f"Query: {query}"), dimensions).numpy().reshape(-1)


class Index:
    """Names of pages and their vectors. To compare a question with all of them is one product, a millisecond for 10,000 pages."""

    def __init__(self, names: list[str], vectors: np.ndarray) -> None:
        self.names, self.vectors = names, vectors

    @classmethod
    def load(cls, path: str) -> Index:
        with np.load(path) as file:
            return cls(file["names"].tolist(), file["vectors"])

    def save(self, path: str) -> None:
        with open(path, "wb") as file:
            np.savez(file, names=np.array(self.names), vectors=self.vectors)

    def add(self, names: list[str], vectors: np.ndarray) -> None:
        self.names += names
        self.vectors = np.concatenate([self.vectors, vectors]) if len(self.vectors) else vectors

    def search(self, vector: np.ndarray, top_k: int) -> list[tuple[float, str]]:
        """(cosine, name) of those that are nearest, the nearest first."""
        scores = self.vectors @ vector
        return [(float(scores[i]), self.names[i]) for i in np.argsort(-scores)[:top_k]]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Find pages by a question, in an index of their vectors.")
    parser.add_argument("--pages", nargs="+", default=[], metavar="FILE", help="pictures of pages to add to the index")
    parser.add_argument("--index", metavar="FILE", help="where the index is kept (.npz)")
    parser.add_argument("--query", action="append", default=[], help="repeat for several")
    parser.add_argument("--top-k", type=int, default=3)
    parser.add_argument("--dimensions", type=int, help="keep so many numbers of each vector")
    parser.add_argument("--model", default="MrLight/dse-qwen2-2b-mrl-v1", help="a folder or hub id")
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args(argv)

    llm = LLM(model=args.model, task="embed", chat_template="template_dse_qwen2_vl.jinja", dtype=args.dtype)
    index = Index.load(args.index) if args.index and Path(args.index).exists() else Index([], np.empty((0, 0), "f4"))
    new = {path: Image.open(path) for path in args.pages if path not in index.names}
    if not new and not index.names:
        new = {name: draw_page(text) for name, text in DRAWN.items()}
    if new:
        index.add([*new], page_vectors(llm, [*new.values()], args.dimensions))
        if args.index:
            index.save(args.index)
            print(f"{args.index} has {len(index.names)} pages of {index.vectors.shape[1]} numbers")
    for query in args.query or ([] if args.index else ["How much is it?", "How much flour?"]):
        print(query)
        for score, name in index.search(query_vector(llm, query, index.vectors.shape[1]), args.top_k):
            print(f"  {score:.4f}  {name}")


if __name__ == "__main__":
    main()
