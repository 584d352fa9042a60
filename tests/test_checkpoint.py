"""checkpoint: a folder loads whole or is refused in a sentence that names what is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlmfx
from tests import invariants
from tests.golden_cases import TINY, load_model
from tests.pictures import mixed
from vlmfx import LLM, CheckpointError, SamplingParams, UnsupportedModel, checkpoint, weights
from vlmfx.checkpoint import FAMILIES
from vlmfx.tree import items, leaves
from vlmfx.weight_files import published_name

GREEDY = SamplingParams.greedy(max_tokens=6, ignore_eos=True)


@pytest.fixture(params=TINY)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    """A copy of the tiny folder, to be damaged."""
    return Path(shutil.copytree(TINY[family], tmp_path / "model"))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def prefixes_of(family: str) -> tuple[tuple[str, str], ...]:
    prefixes: tuple[tuple[str, str], ...] = load_model(TINY[family]).functions.KEY_PREFIXES
    return prefixes or pytest.skip("all checkpoints of this family have the same key names")


def store(folder: Path, tensors: dict[str, Tensor]) -> None:
    """All weights in one file."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors")


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}), encoding="utf-8")


def answers(source: Any) -> list[list[int]]:
    llm = LLM(source)
    return invariants.token_ids(llm.generate(mixed(llm.model), GREEDY, use_tqdm=False))


# What loads


def test_weights_survive_saving(family):
    model = load_model(TINY[family])
    specs = model.functions.param_specs(model.config)
    published = weights.save(specs, model.params)
    assert set(published) == weights.source_names(specs)
    again = weights.load(specs, published.__getitem__, dtype=torch.float32)
    for (path, before), (same_path, after) in zip(items(model.params), items(again), strict=True):
        assert path == same_path
        assert torch.equal(before, after), path


def test_what_was_saved_loads_as_a_folder(family, folder):
    model = load_model(TINY[family])
    store(folder, weights.save(model.functions.param_specs(model.config), model.params))
    assert answers(folder) == answers(model)


def test_saved_names_are_the_files_own(family):
    """Every stored tensor is one that is loaded, under its published name, or one that is known to be unused."""
    model = load_model(TINY[family])
    stored = tensors_of(TINY[family])
    published = weights.save(model.functions.param_specs(model.config), model.params)
    unused = {
        name
        for name in stored
        if model.functions.is_unused(model.config, published_name(name, model.functions.KEY_PREFIXES))
    }
    by_published = {published_name(n, model.functions.KEY_PREFIXES): t for n, t in stored.items()}
    assert len(stored) == len(published) + len(unused)
    assert all(torch.equal(published[name], by_published[name]) for name in published)


def test_both_generations_of_key_names_load(family, folder):
    """Published names, those of newer code, and the ones that transformers 5 uses inside."""
    expected = answers(load_model(TINY[family]))
    prefixes = prefixes_of(family)
    published = {published_name(name, prefixes): tensor for name, tensor in tensors_of(folder).items()}
    store(folder, published)
    assert answers(folder) == expected
    newer = {}
    for name, tensor in published.items():
        new = next((new + name[len(old) :] for new, old in prefixes if name.startswith(old)), name)
        newer[new] = tensor
    assert newer.keys() != published.keys()
    store(folder, newer)
    assert answers(folder) == expected


def test_a_twin_of_a_weight_is_refused(family, folder):
    tensors = tensors_of(folder)
    prefixes = prefixes_of(family)
    new, old = next((n, o) for n, o in prefixes if any(k.startswith((n, o)) for k in tensors))
    name = next(k for k in tensors if k.startswith((new, old)))
    twin = old + name[len(new) :] if name.startswith(new) else new + name[len(old) :]
    store(folder, tensors | {twin: tensors[name].clone()})
    refused(folder, f"{name} .* {twin} .*the same weight|{twin} .* {name} .*the same weight", "remove one of them")


def test_a_tied_head_may_be_stored_too(family, folder):
    edit(folder, tie_word_embeddings=True)
    tensors = tensors_of(folder)
    head = "llm.lm_head.weight" if family == "minicpm_v" else "lm_head.weight"
    tensors.pop(head, None)
    store(folder, tensors)
    expected = answers(folder)
    embed = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    for name in (head, *(["language_model.lm_head.weight"] if family == "llava" else [])):
        store(folder, tensors | {name: embed.clone()})
        assert answers(folder) == expected


