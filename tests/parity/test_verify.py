"""vlmfx verify: it agrees where all is well, and a fault is found at the stage in which it was made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlmfx
from tests import golden_cases
from tests.golden_cases import COMMITTED, TINY, load_model
from tests.pictures import picture
from tests.versions import transformers_from
from vlmfx.cli import main
from vlmfx.errors import CheckpointError, InvalidRequest
from vlmfx.parity.report import Report, Sample, compare
from vlmfx.parity.stages import STAGES
from vlmfx.tree import tree_map

LLAVA, QWEN = "llava-newnames-single", "qwen2vl-tiny-two-images"


def departed(report: Report) -> str | None:
    """The stage that departs first."""
    return report.first_departure.stage if report.first_departure else None


def compared(report: Report) -> set[str]:
    return {c.stage for c in report.comparisons if c.is_ok is not None}


@pytest.mark.parametrize("case", golden_cases.find(COMMITTED), ids=lambda case: case.name)
def test_every_golden_case_agrees(case):
    model = load_model(case.model_folder)
    report = vlmfx.verify(model, golden=case.folder)
    assert report.is_ok, str(report)
    assert compared(report) >= set(STAGES) - {"positions"}
    assert [c.name for c in report.comparisons if c.note == "vlmfx shows no such value"] == []


@pytest.fixture
def transformers() -> Any:
    return transformers_from(4, 46, "is older than the oldest promised")


def skip_what_is_too_old(transformers: Any, family: str) -> None:
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    needed = {"llava": (4, 52), "qwen2_5_vl": (4, 49), "qwen3_vl": (4, 57)}.get(family, (4, 46))
    if version < needed:
        pytest.skip(f"transformers {transformers.__version__} cannot load this folder")


RUN_BY_TRANSFORMERS = [name for name in TINY if name in ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")]


@pytest.mark.parametrize("family", RUN_BY_TRANSFORMERS)
def test_transformers_agrees_about_the_demo(family, transformers):
    skip_what_is_too_old(transformers, family)
    report = vlmfx.verify(TINY[family], against="transformers", device="cpu")
    assert report.is_ok, str(report)
    assert compared(report) == set(STAGES)


def test_transformers_agrees_about_images_and_text_of_the_users(transformers, tmp_path):
    paths = []
    for number, (width, height) in enumerate([(120, 90), (50, 130)]):
        paths.append(tmp_path / f"{number}.png")
        picture(width, height).save(paths[-1])
    model = load_model(TINY["qwen2_vl"])
    report = vlmfx.verify(model, against="transformers", images=paths, prompt="Which one is larger?")
    assert report.is_ok, str(report)
    (grids,) = [c for c in report.comparisons if c.name == "image_grid_thw"]
    assert grids.shape == (2, 3)
    report = vlmfx.verify(model, against="transformers", prompt="Hello.")
    assert report.is_ok, str(report)
    assert compared(report) == {"ids", "merged", "positions", "logits", "greedy"}
    assert {c.note for c in report.comparisons if c.is_ok is None} == {"no pixels in this prompt"}


def test_bfloat16_is_compared_by_its_own_tolerance():
    model = load_model(TINY["qwen2_vl"], "bfloat16")
    report = vlmfx.verify(model, golden=COMMITTED / QWEN)
    assert report.is_ok, str(report)
    assert report.dtype == "bfloat16"
    (logits,) = [c for c in report.comparisons if c.name == "last_logits"]
    assert (logits.largest or 0.0) > 2e-2, "float32's tolerance would do"


@pytest.mark.parametrize(("factor", "stage"), [(1.01, None), (1.2, "projected")])
def test_bfloat16_still_finds_a_fault(factor, stage, copy):
    """A merger that is off by a hundredth is within what bfloat16 may do; by a fifth it is not."""
    model, case = copy(QWEN)
    edit_weight("visual.merger.mlp.2.weight", lambda t: t * factor)(model, case)
    assert departed(vlmfx.verify(model, golden=case, dtype="bfloat16", device="cpu")) == stage


@pytest.mark.parametrize(("difference", "is_ok"), [(0.39, True), (0.41, False)])
def test_narrow_types_are_held_to_a_share_of_the_range(difference, is_ok):
    theirs = torch.tensor([-4.0, 0.0, 6.0])  # 4 percent of a range of 10
    mine = theirs + torch.tensor([0.0, difference, 0.0])
    assert compare("", "logits", "last_logits", mine, theirs, is_narrow=True).is_ok is is_ok


# Faults, each made in a copy of a model folder or of a golden case.


@pytest.fixture
def copy(tmp_path) -> Callable[[str], tuple[Path, Path]]:
    """Copies of a case's model folder and of the case."""

    def made(name: str) -> tuple[Path, Path]:
        case = golden_cases.Case(COMMITTED / name)
        shutil.copytree(case.model_folder, tmp_path / "model")
        shutil.copytree(case.folder, tmp_path / "case")
        return tmp_path / "model", tmp_path / "case"

    return made


