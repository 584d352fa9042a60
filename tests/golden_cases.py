"""Golden cases: what a user gives, and what an independent implementation makes of it, stage by stage.

The layout and the meaning of each tensor are described in tests/goldens/README.md. The committed cases are always
there; the whole development set lies beside the checkout, where it is."""

from __future__ import annotations

import json
import re
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

WRITTEN_IMAGE = re.compile(r"\(<image>\./</image>\)|<\|image_[0-9]+\|>")

TINY = {
    "llava": COMMITTED / "models" / "llava-b",
    "qwen2_vl": COMMITTED / "models" / "qwen2vl-tiny",
    "qwen2_5_vl": COMMITTED / "models" / "qwen25vl-tiny",
    "qwen3_vl": COMMITTED / "models" / "qwen3vl-tiny",
    "minicpm_v": COMMITTED / "models" / "minicpmv-tiny",
}
# With Phi-3.5, which transformers has not and whose images are long: for tests that need neither transformers nor a short context.
EVERY = {**TINY, "phi3_v": COMMITTED / "models" / "phi3v-tiny"}


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
        """Whether vlmfx has what the case needs: its family, generation (not pooling)."""
        return family_of(self.model_folder) is not None and "greedy" in self.meta

    @property
    def is_embedding(self) -> bool:
        """Whether it ends in one vector, not in tokens, and vlmfx has its family."""
        return family_of(self.model_folder) is not None and "embedding" in self.tensors

    @property
    def chat_template(self) -> str | None:
        """The shipped template that an embedding case is written in; of the others the checkpoint's own."""
        return f"template_{self.meta['family'].removesuffix('_phi3_v')}.jinja" if self.is_embedding else None

    def prompts(self) -> list[Prompt]:
        """The prompts of the case, in order."""
        if self.is_embedding:
            return [Prompt(self, "", 0)]
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
        return self._pictures("image")

    @cached_property
    def frames(self) -> list[Path]:
        """Those of the prompt's one video."""
        return self._pictures("frame")

    def _pictures(self, kind: str) -> list[Path]:
        paths = (self.case.folder / "input").glob(f"{self._stem}{kind}_*.png")
        return sorted(paths, key=lambda path: int(path.stem.rpartition("_")[2]))

    @cached_property
    def embeds(self) -> Any:
        """Ready embeddings as a user hands them over, or None."""
        if not self._file("image_embeds.safetensors").exists():
            return None
        tensors = load_file(self._file("image_embeds.safetensors"))
        if self._file("image_size_list.json").exists():
            sizes = json.loads(self._file("image_size_list.json").read_text(encoding="utf-8"))["image_size_list"]
            return {**tensors, "image_size_list": sizes}
        return tensors if "image_grid_thw" in tensors else tensors["image_embeds"]

    def request(self) -> dict[str, Any]:
        """The prompt as `generate` takes it."""
        images = self.embeds if self.embeds is not None else [Image.open(path) for path in self.images]
        media = {"image": images, "video": [Image.open(path) for path in self.frames]}
        media = {name: value for name, value in media.items() if len(value)}
        return {"prompt": self.text, "multi_modal_data": media, "mm_processor_kwargs": self._settings}

    @property
    def _settings(self) -> dict[str, int]:
        """What a request must set for the processor to do as the case's did."""
        return {"num_crops": self.case.meta["num_crops"]} if "num_crops" in self.case.meta else {}

    def chat_requests(self) -> list[dict[str, Any]]:
        """The prompt as messages in each form that the case has, mostly one; the images as paths, in parts."""
        files = [self._file(name) for name in ("messages.json", "messages_parts.json")]
        return [self._chat_request(json.loads(path.read_text(encoding="utf-8"))) for path in files if path.exists()]

    def _chat_request(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        for message in messages:
            if isinstance(message["content"], list):
                message["content"] = [self._part(part) for part in message["content"]]
            else:  # a line that is a placeholder becomes the image's part
                pictures = iter([self._picture_part(i) for i in range(max(1, len(self.images)))])
                message["content"] = [
                    next(pictures) if WRITTEN_IMAGE.fullmatch(line) else {"type": "text", "text": line}
                    for line in message["content"].split("\n")
                ]
        return {"messages": messages, "mm_processor_kwargs": self._settings}

    def _picture_part(self, number: int) -> dict[str, Any]:
        if self.embeds is not None:
            return {"type": "image_embeds", "image_embeds": self.embeds}
        return {"type": "image", "path": str(self.images[number])} if self.images else {}

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        if "embeds" in part:
            return {"type": "image_embeds", "image_embeds": self.embeds}
        if part["type"] == "image":
            key = "image" if "image" in part else "path"
            return {"type": "image", key: str(self.case.folder / "input" / part[key])}
        if part["type"] == "video":
            return {"type": "video", "video": [str(self.case.folder / "input" / name) for name in part["video"]]}
        return part

    def __getitem__(self, name: str) -> Tensor:
        value = self.case.tensors[self.prefix + name]
        if name == "input_ids" and bool((value < 0).any()):  # Phi-3.5's reference writes image i as −i
            value = torch.where(value < 0, load_model(self.case.model_folder).processor.config.image_token_id, value)
        return value

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.case.tensors

    @property
    def greedy_ids(self) -> list[int]:
        return list(self.case.meta["greedy"][self.prefix or "main"]["ids"])

    @property
    def greedy_text(self) -> str:
        text = self.case.meta["text"]
        return str(text if isinstance(text, str) else text[self.prefix or "main"])

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
    """The cases below root that vlmfx can run today and that generate, by name."""
    return [case for path in sorted(root.glob("*/golden.json")) if (case := Case(path.parent)).is_served]


def find_embeddings(root: Path) -> list[Case]:
    """The cases below root that embed."""
    return [case for path in sorted(root.glob("*/golden.json")) if (case := Case(path.parent)).is_embedding]
