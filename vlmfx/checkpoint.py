"""From a model folder or hub id to a Model: config, parameters, processor and the family's functions."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from vlmfx import weights
from vlmfx.compile.bundle import PROGRAMS, Bundle, check_options
from vlmfx.compile.bundle import read as read_bundle
from vlmfx.compile.executor import EagerExecutor
from vlmfx.compile.kernels import install
from vlmfx.compile.programs import ProgramSet
from vlmfx.device import DTYPES, is_auto, resolve_device, resolve_dtype
from vlmfx.errors import CheckpointError, InvalidRequest, UnsupportedModel, shown
from vlmfx.float16_range import dtype_on_mlu
from vlmfx.folder import is_bundle, read_json
from vlmfx.hub import resolve
from vlmfx.models.pooling import Pooling
from vlmfx.models.validate import CONFIG, PREPROCESSOR, refuse, section
from vlmfx.ops import mlu
from vlmfx.pooling_config import load_pooling
from vlmfx.processing.chat import load_chat_template
from vlmfx.processing.prompt import Processor, with_options
from vlmfx.processing.tokenizer import Tokenizer
from vlmfx.tree import Tree
from vlmfx.weight_files import WeightFiles

# One row a family: the architecture in config.json, the file's name in models/ and in processing/.
FAMILIES = {
    "LlavaForConditionalGeneration": "llava",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Phi3VForCausalLM": "phi3_v",
    "MiniCPMV": "minicpm_v",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
}

PROCESSOR = "processor_config.json"
Task = Literal["generate", "embed"]
TASKS: dict[str, Task] = {"generate": "generate", "auto": "generate", "embed": "embed", "embedding": "embed"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A loaded model: nothing here changes after loading. functions is the family's module in vlmfx.models, its functions pure;
    bundle has them compiled ahead of time."""

    name: str
    functions: ModuleType
    config: Any
    params: Tree = field(repr=False)
    processor: Processor
    device: torch.device
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    pooling: Pooling = "last"
    bundle: Bundle | None = None

    @property
    def program_set(self) -> ProgramSet:
        """Its programs, uncompiled."""
        return ProgramSet(
            functions=self.functions, config=self.config, dtype=self.dtype, device=self.device, pooling=self.pooling
        )

    @property
    def executor(self) -> EagerExecutor:
        """What runs the programs as they are."""
        return EagerExecutor(self.program_set, self.params)

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self.processor.max_model_len

    @property
    def has_head(self) -> bool:
        """Whether there are logits: a model loaded for embeddings alone has none, unless its head is tied to its input."""
        return self.config.text.tie_word_embeddings or "head" in self.params["text"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Blueprint:
    """A model without its weights: specs says which there are, of what shapes."""

    folder: Path
    programs: ProgramSet
    specs: Tree = field(repr=False)
    processor: Processor
    eos_token_ids: tuple[int, ...]

    @property
    def params(self) -> Tree:
        """The parameters on the meta device."""
        return weights.abstract(self.specs, dtype=self.programs.dtype)


def blueprint(
    model: str | Path,
    *,
    dtype: str | torch.dtype | None = "auto",
    device: str | torch.device | None = None,
    max_model_len: int | None = None,
    chat_template: str | Path | None = None,
    revision: str | None = None,
    hf_token: str | bool | None = None,
    task: Task = "generate",
) -> Blueprint:
    """The model in a folder, of a hub id, or "scenes", but for its weights; for embeddings alone it has no output matrix."""
    folder, hf, family, config = _read_config(model, revision, hf_token)
    functions = importlib.import_module(f"vlmfx.models.{family}")
    target = resolve_device(device)
    if target.type == "mlu":
        mlu.load()
    programs = ProgramSet(
        functions=functions,
        config=config,
        dtype=resolve_dtype(dtype, target, _stored_dtype(hf)),
        device=target,
        pooling=load_pooling(folder),
    )
    specs = _parse(lambda hf: functions.param_specs(config), hf, folder)
    if task == "embed":
        specs["text"].pop("head", None)
    return Blueprint(
        folder=folder,
        programs=programs,
        specs=specs,
        processor=load_processor(folder, family, config, max_model_len=max_model_len, chat_template=chat_template),
        eos_token_ids=_eos_token_ids(folder, hf),
    )


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
    """The model in a folder, of a hub id, or "scenes", the shipped one; or the bundle in a folder, which says itself what it is for.

    task: one of TASKS; for embeddings alone the output matrix is left out, which the folder then need not hold. trust_remote_code is
    accepted and never runs anything: every family is implemented here. A bundle is code, taken from local folders only. Raises
    CheckpointError (or its kind UnsupportedModel) with what is missing or does not fit."""
    task = resolve_task(task)
    bundle = _bundle(model, dtype, device, task, max_model_len)
    if bundle is not None:
        is_open = device is None or str(device) == "auto"
        dtype, device = bundle.dtype, bundle.host.device if is_open else device
        max_model_len = max_model_len or bundle.max_model_len
    plan = blueprint(
        model, dtype=dtype, device=device, max_model_len=max_model_len, chat_template=chat_template, revision=revision,
        hf_token=hf_token, task=task,
    )  # fmt: skip
    programs, config = plan.programs, plan.programs.config
    # The weights last: they are what takes time, and a wrong option should be told at once.
    processor = with_options(plan.processor, limit_mm_per_prompt, {})
    all_names = weights.source_names(programs.functions.param_specs(config))
    unwanted = all_names - weights.source_names(plan.specs)
    files = WeightFiles(plan.folder if bundle is None else bundle.weights, programs.functions.KEY_PREFIXES)
    weights.check(
        plan.specs,
        files.shapes,
        where=str(model),
        ignored=lambda name: name in unwanted or programs.functions.is_unused(config, name),
    )
    with files:
        if programs.device.type == "mlu" and programs.dtype == torch.float16:
            programs = replace(programs, dtype=dtype_on_mlu(plan.specs, files.read, is_auto=is_auto(dtype)))
        params = weights.load(plan.specs, files.read, dtype=programs.dtype, device=programs.device)
    return Model(
        name=str(model),
        functions=programs.functions,
        config=config,
        params=params,
        processor=processor,
        device=programs.device,
        dtype=programs.dtype,
        eos_token_ids=plan.eos_token_ids,
        pooling=programs.pooling,
        bundle=bundle,
    )


def _bundle(
    model: str | Path,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    task: Task,
    max_model_len: int | None,
) -> Bundle | None:
    """The bundle that a local folder holds, checked for this machine and these options; None for a model folder or a name."""
    if not os.path.isdir(model) or model == "scenes":
        return None
    resolve(model)  # refuses one in a hub's cache
    if not is_bundle(Path(model)):
        if any((Path(model) / PROGRAMS).glob("*-*-????????????.pt2")):
            raise CheckpointError(f"{model}: its export was not finished; run `vlmfx export` to that folder again.")
        return None
    found = read_bundle(Path(model))
    check_options(found, dtype=dtype, device=device, task=task, max_model_len=max_model_len)
    if found.kernels:
        install(found.folder / found.kernels)
    return found


def resolve_task(task: str) -> Task:
    """The task of one of its names in TASKS. Raises InvalidRequest."""
    if not isinstance(task, str) or task not in TASKS:
        raise InvalidRequest(
            "task", f"it is {shown(task)}; use one of {', '.join(TASKS)}.", found=task, expected=tuple(TASKS)
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
    folder, _, family, config = _read_config(model, revision, hf_token)
    return load_processor(folder, family, config, max_model_len=max_model_len, chat_template=chat_template)


def _read_config(
    model: str | Path, revision: str | None, hf_token: str | bool | None
) -> tuple[Path, dict[str, Any], str, Any]:
    """(folder, its config.json, the family's name, the family's config)."""
    folder = resolve(model, revision=revision, token=hf_token)
    hf = read_json(folder, "config.json")
    family = family_of(hf, str(model))
    return folder, hf, family, _parse(importlib.import_module(f"vlmfx.models.{family}").config, hf, folder)


def load_processor(
    folder: Path, family: str, config: Any, *, max_model_len: int | None = None, chat_template: str | Path | None = None
) -> Processor:
    """The processor of a model folder, without its weights."""
    functions = importlib.import_module(f"vlmfx.processing.{family}")
    context = config.text.max_position_embeddings
    if max_model_len is not None and not (isinstance(max_model_len, int) and 1 < max_model_len <= context):
        raise InvalidRequest(
            "max_model_len",
            f"it is {shown(max_model_len)}, expected 2 to {context}, the model's context; leave it out for all of that.",
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
    whole = read_json(folder, PROCESSOR, default={})
    inside = {key: section(whole, key, optional=True, file=PROCESSOR) for key in ("image_processor", "video_processor")}
    image = read_json(folder, PREPROCESSOR, default=inside["image_processor"])
    video = read_json(folder, "video_preprocessor_config.json", default=inside["video_processor"])
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


def _parse(parse: Any, hf: dict[str, Any], folder: Path) -> Any:
    """parse(hf), with a missing or mistyped key told as a CheckpointError."""
    try:
        return parse(hf)
    except KeyError as error:
        raise CheckpointError(f"{folder}: its config has no {error}; restore the published file.") from None
    except (TypeError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{folder}: its config cannot be read ({error}); restore the published file.") from None


def _stored_dtype(hf: dict[str, Any]) -> torch.dtype:
    """The whole model's, else the text half's, under the key of transformers 5 or of those before; float32 where none says."""
    configs = (hf, section(hf, "text_config", optional=True))
    name = next((c[key] for c in configs for key in ("dtype", "torch_dtype") if c.get(key)), None)
    return DTYPES.get(str(name), torch.float32)


def _eos_token_ids(folder: Path, hf: dict[str, Any]) -> tuple[int, ...]:
    """generation_config.json's, else config.json's: an id or a list."""
    generation = read_json(folder, "generation_config.json", default={})
    text = section(hf, "text_config", optional=True)
    eos: Any = next((c["eos_token_id"] for c in (generation, hf, text) if c.get("eos_token_id") is not None), [])
    ids = eos if isinstance(eos, list) else [eos]
    if any(type(i) is not int for i in ids):
        file = CONFIG if generation.get("eos_token_id") is None else "generation_config.json"
        refuse("eos_token_id", eos, "an integer or a list of integers", file=file)
    return tuple(ids)
