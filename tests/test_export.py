"""export and bundles: what a bundle answers, that it does so with no compiler in the process, and what is refused in one sentence.

Three programs are compiled, once, for all tests; those of other families and of embeddings are slow tests."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vlmfx
from tests.compile.functions import needs_compiler
from tests.golden_cases import EVERY, TINY
from tests.invariants import is_one_sentence
from tests.pictures import about, picture
from vlmfx import checkpoint, export_jobs
from vlmfx import export as module
from vlmfx.compile import host as hosts
from vlmfx.compile.buckets import Plan
from vlmfx.compile.bundle import read as read_bundle
from vlmfx.compile.bundle import sha256
from vlmfx.errors import CheckpointError, CompileError, InvalidRequest, PlanError, VlmfxError
from vlmfx.export import export

MODEL = TINY["qwen2_vl"]
PLAN = Plan(encode=(256,), prefill=(128,), decode=(2,), max_segments=3, max_seqs=2)
OPTIONS: dict[str, Any] = {
    "plan": PLAN, "device": "cpu", "dtype": "float32", "max_model_len": 160, "max_num_seqs": 2, "use_tqdm": False,
}  # fmt: skip
GREEDY = vlmfx.SamplingParams.greedy(max_tokens=6, ignore_eos=True)
ROOT = Path(__file__).resolve().parents[1]

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle, not to be changed."""
    folder = tmp_path_factory.mktemp("export") / "bundle"
    export(MODEL, folder, jobs=2, copy_weights=True, **OPTIONS)
    return folder


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def prompts() -> list[Any]:
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    return [
        {"prompt": f"{mark}What is it?", "multi_modal_data": {"image": picture(56, 28)}},
        "Some words",
        {"prompt": f"{mark}{mark}Two of them", "multi_modal_data": {"image": [picture(28, 28), picture(84, 56)]}},
    ]


def ids(outputs: list[vlmfx.RequestOutput]) -> list[list[int]]:
    assert [o.error for o in outputs] == [None] * len(outputs)
    return [list(o.outputs[0].token_ids) for o in outputs]


def assert_same_logprobs(one: vlmfx.RequestOutput, other: vlmfx.RequestOutput) -> None:
    mine, expected = one.outputs[0].logprobs, other.outputs[0].logprobs
    assert mine is not None
    assert expected is not None
    for by_id, expected_by_id in zip(mine, expected, strict=True):
        assert {i: p.rank for i, p in by_id.items()} == {i: p.rank for i, p in expected_by_id.items()}
        assert {i: p.logprob for i, p in by_id.items()} == pytest.approx(
            {i: p.logprob for i, p in expected_by_id.items()}, abs=1e-4
        )


def test_a_bundle_answers_as_the_model_does(made):
    """Together, so that rows are padded, filled and moved; and drawn, with log-probabilities."""
    drawn = [vlmfx.SamplingParams(temperature=1.0, top_p=0.9, seed=i, max_tokens=6, ignore_eos=True) for i in range(3)]
    model, compiled = vlmfx.LLM(str(MODEL), max_model_len=128, dtype="float32", device="cpu"), vlmfx.LLM(str(made))
    for params in ([GREEDY, replace(GREEDY, max_tokens=3), GREEDY], drawn, [drawn[0], GREEDY, drawn[2]]):
        expected = ids(model.generate(prompts(), params, use_tqdm=False))
        assert ids(compiled.generate(prompts(), params, use_tqdm=False)) == expected
    for one_for_all in (replace(GREEDY, logprobs=2), replace(drawn[0], logprobs=0)):
        mine, eager = (llm.generate(prompts(), one_for_all, use_tqdm=False) for llm in (compiled, model))
        assert ids(mine) == ids(eager)
        for one, other in zip(mine, eager, strict=True):
            assert_same_logprobs(one, other)
    assert compiled.compiles == (0, 0, 0)
    assert compiled.executor.memory().num_programs == 3


RUN = """
import json, sys
import vlmfx
outputs = vlmfx.generate(sys.argv[1], "Some words", vlmfx.SamplingParams.greedy(max_tokens=6, ignore_eos=True))
print(json.dumps([m for m in sys.modules if m.startswith(("torch._dynamo", "torch._inductor", "triton"))]))
print(json.dumps(list(outputs[0].outputs[0].token_ids)))
"""


