"""Direct: transformers' own model on the same folder gives the same greedy ids, and reads and writes the same folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import invariants
from tests.golden_cases import TINY, load_model
from tests.pictures import about, picture
from tests.processing import references
from tests.versions import transformers_from
from vlmfx import LLM, SamplingParams
from vlmfx.processing.prompt import prepare

transformers = transformers_from(4, 46, "is older than the oldest promised")
IS_OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 52)
NUM_TOKENS = 12


@pytest.fixture(params=TINY)
def family(request: pytest.FixtureRequest) -> str:
    if request.param == "minicpm_v":
        pytest.skip("transformers has no MiniCPM-V 2.6; its goldens come from the code published with the model")
    if request.param == "llava" and IS_OLD:
        pytest.skip("transformers below 4.52 cannot load the newer key names of this folder")
    if request.param in ("qwen2_5_vl", "qwen3_vl") and IS_OLD:
        pytest.skip("transformers below 4.52 lacks this family, or its nested config")
    return str(request.param)


def reference_of(folder: Path) -> Any:
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")


@torch.no_grad()
def greedy(reference: Any, family: str, folder: Path, ids: list[int], images: list[Any]) -> list[int]:
    """Ids that transformers' generate chooses, through its own image processor and cache."""
    batch = torch.tensor([ids])
    inputs: dict[str, Any] = {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
    if images:
        pixels = references.image_processor(family, folder)(images, return_tensors="pt")
        inputs |= {name: torch.as_tensor(value) for name, value in pixels.items()}
    if family.startswith("qwen") and not IS_OLD:
        inputs["mm_token_type_ids"] = (batch == reference.config.image_token_id).int()
    out = reference.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, temperature=None,
                             top_p=None, top_k=None)  # fmt: skip
    return out[0, len(ids) :].tolist()


def assert_equal_answers(folder: Path, family: str, model: Any) -> None:
    reference = reference_of(folder)
    for sizes in ([(40, 60)], [(90, 30), (50, 50)], []):
        images = [picture(w, h) for w, h in sizes]
        request = about(model, *images, text="What is shown?")
        ids = prepare(model.processor, request).token_ids
        (output,) = LLM(model).generate(request, SamplingParams.greedy(max_tokens=NUM_TOKENS, ignore_eos=True))
        assert invariants.token_ids([output]) == [greedy(reference, family, folder, ids, images)]


def test_greedy_ids_are_equal(family):
    assert_equal_answers(TINY[family], family, load_model(TINY[family]))


@pytest.mark.parametrize("tied", [False, True])
def test_folders_that_transformers_saves_load(family, tied, tmp_path):
    """With config.json and key names as the installed version writes them, head tied and not."""
    if IS_OLD and not tied and family == "qwen2_vl":
        pytest.skip("transformers 4.46 takes tie_word_embeddings for Qwen2-VL from its default")
    config = transformers.AutoConfig.from_pretrained(TINY[family])
    for part in (config, getattr(config, "text_config", config)):
        part.tie_word_embeddings = tied
    torch.manual_seed(0)
    config.architectures = None
    reference = getattr(transformers, json.loads((TINY[family] / "config.json").read_text())["architectures"][0])(
        config
    )
    for tensor in reference.parameters():
        tensor.data.normal_(0, 0.2).add_(1.0 if tensor.dim() == 1 else 0.0)
    folder = tmp_path / "saved"
    for path in TINY[family].iterdir():
        if "tokenizer" in path.name or "chat" in path.name or "processor" in path.name:
            folder.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / path.name)
    reference.save_pretrained(folder)
    model = load_model(folder)
    assert model.config.text.tie_word_embeddings == tied
    assert_equal_answers(folder, family, model)
