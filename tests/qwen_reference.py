"""transformers' Qwen models as an oracle: pixels, ids, vision outputs, positions and logits of a prompt with images and videos.

Videos are resized by PIL and cut into patches here, as transformers' video processors need torchvision."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests import invariants
from tests.processing import references
from vlmfx import LLM, SamplingParams
from vlmfx.checkpoint import Model
from vlmfx.engine import runner
from vlmfx.processing.prompt import prepare

START, END = "<|vision_start|>", "<|vision_end|>"


@dataclass(frozen=True)
class Clip:
    """A video as frames that follow each other at fps."""

    frames: Sequence[Image.Image]
    fps: float


class Reference:
    """The model of a folder in float32, eager attention."""

    def __init__(self, folder: Path, family: str) -> None:
        import transformers

        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        cls = getattr(transformers, name)
        self.model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.images = references.image_processor(family, folder)
        self.family = family

    def video(self, clip: Clip, budget: tuple[int, int]) -> tuple[Tensor, list[int]]:
        """(patches, grid of patches) of a video whose frames, or all of them together in Qwen3-VL, have so many pixels."""
        patch, merge, length = self.images.patch_size, self.images.merge_size, self.images.temporal_patch_size
        factor, (width, height) = patch * merge, clip.frames[0].size
        if self.family == "qwen3_vl":
            module = importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")
            size = module.smart_resize(len(clip.frames), height, width, length, factor, *budget)
        else:
            size = references.smart_resize()(height, width, factor, *budget)
        frames = [np.array(frame.resize(size[::-1], Image.Resampling.BICUBIC)) for frame in clip.frames]
        frames += [frames[-1]] * (-len(frames) % length)
        x = np.stack(frames).transpose(0, 3, 1, 2).astype(np.float32) / 255
        x = (x - np.array(self.images.image_mean, np.float32)[:, None, None]) / np.array(
            self.images.image_std, np.float32
        )[:, None, None]
        t, h, w = len(frames) // length, size[0] // patch, size[1] // patch
        x = x.reshape(t, length, 3, h // merge, merge, patch, w // merge, merge, patch)
        rows = x.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)
        return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32)), [t, h, w]

    def inputs(
        self, text: str, images: Sequence[Image.Image] = (), clips: Sequence[Clip] = (), *, budget: tuple[int, int]
    ) -> dict[str, Tensor]:
        """What transformers' forward takes of a prompt with one <|image_pad|> an image and one <|video_pad|> a video."""
        inputs: dict[str, Tensor] = {}
        if images:
            made = self.images(list(images), return_tensors="pt")
            inputs |= {key: torch.as_tensor(value) for key, value in made.items()}
            text = self._expanded(text, "<|image_pad|>", [self._rows(grid) for grid in made["image_grid_thw"].tolist()])
        if clips:
            videos = [self.video(clip, budget) for clip in clips]
            inputs["pixel_values_videos"] = torch.cat([patches for patches, _ in videos])
            inputs["video_grid_thw"] = torch.tensor([grid for _, grid in videos])
            grids = inputs["video_grid_thw"].tolist()
            if self.family == "qwen3_vl":
                blocks = [self._blocks(clip, grid) for clip, grid in zip(clips, grids, strict=True)]
                text = self._expanded(
                    text.replace(f"{START}<|video_pad|>{END}", "<|video_pad|>"), "<|video_pad|>", blocks
                )
            else:
                text = self._expanded(text, "<|video_pad|>", [self._rows(grid) for grid in grids])
                length = self.images.temporal_patch_size
                inputs["second_per_grid_ts"] = torch.tensor([length / clip.fps for clip in clips])
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        config = self.model.config
        kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        return {"input_ids": ids, "mm_token_type_ids": kinds, **inputs}

    def _rows(self, grid: Sequence[int]) -> int:
        return int(np.prod(grid)) // self.images.merge_size**2

    def _blocks(self, clip: Clip, grid: Sequence[int]) -> str:
        """The text and placeholders of a video of Qwen3-VL, by its own processor's times."""
        processing = importlib.import_module("transformers.models.qwen3_vl.processing_qwen3_vl")
        indices = list(range(len(clip.frames)))
        times = processing.Qwen3VLProcessor._calculate_timestamps(
            None, indices, clip.fps, self.images.temporal_patch_size
        )
        assert len(times) == grid[0]
        pads = "<|video_pad|>" * self._rows([1, *grid[1:]])
        return "".join(f"<{time:.1f} seconds>{START}{pads}{END}" for time in times)

    @staticmethod
    def _expanded(text: str, pad: str, items: Sequence[int | str]) -> str:
        before, *rest = text.split(pad)
        for item, after in zip(items, rest, strict=True):
            before += (item if isinstance(item, str) else pad * item) + after
        return before

    @torch.no_grad()
    def stages(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """vision: (last hidden state, merged rows, deepstack rows) a call of the tower; positions, merged and logits of the prompt."""
        stages: dict[str, Any] = {"vision": []}

        def keep_vision(module: Any, args: Any, output: Any) -> None:
            deepstack = getattr(output, "deepstack_features", None) or ()
            rows = torch.cat([output.pooler_output, *deepstack], -1)
            stages["vision"].append((output.last_hidden_state, rows))

        def keep_inputs(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            stages["merged"] = kwargs["inputs_embeds"][0]
            stages["positions"] = kwargs.get("position_ids")

        handles = [
            self.model.model.visual.register_forward_hook(keep_vision),
            self.model.model.language_model.register_forward_pre_hook(keep_inputs, with_kwargs=True),
        ]
        self.model.model.rope_deltas = None  # left over from the call before
        stages["logits"] = self.model(**inputs, use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        counted = torch.arange(inputs["input_ids"].shape[1]).expand(3, -1)  # what the model counts itself for text
        found = stages["positions"]
        stages["positions"] = counted if found is None else found[-3:, 0]
        return stages

    @torch.no_grad()
    def greedy(self, inputs: dict[str, Tensor], num_tokens: int) -> list[int]:
        """Ids through transformers' own cache."""
        self.model.model.rope_deltas = None
        mask = torch.ones_like(inputs["input_ids"])
        out = self.model.generate(**inputs, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False,
                                  eos_token_id=None, temperature=None, top_p=None, top_k=None)  # fmt: skip
        ids: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
        return ids


@lru_cache
def reference_of(folder: Path, family: str) -> Reference:
    """The reference of a folder, loaded once."""
    return Reference(folder, family)


def assert_equal_stages(
    model: Model, reference: Reference, text: str, images: Sequence[Image.Image] = (), clips: Sequence[Clip] = (),
    *, budget: tuple[int, int] = (0, 0), num_tokens: int = 6,
) -> None:  # fmt: skip
    """Every stage of a prompt with one fps for its videos, and num_tokens greedy ids, are those of the reference."""
    request: dict[str, Any] = {"prompt": text, "multi_modal_data": {"image": list(images)}}
    if clips:
        request["multi_modal_data"]["video"] = [list(clip.frames) for clip in clips]
        request["media_io_kwargs"] = {"video": {"fps": clips[0].fps}}
    mine, inputs = prepare(model.processor, request), reference.inputs(text, images, clips, budget=budget)
    theirs, f = reference.stages(inputs), model.functions
    assert mine.token_ids == inputs["input_ids"][0].tolist()
    assert torch.equal(mine.positions, theirs["positions"])
    if mine.vision is not None:
        with torch.no_grad():
            patches = mine.vision.patches(model.config.vision.patch_size, torch.float32)
            hidden = f.vision_hidden(model.params, model.config, mine.vision)
            rows = f.encode(model.params, model.config, mine.vision)
        if mine.vision.row_index is not None:
            patches = patches.unflatten(0, (-1, 4))[mine.vision.row_index].flatten(0, 1)
        pixels = [inputs[key] for key in ("pixel_values", "pixel_values_videos") if key in inputs]
        last = hidden[:, : model.config.vision.hidden_size]
        for name, got, expected, atol in (
            ("pixels", patches, torch.cat(pixels), 1e-6),
            # Values up to 16, and processors differ: 1.2e-4 was seen.
            ("vision", last, torch.cat([state for state, _ in theirs["vision"]]), 3e-4),
            ("projected", rows, torch.cat([made for _, made in theirs["vision"]]), 1e-4),
        ):
            assert got.shape == expected.shape, name
            torch.testing.assert_close(got, expected, atol=atol, rtol=1e-5, msg=f"{name} differs")
    with torch.no_grad():
        step = runner.pack([mine], runner.encode(model, [mine]))
        x = f.merge(model.params, model.config, step.ids, step.features, step.feature_index)
        logits = invariants.prompt_logits(model, mine)
        made = torch.cat([rows for _, rows in theirs["vision"]]) if theirs["vision"] else None
        from_theirs = invariants.prompt_logits(model, replace(mine, media=(), embeds=made))
    torch.testing.assert_close(x, theirs["merged"], atol=1e-4, rtol=0)
    torch.testing.assert_close(from_theirs, theirs["logits"], atol=1e-4, rtol=1e-5)
    # From the pixels on, of noise: a tower of random weights makes 3e-5 of the last bit, and the decoder ten times as much.
    torch.testing.assert_close(logits, theirs["logits"], atol=1e-3, rtol=1e-5)
    if num_tokens:
        params = SamplingParams.greedy(max_tokens=num_tokens, ignore_eos=True)
        (output,) = LLM(model).generate(request, params, use_tqdm=False)
        assert invariants.token_ids([output]) == [reference.greedy(inputs, num_tokens)]


def saved_variant(source: Path, target: Path, changes: dict[str, Any]) -> Path:
    """A folder with changed config keys (dotted paths) and random weights, as transformers itself saves it."""
    import transformers

    hf = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for key, value in changes.items():
        inner, (*path, last) = hf, key.split(".")
        for part in path:
            inner = inner[part]
        inner[last] = value
    target.mkdir()
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(file, target / file.name)
    (target / "config.json").write_text(json.dumps(hf), encoding="utf-8")
    torch.manual_seed(0)
    model = getattr(transformers, hf["architectures"][0])(transformers.AutoConfig.from_pretrained(target))
    for tensor in model.parameters():
        tensor.data.normal_(0, 0.2).add_(1.0 if tensor.dim() == 1 else 0.0)
    model.float().save_pretrained(target)
    return target