def test_no_compiler_is_imported(made):
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(made)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    modules, tokens = map(json.loads, run.stdout.splitlines())
    assert modules == []
    assert [tokens] == ids(vlmfx.generate(str(MODEL), "Some words", GREEDY, dtype="float32", device="cpu"))


def test_what_is_beyond_the_plan_runs_uncompiled_or_is_refused(made):
    """Images of 400 patches where the plan has 256; decode is compiled all the same."""
    model = vlmfx.LLM(str(MODEL), max_model_len=160, dtype="float32", device="cpu")
    large = {"prompt": "<|vision_start|><|image_pad|><|vision_end|>", "multi_modal_data": {"image": picture(280, 280)}}
    long, few = {"prompt_token_ids": [5] * 140}, replace(GREEDY, max_tokens=3)
    some = [large, {"prompt_token_ids": [5] * 120}, long, prompts()[0]]
    expected = ids(model.generate(some, few, use_tqdm=False))
    compiled = vlmfx.LLM(str(made))
    assert ids(compiled.generate(some, few, use_tqdm=False)) == expected
    assert compiled.compiles == (0, 0, 0)
    strict = vlmfx.LLM(str(made), strict=True)
    with pytest.warns(UserWarning, match=r"1 of 4 prompts failed"):
        outputs = strict.generate(some, few, use_tqdm=False)
    error = outputs[0].error
    assert isinstance(error, InvalidRequest)
    assert "it has 400 patches, but the plan's largest encode program takes 256; make it smaller" in str(error)
    assert is_one_sentence(error)
    assert ids(outputs[1:]) == expected[1:], "a prompt that is longer than a bucket goes in parts"


