"""transformers as a reference: its own tokenizer, image processor and model on the same folder, with hooks on the stages.

transformers is imported by the functions here only. Families whose code comes with the checkpoint are refused: it is never run."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmfx.errors import CheckpointError, InvalidRequest, reason_of

NO_CODE: Any = {"trust_remote_code": False}  # left out, transformers asks on stdin
QWEN_PROCESSORS = (
    ("qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil"),
    ("qwen2_vl", "Qwen2VLImageProcessor"),
)
# architecture → (module, class) of its image processor without torchvision, the first that is there; newer names first
IMAGE_PROCESSORS = {
    "LlavaForConditionalGeneration": (
        ("clip.image_processing_pil_clip", "CLIPImageProcessorPil"),
        ("clip", "CLIPImageProcessor"),
    ),
    "Qwen2VLForConditionalGeneration": QWEN_PROCESSORS,
    "Qwen2_5_VLForConditionalGeneration": QWEN_PROCESSORS,
    "Qwen3VLForConditionalGeneration": QWEN_PROCESSORS,
}


class Reference:
    """transformers' model of a folder, loaded once for several prompts."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        self._folder = folder
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.architecture = next(iter(config.get("architectures") or ["none"]))
        if self.architecture not in IMAGE_PROCESSORS:
            raise InvalidRequest(
                "against",
                f"transformers runs {self.architecture} with code from the checkpoint, which vlmfx never runs; "
                "use --golden DIR with values that such a run has stored.",
                found=self.architecture,
                expected=tuple(IMAGE_PROCESSORS),
            )
        transformers = _transformers()
        kind = getattr(transformers, self.architecture, None)
        if kind is None:
            raise InvalidRequest(
                "against",
                f"transformers {transformers.__version__} has no {self.architecture}; install a newer one or use --golden.",
            )
        self.name = f"transformers {transformers.__version__}"
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **NO_CODE)
            with _no_progress_bar(transformers):
                loaded = kind.from_pretrained(
                    folder, torch_dtype=dtype, attn_implementation="eager", use_safetensors=True, **NO_CODE
                )
        except Exception as error:  # whatever its readers raise for this folder
            message = f"{folder}: {self.name} cannot load it ({reason_of(error)}); use --golden DIR."
            raise CheckpointError(message) from error
        self._model: Any = loaded.to(device).eval()
        self._device = device

    def render(self, messages: Sequence[dict[str, Any]], template: str) -> str:
        """The chat prompt, as its tokenizer renders it."""
        text: str = self._tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return text

    @torch.no_grad()
    def values(self, text: str, images: Sequence[Image.Image], *, num_greedy: int) -> dict[str, Tensor]:
        """Name → value of every stage that it exposes; text has one placeholder an image."""
        pixels = self._pixels(images)
        values: dict[str, Tensor] = dict(pixels)
        ids = self._ids(text, pixels)
        values["input_ids"] = ids
        inputs: dict[str, Any] = {name: value.to(self._device) for name, value in pixels.items()}
        inputs |= {"input_ids": ids.to(self._device), "attention_mask": torch.ones_like(ids).to(self._device)}
        if "mm_token_type_ids" in inspect.signature(self._model.forward).parameters:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self._image_token_id()).int()
        positions: dict[str, Any] = {}
        if hasattr(self._model, "get_rope_index"):  # older ones count M-RoPE's positions in generate only
            grid = inputs.get("image_grid_thw")
            rope_index = self._model.get_rope_index(inputs["input_ids"], image_grid_thw=grid)
            positions["position_ids"] = rope_index[0]
        with _Hooks(self._model, self.architecture, values):
            logits = self._model(**inputs, **positions, use_cache=False).logits[0]
        values |= {"prompt_logits": logits, "last_logits": logits[-1]}
        if "position_ids" in values:
            values |= _positions(values.pop("position_ids"))
        if num_greedy:
            values |= self._greedy(inputs, num_greedy)
        return {name: value.detach().cpu() for name, value in values.items()}

    def _pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        if not images:
            return {}
        processor = _image_processor(self.architecture).from_pretrained(self._folder, **NO_CODE)
        pixels = processor(list(images), return_tensors="pt")
        return {name: torch.as_tensor(value) for name, value in pixels.items()}

    def _ids(self, text: str, pixels: dict[str, Tensor]) -> Tensor:
        """(1, L): the prompt with each placeholder as often as its image has rows, as the family's processor in transformers does."""
        token = self._tokenizer.convert_ids_to_tokens(self._image_token_id())
        before, *rest = text.split(token)
        counts = self._rows(pixels)
        if len(counts) != len(rest):
            raise InvalidRequest(
                "prompt",
                f"it has {len(rest)} placeholders {token} for {len(counts)} images; make them equal in number.",
            )
        grown = before + "".join(token * count + after for count, after in zip(counts, rest, strict=True))
        bos = self._tokenizer.bos_token
        has_bos = bos is not None and text.startswith(bos)
        ids: Tensor = self._tokenizer(grown, return_tensors="pt", add_special_tokens=not has_bos)["input_ids"]
        return ids

    def _rows(self, pixels: dict[str, Tensor]) -> list[int]:
        """Rows of features of each image."""
        if "image_grid_thw" in pixels:
            merge = self._model.config.vision_config.spatial_merge_size
            return [int(grid.prod()) // merge**2 for grid in pixels["image_grid_thw"]]
        if not pixels:
            return []
        images, config = pixels["pixel_values"], self._model.config
        patches = (images.shape[-1] // config.vision_config.patch_size) ** 2
        return [patches + (config.vision_feature_select_strategy == "full")] * len(images)

    def _image_token_id(self) -> int:
        config = self._model.config
        return int(getattr(config, "image_token_id", None) or config.image_token_index)

    def _greedy(self, inputs: dict[str, Any], num_tokens: int) -> dict[str, Tensor]:
        out = self._model.generate(
            **inputs, max_new_tokens=num_tokens, min_new_tokens=0, do_sample=False, num_beams=1, eos_token_id=None,
            temperature=None, top_p=None, top_k=None, repetition_penalty=None, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        best = torch.cat(out.logits).float().topk(2, -1).values
        return {
            "greedy_ids": out.sequences[0, inputs["input_ids"].shape[1] :],
            "greedy_margins": best[:, 0] - best[:, 1],
        }


class _Hooks:
    """Hooks on the modules that a stage enters or leaves; `values` has what they kept once the object is left."""

    def __init__(self, model: Any, architecture: str, values: dict[str, Tensor]) -> None:
        self._values = values
        self._parts: dict[str, dict[int, Tensor]] = {}
        self._handles: list[Any] = []
        modules = dict(model.named_modules())
        rotary = min((n for n in modules if n.rpartition(".")[2] == "rotary_emb"), key=len, default=None)
        if rotary is not None:
            self._enter(modules[rotary], "position_ids", 1)
            self._enter(modules[rotary.rpartition(".")[0]], "inputs_embeds", None)
        if architecture.startswith("Llava"):
            projector = _named(modules, "multi_modal_projector")
            self._enter(projector, "vision_selected_hidden", 0)
            self._leave(projector, "image_embeds")
            return
        self._enter(_named(modules, "visual.merger"), "image_vision_hidden", 0)
        # The merger's rows of Qwen2.5-VL are still window by window; the tower's output is not.
        is_windowed = architecture.startswith("Qwen2_5")
        self._leave(_named(modules, "visual" if is_windowed else "visual.merger"), "image_embeds")
        layers = [m for n, m in modules.items() if re.search(r"(^|\.)visual\.deepstack_merger_list\.\d+$", n)]
        for part, merger in enumerate(layers):
            self._leave(merger, "deepstack_embeds", part)

    def _enter(self, module: Any, name: str, place: int | None) -> None:
        """Keep an argument: that of the keyword `name`, else the one at `place`."""

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = kwargs.get(name)
            if given is None and place is not None:
                given = args[place] if place < len(args) else next(iter(kwargs.values()), None)
            self._keep(name, None, given)

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _leave(self, module: Any, name: str, part: int | None = None) -> None:
        """Keep the output, or of several modules that share a name a stack of them."""

        def hook(module: Any, args: Any, output: Any) -> None:
            self._keep(name, part, getattr(output, "pooler_output", output))

        self._handles.append(module.register_forward_hook(hook))

    def _keep(self, name: str, part: int | None, value: Any) -> None:
        if isinstance(value, Tensor) and part is None:
            self._values[name] = value.clone()
        elif isinstance(value, Tensor):
            self._parts.setdefault(name, {})[part or 0] = value.clone()

    def __enter__(self) -> _Hooks:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        for name, parts in self._parts.items():
            self._values[name] = torch.stack([parts[i] for i in sorted(parts)])


@contextmanager
def _no_progress_bar(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def _positions(position_ids: Tensor) -> dict[str, Tensor]:
    """position_ids (1, L), or (3, 1, L) with rope_deltas: what decoding adds to a token's index."""
    if position_ids.dim() == 2:
        return {"position_ids": position_ids}
    position_ids = position_ids[-3:]
    delta = int(position_ids.max()) + 1 - position_ids.shape[-1]
    return {"position_ids": position_ids, "rope_deltas": torch.tensor([[delta]])}


def _named(modules: dict[str, Any], name: str) -> Any:
    return modules[min((n for n in modules if n == name or n.endswith(f".{name}")), key=len)]


def _image_processor(architecture: str) -> Any:
    for module, name in IMAGE_PROCESSORS[architecture]:
        try:
            return getattr(importlib.import_module(f"transformers.models.{module}"), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise InvalidRequest(
        "against", "this transformers has no image processor that works without torchvision; use --golden DIR."
    )


def _transformers() -> Any:
    importer: Callable[[str], Any] = importlib.import_module
    try:
        return importer("transformers")
    except ImportError as error:
        raise InvalidRequest(
            "against", f"transformers cannot be imported ({error}); install it or use --golden."
        ) from error
