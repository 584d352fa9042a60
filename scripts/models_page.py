"""Writes docs/models.md from the code and the committed goldens: families, inputs, settings, and what each was verified against.

Run `python scripts/models_page.py` after a change; a test compares the committed page with what this writes."""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from pathlib import Path

from vlmfx.checkpoint import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
HEAD = """# Models

Written by `scripts/models_page.py` from the code; change that, not this.

Every family answers (`generate`, `chat`) and embeds (`embed`, `score`), in text, images, several images and ready embeddings; the last
column of inputs names what goes beyond. `vlmfx verify MODEL --against transformers` repeats the comparison on a checkpoint of yours,
where transformers has the architecture.

| family | architecture in config.json | beyond text and images | `mm_processor_kwargs` | placeholder of an image |
|---|---|---|---|---|
"""
VERIFIED = """
## How each was verified

Tiny checkpoints in the published layout with random weights, stage by stage (ids, pixels, vision, projected, merged, positions,
logits, greedy ids), in float32 and, for the logits, in bfloat16. The references, and the cases in this repository; a larger set is
checked where it lies beside the checkout. No published checkpoint could be run where this was written.

| family | reference | cases |
|---|---|---|
"""


def page() -> str:
    """The page's text."""
    rows = "".join(_row(architecture, family) for architecture, family in FAMILIES.items())
    return HEAD + rows + VERIFIED + "".join(_verified())


def _row(architecture: str, family: str) -> str:
    processing = importlib.import_module(f"vlmfx.processing.{family}")
    source = (importlib.import_module(f"vlmfx.models.{family}").__doc__ or "").split(":")[0]
    beyond = "video" if "video" in processing.PLACEHOLDERS else ""
    settings = ", ".join(f"`{name}`" for name in processing.REQUEST_SETTINGS)
    mark = processing.PLACEHOLDERS["image"].replace("{number}", "1").replace("|", "\\|")
    return f"| {source} (`{family}`) | `{architecture}` | {beyond} | {settings} | `{mark}` |\n"


def _verified() -> list[str]:
    cases: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests" / "goldens").glob("*/golden.json")):
        meta = json.loads(path.read_text(encoding="utf-8"))
        config = json.loads((path.parent / meta["model"] / "config.json").read_text(encoding="utf-8"))
        family = FAMILIES[next(name for name in config["architectures"] if name in FAMILIES)]
        cases[family, meta["reference"]].append(meta["case"])
    order = list(FAMILIES.values())
    return [
        f"| `{family}` | {reference} | {', '.join(names)} |\n"
        for (family, reference), names in sorted(cases.items(), key=lambda item: order.index(item[0][0]))
    ]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