def test_an_export_goes_on_from_what_is_there(bundle, monkeypatch):
    """After an interrupt, and after another plan: what is there is used, what is not used any more goes."""
    before = json.loads((bundle / "bundle.json").read_text())
    packages = {name: bundle / file for name, file in before["programs"].items()}
    kept = packages["decode-2"].read_bytes()
    packages["decode-2"].unlink()
    (bundle / "bundle.json").unlink()
    (bundle / "programs" / "encode-4-0123456789ab.pt2").write_bytes(b"of an earlier plan")
    (bundle / "programs" / "thesis.pt2").write_bytes(b"of the user's")

    def interrupted(todo, jobs):
        assert [job.name for job in todo] == ["decode"]
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(module, "compiled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(MODEL, bundle, copy_weights=True, **OPTIONS)
    assert not (bundle / "bundle.json").exists()
    assert "its export was not finished; run `vlmfx export` to that folder again." in refused(bundle)

    def one(todo, jobs):
        assert [job.name for job in todo] == ["decode"]
        Path(todo[0].file).write_bytes(kept)
        yield from todo

    monkeypatch.setattr(module, "compiled", one)
    export(MODEL, bundle, copy_weights=True, **OPTIONS)
    assert json.loads((bundle / "bundle.json").read_text()) == before
    assert set((bundle / "programs").iterdir()) == {*packages.values(), bundle / "programs" / "thesis.pt2"}


class Stopped(Exception):
    pass


def would_compile(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[str]:
    """The programs that an export would compile; where there are some, it stops before."""
    names: list[str] = []

    def noted(todo, jobs):
        names.extend(job.name for job in todo)
        if names:
            raise Stopped
        return iter(())

    with monkeypatch.context() as patch:
        patch.setattr(module, "compiled", noted)
        with suppress(Stopped):
            export(model, out, **{**OPTIONS, **options})
    return names


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the model."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_programs_are_compiled_again_where_what_they_compute_changes(bundle, source, monkeypatch):
    """Which neither a tokenizer nor a template does."""
    for name in ("tokenizer.json", "chat_template.json", "generation_config.json"):
        (source / name).write_text((source / name).read_text() + " ")
    (source / "notes.txt").write_text("new")
    assert would_compile(source, bundle, monkeypatch) == []
    assert vlmfx.LLM(str(bundle)).model.bundle is not None
    for name in ("config.json", "preprocessor_config.json"):
        text = (source / name).read_text()
        (source / name).write_text(json.dumps(json.loads(text) | {"new": 1}))
        assert would_compile(source, bundle, monkeypatch) == ["encode", "prefill", "decode"]
        (source / name).write_text(text)
    assert would_compile(source, bundle, monkeypatch) == []


@pytest.mark.parametrize(
    ("changed", "is_other"),
    [("processing/qwen2_vl.py", True), ("export_jobs.py", True), ("ops/norm.py", True), ("engine/engine.py", False)],
)
def test_programs_depend_on_the_code_that_makes_them(made, tmp_path, monkeypatch, changed, is_other):
    package = tmp_path / "vlmfx"
    for name in (*module._MODULES, "processing/qwen2_vl.py", "ops/norm.py", "engine/engine.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("before")
    monkeypatch.setattr(module, "__file__", str(package / "export.py"))
    blueprint, found = checkpoint.blueprint(MODEL), read_bundle(made)
    before = module._stamp(found, blueprint)
    (package / changed).write_text("after")
    assert (module._stamp(found, blueprint) != before) == is_other


def test_exports_with_weights_by_reference_use_the_packages_that_are_there(made, source, tmp_path, monkeypatch):
    """Begun, as far as packages go; the weights stay where they are."""
    out = tmp_path / "out"
    shutil.copytree(made / "programs", out / "programs")
    assert would_compile(source, out, monkeypatch) == []
    assert json.loads((out / "bundle.json").read_text())["weights"] == str(source)
    assert not any(out.glob("*.safetensors"))
    model = vlmfx.LLM(str(MODEL), max_model_len=160, dtype="float32", device="cpu")
    expected = ids(model.generate(prompts(), GREEDY, use_tqdm=False))
    assert ids(vlmfx.generate(str(out), prompts(), GREEDY, use_tqdm=False)) == expected


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("name", ["config.json", "notes", "bundle.json", "programs/decode.py", "programs-1/x"])
def test_a_folder_of_other_files_is_refused_and_left_as_it_is(tmp_path, monkeypatch, name):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text('{"hashes": 1}')
    before = contents(out)
    with pytest.raises(InvalidRequest, match=r"^out: .* has files that no export wrote .*; choose a new or") as caught:
        would_compile(MODEL, out, monkeypatch)
    assert is_one_sentence(caught.value)
    assert contents(out) == before


def test_a_model_is_not_exported_into_its_own_folder(source, monkeypatch):
    with pytest.raises(InvalidRequest, match=r"^out: "):
        would_compile(source, source, monkeypatch)


@pytest.mark.parametrize("begun", ["", "programs/decode-2-0123456789ab.pt2.77.part"])
def test_an_empty_folder_and_a_begun_export_are_written_to(tmp_path, monkeypatch, begun):
    (tmp_path / "out" / "programs").mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text("of the export")
    if begun:
        (tmp_path / "out" / begun).write_bytes(b"part")
    assert would_compile(MODEL, tmp_path / "out", monkeypatch) == ["encode", "prefill", "decode"]


def test_files_of_an_earlier_export_go_with_the_model_s_and_others_are_refused(bundle, source, monkeypatch):
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "extra").mkdir()
    (source / "extra" / "config.json").write_text("{}")
    assert would_compile(source, bundle, monkeypatch, copy_weights=True) == []
    assert {"chat_template.jinja", "extra/config.json"} <= {*read_bundle(bundle).hashes}
    (source / "chat_template.jinja").unlink()
    (source / "extra" / "config.json").unlink()
    (source / "model.safetensors").rename(source / "other.safetensors")
    assert would_compile(source, bundle, monkeypatch, copy_weights=True) == []
    assert not any((bundle / name).exists() for name in ("chat_template.jinja", "extra/config.json"))
    assert [p.name for p in bundle.glob("*.safetensors")] == ["other.safetensors"]
    vlmfx.LLM(str(bundle))
    (bundle / "notes.txt").write_text("of the user's")
    with pytest.raises(InvalidRequest, match=r"^out: .* has notes.txt, which the model has not .*; delete") as caught:
        would_compile(source, bundle, monkeypatch)
    assert is_one_sentence(caught.value)
    assert (bundle / "notes.txt").exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("ld: No space left on device")]
)
def test_a_disk_that_is_full_while_a_program_is_compiled_is_told_as_such(tmp_path, monkeypatch, error):
    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(export_jobs, "jit", full)
    monkeypatch.setattr(module, "compiled", lambda todo, jobs: map(export_jobs.compile_job, todo))
    with pytest.raises(CompileError, match=r"^encode-256: .*No space left .*; make room on the disk and run") as caught:
        export(MODEL, tmp_path / "out", **OPTIONS)
    assert is_one_sentence(caught.value)