def test_keys_that_hold_nothing_are_ignored(family, folder):
    extra = {
        "llava": ["language_model.model.layers.0.self_attn.rotary_emb.inv_freq", *LLAVA_UNUSED],
        "minicpm_v": ["llm.model.rotary_emb.inv_freq", "vpm.embeddings.position_ids", "resampler.pos_embed"],
        "qwen2_vl": ["model.layers.0.self_attn.rotary_emb.inv_freq"],
        "qwen2_5_vl": ["model.layers.0.self_attn.rotary_emb.inv_freq", "visual.rotary_pos_emb.inv_freq"],
        "qwen3_vl": ["model.language_model.rotary_emb.inv_freq", "model.visual.rotary_pos_emb.inv_freq"],
    }[family]
    store(folder, {**{name: torch.ones(3) for name in extra}, **tensors_of(folder)})
    assert answers(folder) == answers(load_model(TINY[family]))


LLAVA_UNUSED = ["vision_tower.vision_model.embeddings.position_ids"]


def test_weights_are_cast(folder):
    model = checkpoint.load(folder, dtype="bfloat16")
    assert {t.dtype for t in leaves(model.params)} == {torch.bfloat16}
    assert checkpoint.load(folder).dtype == torch.float32
    assert checkpoint.load(folder, dtype=torch.float16).dtype == torch.float16


def test_an_unsharded_folder_needs_no_index(family, folder):
    store(folder, tensors_of(folder))
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert answers(folder) == answers(load_model(TINY[family]))


def test_eos_comes_from_generation_config_first(family, folder):
    edit(folder, eos_token_id=7)
    edit(folder, "generation_config.json", eos_token_id=[4, 5])
    assert checkpoint.load(folder).eos_token_ids == (4, 5)
    edit(folder, "generation_config.json", eos_token_id=6)
    assert checkpoint.load(folder).eos_token_ids == (6,)
    (folder / "generation_config.json").unlink()
    assert checkpoint.load(folder).eos_token_ids == (7,)


@pytest.mark.parametrize(
    ("hf", "expected"),
    [
        ({"text_config": {"dtype": "bfloat16"}}, torch.bfloat16),  # as Qwen3-VL is published
        ({"text_config": {"torch_dtype": "bfloat16"}}, torch.bfloat16),
        ({"torch_dtype": "float16", "text_config": {"dtype": "bfloat16"}}, torch.float16),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, torch.bfloat16),
        ({"text_config": None}, torch.float32),
        ({"dtype": None, "text_config": {"dtype": None}}, torch.float32),
    ],
)
def test_the_stored_dtype_may_stand_in_the_text_half(hf, expected):
    assert checkpoint._stored_dtype(hf) == expected


# What does not


def refused(folder: Path, *says: str, kind: type[CheckpointError] = CheckpointError) -> CheckpointError:
    """The error of loading a folder, which must match every pattern and be one sentence."""
    with pytest.raises(kind) as caught:
        vlmfx.load(folder)
    for pattern in says:
        assert caught.match(pattern)
    assert invariants.is_one_sentence(caught.value)
    return caught.value


def test_an_unknown_architecture_names_those_there_are(folder):
    edit(folder, architectures=["BertModel"])
    refused(folder, "names the architecture BertModel, which is not implemented; use one of", kind=UnsupportedModel)
    for name in FAMILIES:
        refused(folder, name, kind=UnsupportedModel)
    edit(folder, architectures=...)
    refused(folder, "names the architecture none", kind=UnsupportedModel)