def edit_json(name: str, edit: Callable[[Any], None]) -> Callable[[Path, Path], None]:
    def fault(model: Path, case: Path) -> None:
        value = json.loads((model / name).read_text(encoding="utf-8"))
        edit(value)
        (model / name).write_text(json.dumps(value), encoding="utf-8")

    return fault


def edit_weight(name: str, change: Callable[[Tensor], Tensor] = lambda t: t * 1.01) -> Callable[[Path, Path], None]:
    def fault(model: Path, case: Path) -> None:
        (path,) = [p for p in model.glob("*.safetensors") if name in load_file(p)]
        tensors = load_file(path)
        save_file({**tensors, name: change(tensors[name])}, path, metadata={"format": "pt"})

    return fault


def edit_golden(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path, Path], None]:
    def fault(model: Path, case: Path) -> None:
        tensors = load_file(case / "golden.safetensors")
        save_file({**tensors, name: change(tensors[name]).contiguous()}, case / "golden.safetensors")

    return fault


def at(index: int, value: float) -> Callable[[Tensor], Tensor]:
    """A change of one element of the flattened value."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[index] = value
        return changed

    return change


def swap_tokens(tokenizer: Any) -> None:
    vocab = tokenizer["model"]["vocab"]
    vocab["?"], vocab["!"] = vocab["!"], vocab["?"]


def replace_template(model: Path, case: Path) -> None:
    for path in model.glob("chat_template.*"):
        path.write_text(path.read_text(encoding="utf-8").replace("ASSISTANT", "BOT").replace("assistant", "bot"))


FAULTS: dict[str, tuple[str, Callable[[Path, Path], None], str, str]] = {
    "template": (LLAVA, replace_template, "ids", "prompt"),
    "template of parts": (QWEN, replace_template, "ids", "prompt"),
    "tokenizer": (QWEN, edit_json("tokenizer.json", swap_tokens), "ids", "input_ids"),
    "id of the golden": (QWEN, edit_golden("input_ids", at(3, 7)), "ids", "input_ids"),
    "mean": (
        LLAVA,
        edit_json("preprocessor_config.json", lambda c: c.update(image_mean=[0.5, 0.5, 0.5])),
        "pixels",
        "pixel_values",
    ),
    "area": (
        QWEN,
        edit_json("preprocessor_config.json", lambda c: c.update(min_pixels=4 * 28 * 28, max_pixels=8 * 28 * 28)),
        "ids",  # fewer placeholders
        "input_ids",
    ),
    "tower": (QWEN, edit_weight("visual.blocks.1.mlp.fc1.weight"), "vision", "image_vision_hidden"),
    "tower of CLIP": (
        LLAVA,
        edit_weight("model.vision_tower.vision_model.pre_layrnorm.bias", lambda t: t + 0.01),
        "vision",
        "vision_selected_hidden",
    ),
    "projector": (LLAVA, edit_weight("model.multi_modal_projector.linear_2.weight"), "projected", "image_embeds"),
    "merger": (QWEN, edit_weight("visual.merger.mlp.0.bias", lambda t: t + 0.01), "projected", "image_embeds"),
    "embeddings": (LLAVA, edit_weight("model.language_model.embed_tokens.weight"), "merged", "inputs_embeds"),
    "position of the golden": (QWEN, edit_golden("position_ids", at(40, 3)), "positions", "position_ids"),
    "sections": (
        QWEN,
        edit_json("config.json", lambda c: c["rope_scaling"].update(mrope_section=[1, 2, 3])),
        "logits",
        "prompt_logits",
    ),
    "theta": (QWEN, edit_json("config.json", lambda c: c.update(rope_theta=5e5)), "logits", "prompt_logits"),
    "head": (LLAVA, edit_weight("lm_head.weight"), "logits", "prompt_logits"),
    "not a number": (QWEN, edit_golden("last_logits", at(5, torch.nan)), "logits", "last_logits"),
    "token of the golden": (QWEN, edit_golden("greedy_ids", at(4, 9)), "greedy", "greedy_ids"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_at_its_stage(name, copy):
    case_name, fault, stage, value = FAULTS[name]
    model, case = copy(case_name)
    fault(model, case)
    report = vlmfx.verify(model, golden=case, device="cpu")
    assert report.first_departure is not None, str(report)
    assert (report.first_departure.stage, report.first_departure.name) == (stage, value), str(report)
    assert f"first departs: {stage} ({value}" in str(report)


def test_swapped_sections_leave_the_positions_fine(copy):
    model, case = copy(QWEN)
    FAULTS["sections"][1](model, case)
    report = vlmfx.verify(model, golden=case, device="cpu")
    assert all(c.is_ok for c in report.comparisons if c.stage == "positions")


@pytest.mark.parametrize(
    ("part", "stage"),
    [("vision", "vision"), ("projector", "projected"), ("text", "merged")],
)
def test_a_wrong_weight_departs_from_transformers(part, stage, transformers):
    skip_what_is_too_old(transformers, "llava")
    model = load_model(TINY["llava"])
    params = {**model.params, part: tree_map(lambda t: t * 1.01, model.params[part])}
    assert departed(vlmfx.verify(replace(model, params=params), against="transformers")) == stage


def test_wrong_pixels_and_ids_depart_from_transformers(transformers):
    model = load_model(TINY["qwen2_vl"])
    config = model.processor.config
    wrong = replace(model.processor, config=replace(config, mean=(0.5, 0.5, 0.5)))
    assert departed(vlmfx.verify(replace(model, processor=wrong), against="transformers")) == "pixels"
    wrong = replace(model.processor, config=replace(config, max_pixels=32 * 28 * 28))
    assert departed(vlmfx.verify(replace(model, processor=wrong), against="transformers")) == "ids"


@pytest.mark.parametrize("is_known", [True, False])
def test_code_of_a_checkpoint_is_not_run(is_known, tmp_path, transformers, monkeypatch):
    """Not even where transformers, left alone, would ask on stdin and be answered yes."""
    skip_what_is_too_old(transformers, "llava")
    folder, marker = tmp_path / "model", tmp_path / "was-run"
    shutil.copytree(TINY["llava"], folder)
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n", encoding="utf-8")
    names = ("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoProcessor")
    auto_map = {**dict.fromkeys(names, "evil.Evil"), "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        config = json.loads((folder / file).read_text(encoding="utf-8")) | {"auto_map": auto_map}
        if not is_known:
            config.pop("tokenizer_class", None)
            config.pop("model_type", None)
        (folder / file).write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    model = replace(load_model(TINY["llava"]), name=str(folder))
    with suppress(vlmfx.VlmfxError):
        vlmfx.verify(model, against="transformers")
    assert not marker.exists()


def test_pickled_weights_are_not_read(tmp_path, transformers):
    skip_what_is_too_old(transformers, "llava")
    folder = tmp_path / "model"
    shutil.copytree(TINY["llava"], folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    model = replace(load_model(TINY["llava"]), name=str(folder))
    with pytest.raises(CheckpointError, match=r"safetensors.*use --golden DIR"):
        vlmfx.verify(model, against="transformers")


# What cannot be compared is told in a sentence.


def test_families_with_remote_code_want_goldens(tmp_path):
    for name in ("Phi3VForCausalLM", "MiniCPMV"):
        shutil.copytree(TINY["llava"], tmp_path / name)
        config = json.loads((TINY["llava"] / "config.json").read_text(encoding="utf-8"))
        (tmp_path / name / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
        model = replace(load_model(TINY["llava"]), name=str(tmp_path / name))
        with pytest.raises(InvalidRequest, match=f"{name} with code from the checkpoint.*--golden DIR"):
            vlmfx.verify(model, against="transformers")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, 'pass either golden=DIR or against="transformers"'),
        ({"golden": COMMITTED, "against": "transformers"}, "pass either"),
        ({"against": "a friend"}, "pass either"),
        ({"golden": COMMITTED, "prompt": "What?"}, "leave out prompt and images"),
        ({"golden": Path("no/such")}, "holds no golden.json"),
        ({"golden": COMMITTED / "models"}, "holds no golden.json"),
        ({"against": "transformers", "images": ["no/such.png"]}, "no/such.png"),
    ],
)
def test_a_wrong_call_is_told(arguments, says):
    with pytest.raises(InvalidRequest, match=says):
        vlmfx.verify(load_model(TINY["llava"]), **arguments)


def test_goldens_of_other_models_are_told(tmp_path):
    shutil.copytree(TINY["llava"], tmp_path / "mine")
    with pytest.raises(InvalidRequest, match="none of mine; give one case's folder") as caught:
        vlmfx.verify(tmp_path / "mine", golden=COMMITTED)
    assert "llava-b" in str(caught.value)
    assert vlmfx.verify(tmp_path / "mine", golden=COMMITTED / LLAVA, device="cpu").is_ok


def test_a_broken_golden_or_model_is_told(tmp_path, copy):
    model, case = copy(LLAVA)
    (case / "golden.json").write_text("{")
    with pytest.raises(InvalidRequest, match=r"is no golden\.json"):
        vlmfx.verify(model, golden=case)
    with pytest.raises(CheckpointError):
        vlmfx.verify(tmp_path / "case", golden=COMMITTED / LLAVA)


@pytest.mark.parametrize("file", ["golden.safetensors", "input/prompt.txt"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"\xff\xfe\xff")])
def test_a_golden_with_a_file_lost_or_damaged_is_told(file, damage, copy):
    model, case = copy(LLAVA)
    damage(case / file)
    with pytest.raises(InvalidRequest, match=rf"^golden: .*{file} cannot be read .*; restore the file\.$"):
        vlmfx.verify(model, golden=case, device="cpu")


# The command line.


def test_the_command_prints_a_table_and_its_status_tells(copy, capsys):
    model, case = copy(QWEN)
    command = ["verify", str(model), "--golden", str(case), "--device", "cpu"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    assert rows[2][1:] == ["stage", "value", "shape", "largest", "where", "tolerance", "ok"]
    assert [row[1] for row in rows[3:-2]] == sorted((row[1] for row in rows[3:-2]), key=list(STAGES).index)
    assert lines[-1].startswith("No stage departs: ")
    edit_weight("visual.merger.mlp.0.bias", at(0, 5.0))(model, case)
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "DEPARTS" in captured.out
    assert captured.out.splitlines()[-1].startswith(
        "first departs: projected (image_embeds of case, largest difference"
    )
    assert captured.err == ""
    assert main(["verify", str(model)]) == 1
    assert capsys.readouterr().err.startswith("vlmfx: against: pass either")


# One comparison, by hand.


def one(mine: Tensor, theirs: Tensor, name: str = "last_logits", **options: Any) -> Any:
    return compare("", "logits", name, mine, theirs, is_narrow=False, **options)


def test_the_largest_difference_is_found_where_it_is():
    theirs = torch.zeros(2, 3, 4)
    mine = theirs.clone()
    mine[1, 2, 0], mine[0, 1, 3] = 1e-3, -1.5e-3
    row = one(mine, theirs)
    assert (row.is_ok, row.where) == (True, (0, 1, 3))
    assert row.largest == pytest.approx(1.5e-3)
    mine[1, 0, 2] = 0.5
    row = one(mine, theirs)
    assert (row.is_ok, row.where, row.largest) == (False, (1, 0, 2), 0.5)
    assert row.note == "found 0.5, expected 0"


def test_where_names_what_is_beyond_the_tolerance_not_what_is_large():
    theirs = torch.tensor([1000.0, 1.0])
    row = one(theirs + torch.tensor([0.9, 0.5]), theirs)  # 0.9 is within 2e-3 + 1e-3 · 1000
    assert (row.is_ok, row.where) == (False, (1,))
    assert row.largest == pytest.approx(0.9, abs=1e-4)


def test_sampled_values_are_told_by_their_place_in_the_whole():
    theirs = torch.arange(12.0)[::5]  # 0, 5, 10 of shape (3, 4)
    mine = torch.arange(12.0).view(3, 4)
    sample = Sample(shape=(3, 4), step=5)
    assert one(mine, theirs, sample=sample).is_ok
    mine[2, 2] += 1
    assert one(mine, theirs, sample=sample).where == (2, 2)
    assert one(mine.flatten(), theirs, sample=sample).is_ok is False  # the shape is the whole's, not the sample's


def test_integers_are_exact_and_the_first_that_differs_is_named():
    theirs = torch.tensor([[1, 2, 3, 4]])
    row = one(torch.tensor([[1, 2, 4, 900]]), theirs, name="input_ids")
    assert (row.is_ok, row.where, row.tolerance) == (False, (0, 2), "exact")
    row = one(torch.tensor([[1, 2, 3]]), theirs, name="input_ids")
    assert (row.is_ok, row.where, row.note) == (False, (3,), "its shape is 1×3, the reference's 1×4")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite(value):
    theirs = torch.tensor([1.0, value])
    assert one(theirs.clone(), theirs).is_ok
    assert one(torch.tensor([1.0, 2.0]), theirs).is_ok is False
    assert one(theirs, torch.tensor([1.0, 2.0])).is_ok is False


def test_nothing_is_equal_to_nothing():
    assert one(torch.empty(0, 3), torch.empty(0, 3)).is_ok
    assert one(torch.empty(0, 3), torch.zeros(1, 3)).is_ok is False
