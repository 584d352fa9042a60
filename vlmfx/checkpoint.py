"""From a model folder or hub id to a Model: config, parameters, processor and the family's functions."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from safetensors import safe_open

from vlmfx import weights
from vlmfx.device import DTYPES, resolve_device, resolve_dtype
from vlmfx.errors import CheckpointError, InvalidRequest, UnsupportedModel
from vlmfx.hub import resolve
from vlmfx.models.pooling import Pooling, stored_pooling
from vlmfx.models.validate import CONFIG, PREPROCESSOR, one_of, refuse
from vlmfx.processing.chat import load_chat_template
from vlmfx.processing.prompt import Processor, with_options
from vlmfx.processing.tokenizer import Tokenizer
from vlmfx.tree import Tree

# One row a family: the architecture in config.json, the file's name in models/ and in processing/.
FAMILIES = {
    "LlavaForConditionalGeneration": "llava",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Phi3VForCausalLM": "phi3_v",
    "MiniCPMV": "minicpm_v",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
}


MODULES = ("Transformer", "Pooling", "Normalize")  # of a sentence-transformers folder, what is implemented
Task = Literal["generate", "embed"]
TASKS: dict[str, Task] = {"generate": "generate", "auto": "generate", "embed": "embed", "embedding": "embed"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A loaded model: nothing here changes after loading. functions is the family's module in vlmfx.models, its functions pure."""

    name: str
    functions: ModuleType
    config: Any
    params: Tree = field(repr=False)
    processor: Processor
    device: torch.device
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    pooling: Pooling = "last"

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self.processor.max_model_len

    @property
    def has_head(self) -> bool:
        """Whether there are logits: a model loaded for embeddings alone has none, unless its head is tied to its input."""
        return self.config.text.tie_word_embeddings or "head" in self.params["text"]


def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype | None = "auto",
    device: str | torch.device | None = None,
    max_model_len: int | None = None,
    chat_template: str | Path | None = None,
    revision: str | None = None,
    hf_token: str | bool | None = None,
    trust_remote_code: bool = False,
    task: str = "generate",
    limit_mm_per_prompt: Mapping[str, int] | str | None = None,
) -> Model:
    """The model in a folder, of a hub id, or "scenes", the shipped one.

    task: one of TASKS; for embeddings alone the output matrix is left out, which the folder then need not hold. trust_remote_code is
    accepted and never runs anything: every family is implemented here. Raises CheckpointError (or its kind UnsupportedModel) with
    what is missing or does not fit."""
    task = resolve_task(task)
    folder = resolve(model, revision=revision, token=hf_token)
    hf = read_json(folder, "config.json")
    family = family_of(hf, str(model))
    functions = importlib.import_module(f"vlmfx.models.{family}")
    config = _parse(functions.config, hf, folder)
    target = resolve_device(device)
    compute_dtype = resolve_dtype(dtype, target, _stored_dtype(hf))
    # The weights last: they are what takes time, and a wrong option should be told at once.
    processor = load_processor(folder, family, config, max_model_len=max_model_len, chat_template=chat_template)
    processor = with_options(processor, limit_mm_per_prompt, {})
    eos_token_ids = _eos_token_ids(folder, hf)
    pooling = load_pooling(folder)
    specs = _parse(lambda hf: functions.param_specs(config), hf, folder)
    unwanted = weights.source_names(specs["text"].pop("head", ())) if task == "embed" else set()
    files = WeightFiles(folder, functions.KEY_PREFIXES)
    weights.check(
        specs,
        files.shapes,
        where=str(model),
        ignored=lambda name: name in unwanted or functions.is_unused(config, name),
    )
    with files:
        params = weights.load(specs, files.read, dtype=compute_dtype, device=target)
    return Model(
        name=str(model),
        functions=functions,
        config=config,
        params=params,
        processor=processor,
        device=target,
        dtype=compute_dtype,
        eos_token_ids=eos_token_ids,
        pooling=pooling,
    )


def resolve_task(task: str) -> Task:
    """The task of one of its names in TASKS. Raises InvalidRequest."""
    if not isinstance(task, str) or task not in TASKS:
        raise InvalidRequest(
            "task", f"it is {str(task)[:40]!r}; use one of {', '.join(TASKS)}.", found=task, expected=tuple(TASKS)
        )
    return TASKS[task]


