"""Replay: what was recorded happens again, step by step and token by token, and what does not is told."""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden_cases import EVERY, TINY, load_model
from tests.pictures import about, mixed, picture
from vlmfx import LLM, InvalidRequest, SamplingParams
from vlmfx.cli import main
from vlmfx.compile.executor import EagerExecutor
from vlmfx.engine.recording import tensors_folder
from vlmfx.engine.structured_outputs import StructuredOutputsParams
from vlmfx.errors import DeadlineExceeded
from vlmfx.replay import replay

GREEDY = SamplingParams.greedy(max_tokens=10, ignore_eos=True)
TIGHT: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 40, "async_scheduling": True}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def changed(path: Path, change: Callable[[dict[str, Any]], bool]) -> None:
    """Change the first line for which `change` says that it did."""
    lines = lines_of(path)
    assert any(map(change, lines))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def ran_again(path: Path, **options: Any) -> Any:
    return replay(path, use_tqdm=False, **options)


def answered(llm: LLM, prompts: list[Any], *params: SamplingParams) -> None:
    """All requests are there before the first step, with seeds that are no chance's, so that each run is the same; params take turns."""
    for request in [llm.request(n, prompt, params[n % len(params)]) for n, prompt in enumerate(prompts)]:
        llm.engine.add(replace(request, seed=request.number))
    while llm.engine.has_work:
        llm.engine.step()
    assert not llm.engine.counters.num_failed


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Twice the same three requests, on a tiny model."""
    path = tmp_path / "run.jsonl"
    folder = TINY["qwen2_vl"]
    llm = LLM(folder, dtype="float32", record=path)
    for _ in range(2):
        answered(llm, mixed(llm.model)[:3], GREEDY)
    return path


@pytest.mark.parametrize("family", EVERY)
def test_a_tight_run_of_mixed_requests_happens_again(family, tmp_path):
    path, model = tmp_path / "run.jsonl", load_model(EVERY[family])
    prompts = mixed(model)
    num_blocks = max(-(-(LLM(model).count_tokens(p) + 10) // 16) for p in prompts)
    llm = LLM(EVERY[family], dtype="float32", num_gpu_blocks_override=num_blocks, record=path, **TIGHT)
    drawn = SamplingParams(n=2, temperature=1.0, max_tokens=10, ignore_eos=True, logprobs=2)
    answered(llm, prompts, GREEDY, drawn)
    assert llm.engine.counters.num_preempted, "the run is to be a hard one"
    again = ran_again(path)
    assert not again.differences
    assert again.num_steps == llm.engine.counters.num_steps
    assert again.num_requests == len(prompts)
    assert not ran_again(path, alone=True).differences


def test_aborts_deadlines_resets_rules_and_ready_embeddings_are_recorded(tmp_path):
    path, model = tmp_path / "run.jsonl", load_model(TINY["qwen2_vl"])
    llm = LLM(TINY["qwen2_vl"], dtype="float32", record=path)
    hidden = model.config.text.hidden_size
    embeds = {"image_embeds": torch.randn(6, hidden), "image_grid_thw": torch.tensor([[1, 4, 6]])}
    ready = about(model, picture(60, 40)) | {"multi_modal_data": {"image": embeds}}
    form = StructuredOutputsParams(regex="[a-c]{4}")
    params = [
        GREEDY,
        SamplingParams.greedy(max_tokens=8, structured_outputs=form),
        SamplingParams(max_tokens=8, repetition_penalty=1.3, logit_bias={5: 2.0}, stop=["zzz"]),
    ]
    requests = [llm.request(n, p, q) for n, (p, q) in enumerate(zip([ready, "Say", "Go on"], params, strict=True))]
    late = replace(llm.request(3, "Too late", SamplingParams.greedy(max_tokens=500, ignore_eos=True)), deadline=1e12)
    for request in (*requests, late):
        llm.engine.add(request)
    for step in range(6):
        llm.engine.step()
        if step == 2:
            llm.engine.abort(0)
        if step == 3:
            llm.engine.end(late, DeadlineExceeded("it took too long."))
    while llm.engine.has_work:
        llm.engine.step()
    assert llm.reset_prefix_cache()
    kinds = [next(iter(line)) for line in lines_of(path)]
    assert {"request", "step", "drawn", "end", "reset"} <= set(kinds)
    assert not ran_again(path).differences
    assert not ran_again(path, alone=True).differences


def test_vectors_happen_again(tmp_path):
    path = tmp_path / "run.jsonl"
    llm = LLM(TINY["qwen2_vl"], dtype="float32", task="embed", record=path)
    llm.embed(mixed(llm.model), use_tqdm=False)
    again = ran_again(path)
    assert not again.differences
    assert again.num_requests == len(mixed(llm.model))

    turned = []

    def turn(line: dict[str, Any]) -> bool:
        if "vectors" in line:
            number, vector = line["vectors"][-1]
            vector[0] += 0.5
            turned.append(number)
        return "vectors" in line

    changed(path, turn)
    assert ran_again(path).differences == (f"vectors: that of request {turned[0]} is off by 0.5",)


def test_the_first_step_that_goes_another_way_is_named(recording, monkeypatch):
    lines = lines_of(recording)
    at = [n for n, line in enumerate(lines) if "drawn" in line][7]
    step, count = EagerExecutor.step, iter(range(1000))

    def spoil(self: Any, inputs: Any, cache: Any) -> Any:
        ids, logits = step(self, inputs, cache)
        return (ids + 1 if next(count) == 7 else ids), logits

    monkeypatch.setattr(EagerExecutor, "step", spoil)
    (difference,) = ran_again(recording).differences
    number, index, token = lines[at]["drawn"][0]
    assert difference == (
        f"step {lines[at]['of']}: text {index} of request {number} draws {token + 1}, "
        f"recorded is {token} of text {index} of request {number}"
    )


def test_a_step_that_fails_is_told(recording, monkeypatch):
    step, count = EagerExecutor.step, iter(range(1000))

    def fail(self: Any, inputs: Any, cache: Any) -> Any:
        if next(count) >= 4:
            raise RuntimeError("out of memory")
        return step(self, inputs, cache)

    monkeypatch.setattr(EagerExecutor, "step", fail)
    (difference,) = ran_again(recording).differences
    assert difference.startswith("step 4: {'failed': [0, 1, 2], 'of': 4}, but recorded is {'drawn':")


def test_what_was_planned_otherwise_is_told(recording):
    def halve(line: dict[str, Any]) -> bool:
        if line.get("step") != 0:
            return False
        line["prefill"][0][3] -= 1
        return True

    changed(recording, halve)
    (difference,) = ran_again(recording).differences
    assert difference.startswith("step 0: prefill [[")
    changed(recording, lambda line: bool(line.pop("prefill", None)) and not line.update(prefill=[[9, 9, 0, 1, 1]]))
    assert "recorded [[9, 9, 0, 1, 1]]" in ran_again(recording).differences[0]


def test_requests_run_alone_are_held_beside_what_was_recorded(recording):
    assert not ran_again(recording, alone=True).differences

    def spoil(line: dict[str, Any]) -> bool:
        if line.get("of") != 3 or "drawn" not in line:
            return False
        line["drawn"][1][2] += 1
        return True

    changed(recording, spoil)
    (difference,) = ran_again(recording, alone=True).differences
    assert difference.startswith("text 0 of request 1 draws alone")
    assert "at place 3, recorded is" in difference


def test_another_dtype_or_backend_may_be_asked_for(recording):
    assert lines_of(recording)[0]["options"]["dtype"] == "float32"
    assert ran_again(recording, backend="eager").num_requests == 3
    assert not ran_again(recording, device="cpu", alone=True).differences
    ran_again(recording, dtype="bfloat16", alone=True)


def test_only_its_owner_reads_it_and_none_is_written_over(recording):
    assert stat.S_IMODE(recording.stat().st_mode) == 0o600
    assert stat.S_IMODE(tensors_folder(recording).stat().st_mode) == 0o700
    before = recording.read_bytes()
    with pytest.raises(InvalidRequest, match=r"record: .* cannot be written \(.*exists.*\); name a new file"):
        LLM(TINY["qwen2_vl"], record=recording)
    assert recording.read_bytes() == before


def test_a_recording_that_cannot_go_on_harms_no_request(tmp_path, monkeypatch, caplog):
    path = tmp_path / "run.jsonl"
    llm = LLM(TINY["qwen2_vl"], dtype="float32", record=path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlmfx.engine.recording.save_file", full)
    with caplog.at_level(logging.WARNING, "vlmfx"):
        outputs = llm.generate(mixed(llm.model), GREEDY, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(outputs)
    (record,) = caplog.records
    assert "ends here, as it cannot be written (" in record.getMessage()


@pytest.mark.parametrize("text", ["", "no JSON\n", '{"a": 1}\n', "[]\n", '{"vlmfx": "1"}\n[]\n'])
def test_what_is_no_recording_is_refused(text, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidRequest, match="name a file that --record wrote"):
        ran_again(path)


def test_a_torn_last_line_is_left_out(recording):
    text = recording.read_text(encoding="utf-8")
    recording.write_text(text[: len(text) - 9], encoding="utf-8")
    assert not ran_again(recording).differences


def test_tensors_that_are_gone_are_told(recording):
    (file,) = tensors_folder(recording).iterdir()
    file.unlink()
    with pytest.raises(InvalidRequest, match=rf"the tensors {file.stem} .* copy run.jsonl.tensors with the file"):
        ran_again(recording)


def test_a_model_without_a_name_is_to_be_named(tmp_path):
    path = tmp_path / "run.jsonl"
    LLM(load_model(TINY["llava"]), record=path).generate("Hello", GREEDY)
    with pytest.raises(InvalidRequest, match="say which it was"):
        ran_again(path)
    assert not ran_again(path, model=TINY["llava"]).differences


def test_on_the_command_line(tmp_path, capsys):
    path, image = tmp_path / "run.jsonl", tmp_path / "a.png"
    picture(64, 64).save(image)
    model = str(TINY["llava"])
    asked = ["What?", "--raw", "--model", model, "--max-tokens", "4", "--record", str(path)]
    assert main(["generate", *asked]) == 0
    assert main(["replay", str(path)]) == 0
    assert capsys.readouterr().out.endswith("4 steps of 1 requests: all as recorded\n")

    def spoil(line: dict[str, Any]) -> bool:
        if "drawn" in line:
            line["drawn"][0][2] += 1
        return "drawn" in line

    changed(path, spoil)
    assert main(["replay", str(path)]) == 1
    assert "step 0: text 0 of request 0 draws" in capsys.readouterr().out
    assert main(["replay", str(path), "--alone"]) == 1
