"""Golden cases as a reference: a folder a case, with what a user gives and what an independent implementation made of it.

The layout is that of tests/goldens/README.md: golden.json, golden.safetensors and input/."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from vlmfx.errors import InvalidRequest
from vlmfx.parity.report import Sample

GIVEN = "image_sizes_wh"  # what the case says of its own files
WRITTEN = re.compile(r"\(<image>\./</image>\)|<\|image_[0-9]+\|>")  # a placeholder in a message that is a string


@dataclass(frozen=True)
class GoldenPrompt:
    """One prompt of a case; prefix "p1." marks its values where the case has several."""

    folder: Path
    meta: Mapping[str, Any]
    prefix: str

    @property
    def case(self) -> str:
        """What a report calls it."""
        return f"{self.folder.name} {self.prefix}".rstrip(" .")

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """Name → value, or the kept elements of one that is sampled."""
        tensors = _tensors(self.folder)
        others = "padded.", *(() if self.prefix else _prefixes(self.folder))
        return {
            name.removeprefix(self.prefix): value
            for name, value in tensors.items()
            if name.startswith(self.prefix) and not name.startswith(others) and not name.endswith(GIVEN)
        }

    def sample(self, name: str) -> Sample | None:
        """How a value was thinned out; None when it is whole."""
        told = self.meta.get("sampled", {}).get(self.prefix + name)
        return Sample(shape=tuple(told["shape"]), step=int(told["step"])) if told else None

    def _input(self, name: str) -> Path:
        return self.folder / "input" / (self.prefix.replace(".", "_") + name)

    @cached_property
    def text(self) -> str:
        """The rendered prompt, before placeholders are expanded."""
        path = self._input("prompt.txt")
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InvalidRequest("golden", f"{path} cannot be read ({error}); restore the file.") from None

    def request(self) -> dict[str, Any]:
        """The prompt as `generate` takes it."""
        media: dict[str, Any] = {}
        images, frames = self._pictures("image"), self._pictures("frame")
        if self._input("image_embeds.safetensors").exists():
            media["image"] = self._embeds()
        elif images:
            media["image"] = images
        if frames:
            media["video"] = frames
        settings = self.meta.get("processor_kwargs", {}).get(self.prefix or "main") or {}
        if "num_crops" in self.meta and images:
            settings = {"num_crops": self.meta["num_crops"]}
        return {"prompt": self.text, "multi_modal_data": media, "mm_processor_kwargs": settings}

    def chat(self) -> dict[str, Any] | None:
        """The prompt as messages, None where the case has none."""
        path = self._input("messages.json")
        if not path.exists():
            return None
        messages = json.loads(path.read_text(encoding="utf-8"))
        for message in messages:
            content = message["content"]
            if isinstance(content, str):
                pictures = self._picture_parts()
                lines = content.split("\n")
                content = [next(pictures) if WRITTEN.fullmatch(t) else {"type": "text", "text": t} for t in lines]
            message["content"] = [self._part(part) for part in content]
        return {"messages": messages}

    def _picture_parts(self) -> Iterator[dict[str, Any]]:
        """A part for each placeholder that stands on a line of its own."""
        if self._input("image_embeds.safetensors").exists():
            yield {"type": "image_embeds", "image_embeds": self._embeds()}
        for path in self._paths("image"):
            yield {"type": "image", "image": path.name}

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        folder = self.folder / "input"
        if "embeds" in part:
            return {"type": "image_embeds", "image_embeds": self._embeds()}
        if part["type"] == "image":
            return {"type": "image", "image": str(folder / (part["image"] if "image" in part else part["path"]))}
        if part["type"] == "video":
            return {"type": "video", "video": [str(folder / name) for name in part["video"]]}
        return part

    def _pictures(self, kind: str) -> list[Image.Image]:
        return [Image.open(path) for path in self._paths(kind)]

    def _paths(self, kind: str) -> list[Path]:
        paths = (self.folder / "input").glob(f"{self.prefix.replace('.', '_')}{kind}_*.png")
        return sorted(paths, key=lambda p: int(p.stem.rpartition("_")[2]))

    def _embeds(self) -> Any:
        tensors = load_file(self._input("image_embeds.safetensors"))
        sizes = self._input("image_size_list.json")
        if sizes.exists():
            told = json.loads(sizes.read_text(encoding="utf-8"))
            return {**tensors, "image_size_list": told["image_size_list"] if isinstance(told, dict) else told}
        return tensors if len(tensors) > 1 else tensors["image_embeds"]


def _prefixes(folder: Path) -> tuple[str, ...]:
    found = {match[1] for name in _tensors(folder) if (match := re.match(r"(p\d+\.)input_ids$", name))}
    return tuple(sorted(found, key=lambda p: int(p[1:-1])))


def find(root: str | Path, model_folder: Path) -> list[GoldenPrompt]:
    """The prompts of the case in root, or of the cases below it that name the model: its folder, or another of the same name.

    Raises InvalidRequest where there are none."""
    root = Path(root)
    if (root / "golden.json").is_file():
        return _prompts(root, _meta(root))
    named: dict[str, list[Path]] = {}
    folders = sorted(path.parent for path in root.glob("*/golden.json"))
    for folder in folders:
        named.setdefault((folder / _meta(folder)["model"]).resolve().name, []).append(folder)
    if not named:
        raise InvalidRequest(
            "golden", f"{root} holds no golden.json, nor do its folders; give a case or a folder of cases."
        )
    cases = named.get(model_folder.resolve().name, [])
    if not cases:
        raise InvalidRequest(
            "golden",
            f"{root} has cases of {', '.join(sorted(named))}, none of {model_folder.resolve().name}; give one case's folder.",
            found=sorted(named),
        )
    return [prompt for folder in cases for prompt in _prompts(folder, _meta(folder))]


def _prompts(folder: Path, meta: dict[str, Any]) -> list[GoldenPrompt]:
    return [GoldenPrompt(folder, meta, prefix) for prefix in _prefixes(folder) or ("",)]


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The values of a case. Raises InvalidRequest."""
    path = folder / "golden.safetensors"
    try:
        return load_file(path)
    except Exception as error:  # OSError, and safetensors' own
        raise InvalidRequest("golden", f"{path} cannot be read ({error}); restore the file.") from None


def _meta(folder: Path) -> dict[str, Any]:
    path = folder / "golden.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(meta["model"], str):
            raise TypeError("model is no path")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest("golden", f"{path} is no golden.json ({error}); restore the file.") from None
    return dict(meta)