def test_another_plan_s_kernels_are_in_another_folder(tmp_path, monkeypatch):
    """On a GPU that is made up, for which nothing is compiled."""
    for name, value in {
        "is_available": True, "device_count": 1, "get_device_name": "none", "get_device_capability": (9, 0),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)

    def written(todo, jobs):
        for job in todo:
            Path(job.file).write_bytes(b"package")
            yield job

    def gathered(jobs, folder):
        (folder / "key").mkdir(parents=True)
        (folder / "key" / "kernel.cubin").write_text(str([job.name for job in jobs]))

    monkeypatch.setattr(module, "compiled", written)
    monkeypatch.setattr(module, "gather_kernels", gathered)
    out, options = tmp_path / "out", OPTIONS | {"device": "cuda"}
    first, again = (export(MODEL, out, **options) for _ in range(2))
    assert first.kernels == again.kernels
    second = export(MODEL, out, **{**options, "plan": replace(PLAN, decode=(1, 2))})
    assert second.kernels != first.kernels
    assert [p.name for p in out.glob("kernels-*")] == [second.kernels]
    assert f"{second.kernels}/key/kernel.cubin" in second.hashes


def test_a_full_disk_leaves_no_bundle(made, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CompileError, match=r"the bundle cannot be written \(No space left on device\)") as caught:
        export(MODEL, tmp_path / "out", **OPTIONS)
    assert is_one_sentence(caught.value)
    assert not (tmp_path / "out" / "bundle.json").exists()
    with pytest.raises(CompileError, match=r"cannot be written \(Not a directory\)"):
        export(MODEL, made / "bundle.json" / "out", **OPTIONS)


def test_an_unwritable_cache_is_told_before_anything_is_compiled(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(CompileError, match=r"cannot be written \(Not a directory\); set TORCHINDUCTOR_CACHE_DIR"):
        export(MODEL, tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def changed(bundle: Path, **fields: Any) -> None:
    value = json.loads((bundle / "bundle.json").read_text())
    value["host"] |= fields.pop("host", {})
    (bundle / "bundle.json").write_text(json.dumps(value | fields))


def refused(bundle: Path, **options: Any) -> str:
    with pytest.raises(VlmfxError) as caught:
        vlmfx.LLM(str(bundle), **options)
    assert is_one_sentence(caught.value), str(caught.value)
    return str(caught.value)


def test_a_bundle_of_another_torch_processor_or_gpu_is_refused(bundle, monkeypatch):
    changed(bundle, host={"torch_version": "2.99"})
    assert f"it was built for torch 2.99 but this machine has {torch.__version__}" in refused(bundle)
    changed(bundle, host={"torch_version": str(torch.__version__), "flags": ["avx512_none"]})
    assert "it was built for processors with avx512_none, which this one lacks; export it again here." in refused(
        bundle
    )
    changed(bundle, host={"flags": [], "machine": "sparc"})
    assert "it was built for processors of type sparc but this machine has" in refused(bundle)
    here = hosts.Host.of(torch.device("cpu")).machine
    changed(bundle, host={"machine": here, "device": "cuda", "device_name": "NVIDIA T1000", "capability": [7, 5]})
    assert "it was built for GPU NVIDIA T1000 but this machine has" in refused(bundle)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, 'the bundle was exported for dtype "float32" but dtype is "bfloat16"; leave it out'),
        ({"dtype": torch.float16}, 'exported for dtype "float32" but dtype is "float16"'),
        ({"device": "cuda"}, 'exported for device "cpu" but device is "cuda"'),
        ({"task": "embed"}, 'exported for task "generate" but task is "embed"'),
        (
            {"max_model_len": 161},
            "max_model_len: it is 161, expected at most 160, as long as sequences of the bundle get",
        ),
        ({"plan": PLAN}, "plan: a bundle has its own"),
        ({"max_num_seqs": 0}, "max_num_seqs: "),
    ],
)
def test_options_that_ask_for_another_program_are_refused(made, options, message):
    assert message in refused(made, **options)


