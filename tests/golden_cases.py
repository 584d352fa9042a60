"""Golden cases: what a user gives, and what an independent implementation makes of it, stage by stage.

The layout and the meaning of each tensor are described in tests/goldens/README.md. The committed cases are always
there; the whole development set lies beside the checkout, where it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from vlmfx import checkpoint
from vlmfx.checkpoint import FAMILIES, Model

COMMITTED = Path(__file__).parent / "goldens"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "goldens"

TINY = {"llava": COMMITTED / "models" / "llava-b", "qwen2_vl": COMMITTED / "models" / "qwen2vl-tiny"}


@lru_cache(maxsize=16)
def load_model(folder: Path, dtype: str = "float32") -> Model:
    """A model folder, loaded once; tests change it by dataclasses.replace only."""
    return checkpoint.load(folder, dtype=dtype, device="cpu")


def family_of(folder: Path) -> str | None:
    """The family of a model folder, None when vlmfx does not have it (yet)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return next((FAMILIES[name] for name in config["architectures"] if name in FAMILIES), None)


@dataclass(frozen=True)
class Case:
    """One folder of goldens."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def meta(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "golden.json").read_text(encoding="utf-8")))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "golden.safetensors")

    @property
    def model_folder(self) -> Path:
        return (self.folder / self.meta["model"]).resolve()

    @property
    def is_served(self) -> bool:
        """Whether vlmfx has what the case needs: its family, generation (not pooling), images (not video)."""
        has_video = any("video" in name for name in self.tensors)
        return family_of(self.model_folder) is not None and "greedy" in self.meta and not has_video

    def prompts(self) -> list[Prompt]:
        """The prompts of the case, in order."""
        return [
            Prompt(self, "" if key == "main" else key, number) for number, key in enumerate(sorted(self.meta["greedy"]))
        ]


@dataclass(frozen=True)
class Prompt:
    """One prompt of a case; prefix "p1." marks its tensors, where there are several."""

    case: Case
    prefix: str
    number: int

    @property
    def _stem(self) -> str:
        return self.prefix.replace(".", "_")

    def _file(self, name: str) -> Path:
        return self.case.folder / "input" / (self._stem + name)

    @cached_property
    def text(self) -> str:
        """The rendered prompt, before placeholders are expanded."""
        return self._file("prompt.txt").read_text(encoding="utf-8")

    @cached_property
    def images(self) -> list[Path]:
        paths = (self.case.folder / "input").glob(f"{self._stem}image_*.png")
        return sorted(paths, key=lambda path: int(path.stem.rpartition("_")[2]))

    @cached_property
    def embeds(self) -> Any:
        """Ready embeddings as a user hands them over, or None."""
        if not self._file("image_embeds.safetensors").exists():
            return None
        tensors = load_file(self._file("image_embeds.safetensors"))
        return tensors if "image_grid_thw" in tensors else tensors["image_embeds"]

    def request(self) -> dict[str, Any]:
        """The prompt as `generate` takes it."""
        media = self.embeds if self.embeds is not None else [Image.open(path) for path in self.images]
        return {"prompt": self.text, "multi_modal_data": {"image": media}}

    def chat_request(self) -> dict[str, Any] | None:
        """The prompt as messages, None where the case has none; the images as paths, in parts."""
        if not self._file("messages.json").exists():
            return None
        messages = json.loads(self._file("messages.json").read_text(encoding="utf-8"))
        for message in messages:
            if isinstance(message["content"], list):
                message["content"] = [self._part(part) for part in message["content"]]
        return {"messages": messages}

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        if "embeds" in part:
            return {"type": "image_embeds", "image_embeds": self.embeds}
        if part["type"] == "image":
            key = "image" if "image" in part else "path"
            return {"type": "image", key: str(self.case.folder / "input" / part[key])}
        return part

    def __getitem__(self, name: str) -> Tensor:
        return self.case.tensors[self.prefix + name]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.case.tensors

    @property
    def greedy_ids(self) -> list[int]:
        return list(self.case.meta["greedy"][self.prefix or "main"]["ids"])

    @property
    def greedy_text(self) -> str:
        return str(self.case.meta["text"][self.prefix or "main"])

    def difference(self, name: str, mine: Tensor, *, atol: float, rtol: float = 0.0) -> float:
        """The largest absolute difference from a golden tensor, once it is within the tolerance; 0 means exact."""
        sampled = self.case.meta["sampled"].get(self.prefix + name)
        gold = self[name]
        if sampled:
            assert list(mine.shape) == sampled["shape"], f"{name}: {list(mine.shape)}, golden {sampled['shape']}"
            mine = mine.flatten()[:: sampled["step"]]
        assert mine.shape == gold.shape, f"{name}: {list(mine.shape)}, golden {list(gold.shape)}"
        torch.testing.assert_close(
            mine.double(),
            gold.double(),
            atol=atol,
            rtol=rtol,
            msg=lambda m: f"{self.case.name} {self.prefix}{name}: {m}",
        )
        return float((mine.double() - gold.double()).abs().max()) if mine.numel() else 0.0


def find(root: Path) -> list[Case]:
    """The cases below root that vlmfx can run today, by name."""
    return [case for path in sorted(root.glob("*/golden.json")) if (case := Case(path.parent)).is_served]