def load_only_processor(
    model: str | Path,
    *,
    max_model_len: int | None = None,
    chat_template: str | Path | None = None,
    revision: str | None = None,
    hf_token: str | bool | None = None,
) -> Processor:
    """The processor of a folder, a hub id or "scenes"; no weight is read."""
    folder = resolve(model, revision=revision, token=hf_token)
    hf = read_json(folder, "config.json")
    family = family_of(hf, str(model))
    config = _parse(importlib.import_module(f"vlmfx.models.{family}").config, hf, folder)
    return load_processor(folder, family, config, max_model_len=max_model_len, chat_template=chat_template)


def load_processor(
    folder: Path, family: str, config: Any, *, max_model_len: int | None = None, chat_template: str | Path | None = None
) -> Processor:
    """The processor of a model folder, without its weights."""
    functions = importlib.import_module(f"vlmfx.processing.{family}")
    context = config.text.max_position_embeddings
    if max_model_len is not None and not (isinstance(max_model_len, int) and 1 < max_model_len <= context):
        raise InvalidRequest(
            "max_model_len",
            f"it is {max_model_len!r}, expected 2 to {context}, the model's context; leave it out for all of that.",
            found=max_model_len,
            expected=context,
        )
    preprocessor = read_preprocessor(folder)
    tokenizer = Tokenizer.load(folder)
    return Processor(
        functions=functions,
        config=_parse(lambda hf: functions.config(hf, config, tokenizer), preprocessor, folder),
        tokenizer=tokenizer,
        chat_template=load_chat_template(folder, chat_template),
        vocab_size=config.text.vocab_size,
        max_model_len=max_model_len or context,
    )


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """preprocessor_config.json, with video_preprocessor_config.json as its "video_processor", {} where there is none.

    Both may be parts of processor_config.json instead, as transformers 5 saves them."""
    whole = read_json(folder, "processor_config.json", default={})
    image = read_json(folder, PREPROCESSOR, default=whole.get("image_processor") or {})
    video = read_json(folder, "video_preprocessor_config.json", default=whole.get("video_processor") or {})
    return {**image, "video_processor": video}


def family_of(hf: dict[str, Any], where: str) -> str:
    """The row of FAMILIES for a config.json. Raises UnsupportedModel, which lists the rows there are."""
    found = hf.get("architectures") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        refuse("architectures", found, "a list of names")
    for architecture in found:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    raise UnsupportedModel(
        f"{where}: config.json names the architecture {', '.join(found) or 'none'}, which is not implemented; "
        f"use one of {', '.join(FAMILIES)}."
    )


def load_pooling(folder: Path) -> Pooling:
    """How the hidden states of a prompt become its embedding: as a sentence-transformers folder says, else the last token's.

    Raises CheckpointError where modules.json names a step that is not implemented."""
    at, is_there = "1_Pooling", (folder / "1_Pooling" / CONFIG).exists()
    if (folder / "modules.json").exists():
        steps = _read(folder, "modules.json")
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            refuse("the file", steps, "a list of objects", file="modules.json")
        for step in steps:
            kind = one_of("type", str(step.get("type")).rpartition(".")[2], MODULES, file="modules.json")
            if kind == "Pooling":
                at, is_there = step.get("path"), True
    if not is_there:
        return "last"
    if not isinstance(at, str) or not _is_plain_file_name(at):
        refuse("path", at, "the name of a folder", file="modules.json")
    return stored_pooling(read_json(folder, f"{at}/{CONFIG}"), f"{at}/{CONFIG}")