def test_altered_and_missing_files_are_refused(bundle, made):
    def restore(path: Path) -> None:
        shutil.copyfile(made / path.relative_to(bundle), path)

    package = next((bundle / "programs").glob("decode-*"))
    whole = package.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        package.write_bytes(content)
        assert f"programs/{package.name} was altered or cut since the export; export it again." in refused(bundle)
    package.unlink()
    assert f"programs/{package.name} cannot be read (No such file or directory)" in refused(bundle)
    restore(package)
    config = bundle / "config.json"
    config.write_text(config.read_text().replace("1e-06", "1e-05"))
    assert "config.json was altered or cut since the export" in refused(bundle)
    restore(config)
    weights = bundle / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "model.safetensors has " in refused(bundle)
    weights.unlink()
    assert "model.safetensors is gone; put it back, or export it again with copied weights." in refused(bundle)
    restore(weights)
    for text in (
        "",
        "{}",
        "[]",
        '{"format": 2}',
        (bundle / "bundle.json").read_text().replace('"prefill": [', '"prefill": [64,'),
    ):
        (bundle / "bundle.json").write_text(text)
        assert "bundle.json" in refused(bundle)


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "added_tokens.json", "vocab.txt", "tokenizer.model", "2_Pooling/config.json",
     "model.safetensors.index.json", "more.safetensors"],
)  # fmt: skip
def test_files_that_the_bundle_does_not_list_are_refused(bundle, name):
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("{}")
    assert f"{name} is not listed in bundle.json; delete it, or put it into the model's folder and" in refused(bundle)
    (bundle / name).unlink()
    (bundle / "README.md").write_text("Nothing reads it.")
    vlmfx.LLM(str(bundle))


def test_kernels_that_the_bundle_does_not_list_are_refused(bundle, tmp_path):
    kernels = "kernels-0123456789ab"
    (bundle / kernels / "key").mkdir(parents=True)
    (bundle / kernels / "key" / "a.cubin").write_text("code")
    value = json.loads((bundle / "bundle.json").read_text())
    hashes = value["hashes"] | {f"{kernels}/key/a.cubin": sha256(bundle / kernels / "key" / "a.cubin")}
    changed(bundle, kernels=kernels, hashes=hashes)
    assert read_bundle(bundle).kernels == kernels
    (bundle / kernels / "key" / "b.cubin").write_text("more")
    assert f"{kernels}/key/b.cubin is not listed in bundle.json" in refused(bundle)
    (bundle / kernels / "key" / "b.cubin").rename(tmp_path / "b.cubin")
    (bundle / kernels / "other").symlink_to(tmp_path, target_is_directory=True)
    assert f"{kernels}/other is not listed in bundle.json" in refused(bundle)