def test_a_missing_shard(tmp_path):
    folder = Path(shutil.copytree(TINY["llava"], tmp_path / "model"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors is named in .* but not there; download it again")


def test_only_bin_files(folder):
    store(folder, {})
    (folder / "model.safetensors").unlink()
    refused(folder, "there are no weights; put model.safetensors there")
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, "only .bin weights, which can run code when opened; convert them with transformers")


def test_each_key_that_does_not_fit_is_named(family, folder):
    tensors = tensors_of(folder)
    gone, wrong, *_ = [name for name in tensors if "layers.0.mlp" in name and "vision" not in name]
    short = tensors.pop(gone).shape
    wrong_shape = (3, 5)
    true_shape = tuple(tensors[wrong].shape)
    store(folder, tensors | {wrong: torch.zeros(wrong_shape), "surprise.weight": torch.zeros(1)})
    prefixes = load_model(TINY[family]).functions.KEY_PREFIXES
    gone, wrong = (published_name(name, prefixes) for name in (gone, wrong))
    message = str(refused(folder, "3 keys do not fit config.json: ", "use the config.json that was saved with"))
    assert f"{gone} is missing" in message
    assert f"{wrong} has shape (3, 5), expected {true_shape}" in message
    assert "surprise.weight is not a weight of this model" in message
    assert short


def test_weights_of_another_model_are_told_briefly(folder):
    store(folder, {f"other.{i}": torch.zeros(1) for i in range(500)})
    error = refused(folder, "keys do not fit config.json", r"and \d+ more")
    assert len(str(error)) < 2500


@pytest.mark.parametrize("value", [[], "x", 7])
def test_a_text_config_that_is_no_object(value, folder):
    edit(folder, text_config=value)
    refused(folder, "text_config is .*, expected an object")


def test_a_text_config_of_null_is_none(tmp_path):
    folder = Path(shutil.copytree(TINY["qwen2_vl"], tmp_path / "model"))
    edit(folder, text_config=None)
    (folder / "generation_config.json").unlink()
    loaded = checkpoint.load(folder)
    assert loaded.eos_token_ids == (json.loads((folder / "config.json").read_text())["eos_token_id"],)


def test_parts_of_a_processor_config_that_are_no_objects(tmp_path):
    (tmp_path / "processor_config.json").write_text('{"image_processor": [1]}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"processor_config.json: image_processor is .*, expected an object"):
        checkpoint.read_preprocessor(tmp_path)


def test_a_truncated_weight_file(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, f"{path.name}: it is not a whole safetensors file .*; download it again")


def test_an_index_does_not_lead_out_of_the_folder(folder):
    index = {"weight_map": {"a": "../../etc/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    refused(folder, "lie outside the folder; use plain file names")
    (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    refused(folder, "weight_map is empty or missing; copy the file again")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null", "7"])
def test_files_that_are_no_json_objects(folder, name, content):
    (folder / name).write_text(content, encoding="utf-8")
    refused(folder, f"{name}: it .*; copy the file again")


def test_files_that_are_missing(folder):
    (folder / "tokenizer.json").unlink()
    refused(folder, "holds no tokenizer .*; add its tokenizer.json")
    (folder / "config.json").unlink()
    refused(folder, "there is no config.json; point to a folder in the Hugging Face layout")


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no vision_config": lambda hf: hf.pop("vision_config"),
    "vision_config is a list": lambda hf: hf.update(vision_config=[]),
    "no patches": lambda hf: hf["vision_config"].update(patch_size=0),
    "words for numbers": lambda hf: (hf.get("text_config") or hf).update(hidden_size="wide"),
    "no heads": lambda hf: (hf.get("text_config") or hf).update(num_attention_heads=0),
    "another rope": lambda hf: (hf.get("text_config") or hf).update(rope_scaling={"rope_type": "yarn"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_configs_that_make_no_model(folder, change):
    path = folder / "config.json"
    hf = json.loads(path.read_text(encoding="utf-8"))
    CHANGES[change](hf)
    path.write_text(json.dumps(hf), encoding="utf-8")
    refused(folder)


def test_a_processor_that_does_not_fit_the_tower(tmp_path):
    folder = Path(shutil.copytree(TINY["llava"], tmp_path / "model"))
    edit(folder, "preprocessor_config.json", crop_size={"height": 336, "width": 336})
    refused(folder, "crop_size is 336 but config.json has image_size 84; make them equal")
    folder = Path(shutil.copytree(TINY["qwen2_vl"], tmp_path / "other"))
    edit(folder, rope_scaling={"type": "mrope", "mrope_section": [2, 2, 3]})
    refused(folder, r"mrope_section \[2, 2, 3\] adds up to 7, expected head_dim / 2 = 6")


def test_a_model_is_frozen(family):
    model = load_model(TINY[family])
    with pytest.raises(AttributeError):
        model.name = "another"  # type: ignore[misc]
    assert replace(model, name="another").name == "another"