def read_json(folder: Path, name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object from a model folder; `default` when the file is absent. Raises CheckpointError."""
    path = folder / name
    if not path.exists() and default is not None:
        return default
    value = _read(folder, name)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: it holds a {type(value).__name__}, expected an object; copy the file again.")
    return value


def _read(folder: Path, name: str) -> Any:
    """What a JSON file of a model folder holds."""
    path = folder / name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: there is no {name}; point to a folder in the Hugging Face layout.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: it is not readable JSON ({error}); copy the file again.") from None


def published_name(key: str, key_prefixes: Sequence[tuple[str, str]]) -> str:
    """A stored tensor's name as the published checkpoints write it, and the specs: the first matching prefix is replaced."""
    for new, published in key_prefixes:
        if key.startswith(new):
            return published + key[len(new) :]
    return key


class WeightFiles:
    """The safetensors files of a folder, memory-mapped while the object is entered; names are those the specs use."""

    def __init__(self, folder: Path, key_prefixes: Sequence[tuple[str, str]]) -> None:
        self.folder = folder
        self._files = _weight_files(folder)
        self._prefixes = key_prefixes
        self._stack = ExitStack()
        self._handles: dict[Path, Any] = {}

    @cached_property
    def _location(self) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
        """Name → file, name in that file, stored shape; read from the headers."""
        location: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
        for path in self._files:
            with _open(path) as handle:
                for key in handle.keys():  # noqa: SIM118, a safe_open handle is no dict
                    name = published_name(key, self._prefixes)
                    if name in location:
                        other, twin, _ = location[name]
                        raise CheckpointError(
                            f"{self.folder}: {key} in {path.name} and {twin} in {other.name} are the same weight; "
                            "remove one of them."
                        )
                    location[name] = (path, key, tuple(handle.get_slice(key).get_shape()))
        return location

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor in the files."""
        return {name: shape for name, (_, _, shape) in self._location.items()}

    def read(self, name: str) -> torch.Tensor:
        """A tensor by its published name, mapped from its file."""
        path, key, _ = self._location[name]
        if path not in self._handles:
            self._handles[path] = self._stack.enter_context(_open(path))
        return self._handles[path].get_tensor(key)

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self._handles.clear()
        self._stack.close()


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(folder, index.name).get("weight_map")
        if not weight_map:
            raise CheckpointError(f"{index}: weight_map is empty or missing; copy the file again.")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            refuse("weight_map", weight_map, "an object of file names", file=str(index))
        names = sorted(set(weight_map.values()))
        escaped = [name for name in names if not _is_plain_file_name(name)]
        if escaped:
            raise CheckpointError(
                f"{index}: weight_map names {str(escaped)[:200]}, which are no file names or lie outside the folder; "
                "use plain file names."
            )
        paths = [folder / name for name in names]
    else:
        paths = (
            [folder / "model.safetensors"]
            if (folder / "model.safetensors").exists()
            else sorted(folder.glob("*.safetensors"))
        )
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise CheckpointError(
            f"{folder}: {', '.join(missing)} is named in {index.name} but not there; download it again."
        )
    if not paths:
        bins = any(folder.glob("*.bin"))
        raise CheckpointError(
            f"{folder}: there are {'only .bin weights, which can run code when opened' if bins else 'no weights'}; "
            + (
                "convert them with transformers: AutoModel.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)."
                if bins
                else "put model.safetensors there."
            )
        )
    return paths


def _is_plain_file_name(name: str) -> bool:
    return (
        name not in ("", ".", "..") and name.isprintable() and not set(name) & set("/\\:") and len(name.encode()) < 256
    )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises its own type, which older versions do not export
        raise CheckpointError(f"{path}: it is not a whole safetensors file ({error}); download it again.") from None


def _parse(parse: Any, hf: dict[str, Any], folder: Path) -> Any:
    """parse(hf), with a missing or mistyped key told as a CheckpointError."""
    try:
        return parse(hf)
    except KeyError as error:
        raise CheckpointError(f"{folder}: its config has no {error}; restore the published file.") from None
    except (TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{folder}: its config cannot be read ({error}); restore the published file.") from None


def _stored_dtype(hf: dict[str, Any]) -> torch.dtype:
    name = hf.get("dtype") or hf.get("torch_dtype") or hf.get("text_config", {}).get("torch_dtype")
    return DTYPES.get(str(name), torch.float32)


def _eos_token_ids(folder: Path, hf: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json's, else config.json's: an id or a list."""
    generation = read_json(folder, "generation_config.json", default={})
    text = hf.get("text_config", {})
    eos: Any = next((c["eos_token_id"] for c in (generation, hf, text) if c.get("eos_token_id") is not None), [])
    ids = eos if isinstance(eos, list) else [eos]
    if any(type(i) is not int for i in ids):
        file = CONFIG if generation.get("eos_token_id") is None else "generation_config.json"
        refuse("eos_token_id", eos, "an integer or a list of integers", file=file)
    return tuple(ids)