def test_a_bundle_of_a_cpu_runs_there_on_a_machine_with_a_gpu_too(made, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("auto", None):
        assert vlmfx.LLM(str(made), device=device).model.device == torch.device("cpu")


def test_weights_by_reference_must_be_those_of_the_export(bundle, source):
    changed(bundle, weights=str(source))
    (bundle / "model.safetensors").unlink()
    vlmfx.LLM(str(bundle))
    config = source / "config.json"
    config.write_text(config.read_text() + " ")
    assert "config.json was altered or cut since the export" in refused(bundle)


def test_a_bundle_in_the_hubs_cache_is_refused(bundle, tmp_path):
    cached = tmp_path / "hub" / "models--org--name" / "snapshots" / "0123"
    cached.parent.mkdir(parents=True)
    shutil.move(bundle, cached)
    message = refused(cached)
    assert "holds a bundle (bundle.json), which is a program and is never run from a hub or its cache" in message


def test_a_bundle_is_not_exported_again(made, tmp_path):
    with pytest.raises(CheckpointError, match=r"is a bundle already; export the model that it is of\.$"):
        export(made, tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"plan": replace(PLAN, decode=())}, PlanError, "it has no rungs for decode, which the task needs"),
        (
            {"plan": replace(PLAN, encode=(6,))},
            PlanError,
            "encode has a rung of 6 patches, expected multiples of 4",
        ),
        ({"plan": "nowhere.json"}, PlanError, "plan: nowhere.json cannot be read (No such file or directory"),
        (
            {"march": "core2"},
            CompileError,
            "march is 'core2' but must be one of native, x86-64-v2, x86-64-v3, x86-64-v4",
        ),
        ({"jobs": 0}, InvalidRequest, "jobs: it is 0; use a whole number of 1 or more."),
        *(
            ({"max_num_seqs": n}, InvalidRequest, f"max_num_seqs: it is {n}; use a whole number of 1 or more.")
            for n in (0, -1, True, 2.0, None)
        ),
        ({"task": "talk"}, InvalidRequest, "task: it is 'talk'"),
    ],
)
def test_what_cannot_be_exported_is_told_before_anything_is_compiled(tmp_path, options, error, message):
    with pytest.raises(error) as caught:
        export(MODEL, tmp_path / "out", **{**OPTIONS, **options})
    assert message in str(caught.value)
    assert is_one_sentence(caught.value)
    assert not (tmp_path / "out" / "bundle.json").exists()


def test_a_default_plan_reaches_as_far_as_the_cache():
    blueprint = checkpoint.blueprint(MODEL, max_model_len=128)
    plan = module._plan(None, blueprint, "generate", 4, 128)
    assert (plan.prefill[-1], plan.decode[-1], plan.max_seqs, plan.pool) == (512, 4, 4, ())
    assert all(size % blueprint.programs.config.vision.patch_multiple == 0 for size in plan.encode)
    assert plan.num_graphs <= 48


@pytest.mark.slow
@pytest.mark.skipif(not set(hosts.MARCHES["x86-64-v3"][0]) <= hosts.cpu_flags(), reason="no processor of x86-64-v3")
def test_a_bundle_for_a_level_of_processors_needs_and_uses_no_more(tmp_path):
    export(MODEL, tmp_path, march="x86-64-v3", **OPTIONS)
    found = json.loads((tmp_path / "bundle.json").read_text())["host"]
    assert (found["march"], found["flags"]) == ("x86-64-v3", sorted(hosts.MARCHES["x86-64-v3"][0]))
    model = vlmfx.LLM(str(MODEL), max_model_len=160, dtype="float32", device="cpu")
    expected = ids(model.generate(prompts(), GREEDY, use_tqdm=False))
    assert ids(vlmfx.generate(str(tmp_path), prompts(), GREEDY, use_tqdm=False, strict=True)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("family", EVERY)
def test_a_bundle_of_every_family_answers_as_the_model_does(family, tmp_path):
    model = vlmfx.LLM(str(EVERY[family]), dtype="float32", device="cpu", max_model_len=2048)
    multiple = model.model.config.vision.patch_multiple
    plan = replace(PLAN, encode=(-(-6144 // multiple) * multiple,), prefill=(2048,), max_segments=64)
    export(EVERY[family], tmp_path, **{**OPTIONS, "plan": plan, "max_model_len": 2048})
    some = [about(model.model, picture(70, 40)), "Some words", about(model.model, picture(40, 90))]
    assert ids(vlmfx.generate(str(tmp_path), some, GREEDY, use_tqdm=False, strict=True)) == ids(
        model.generate(some, GREEDY, use_tqdm=False)
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_bundle_embeds_as_the_model_does(family, tmp_path):
    model = vlmfx.LLM(str(TINY[family]), dtype="float32", device="cpu", task="embed")
    multiple = model.model.config.vision.patch_multiple
    plan = replace(PLAN, encode=(-(-512 // multiple) * multiple,), pool=(256,))
    export(TINY[family], tmp_path, **{**OPTIONS, "plan": plan, "task": "embed"})
    some = [about(model.model, picture(70, 40)), "Some words", about(model.model, picture(40, 90))]
    mine = vlmfx.embed(str(tmp_path), some, use_tqdm=False, strict=True)
    torch.testing.assert_close(mine, vlmfx.embed(model, some, use_tqdm=False), atol=1e-5, rtol=0)
