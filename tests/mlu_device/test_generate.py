"""Every family answers on `mlu` what it answers on the CPU, token by token, each op by its BANG C kernel in the emulator."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import golden_cases
from tests.golden_cases import COMMITTED, EVERY, Case
from tests.ops import emulated
from tests.pictures import about, picture
from vlmfx import LLM, SamplingParams, checkpoint, embed
from vlmfx.engine.request import CompletionOutput
from vlmfx.errors import CheckpointError, DeviceError, ShapeError
from vlmfx.ops.rms_norm import rms_norm

CASES = golden_cases.find(COMMITTED)
DEMO = Path(checkpoint.__file__).parent / "assets" / "demo.png"


@cache
def llm(folder: Path | str, device: str) -> LLM:
    return LLM(folder, device=device, dtype="float32")


def logprobs(output: CompletionOutput) -> list[dict[int, float]]:
    """Token → log-probability, of each place."""
    assert output.logprobs is not None
    return [{token: one.logprob for token, one in place.items()} for place in output.logprobs]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_greedy_tokens_are_the_goldens(case: Case):
    prompts = case.prompts()
    params = [SamplingParams.greedy(max_tokens=len(p.greedy_ids), ignore_eos=True) for p in prompts]
    emulated.library().bang_emu_options(0, 16, 1)
    outputs = llm(case.model_folder, "mlu").generate([p.request() for p in prompts], params, use_tqdm=False)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [p.greedy_ids for p in prompts]
    assert emulated.counters().launches > 10 * len(prompts)


@pytest.mark.parametrize("family", EVERY)
def test_a_mixed_batch_is_that_of_the_cpu(family: str):
    """Long and short prompts, pictures and none, greedy and drawn, with log-probabilities, penalties and a bias."""
    cpu, mlu = (llm(EVERY[family], device) for device in ("cpu", "mlu"))
    pictured = about(cpu.model, picture(70, 40)) if family != "phi3_v" else "Some words of another kind"
    prompts = [pictured, "Some words", "One two three four five six seven " * 9]
    params = [
        SamplingParams.greedy(max_tokens=8, logprobs=3),
        SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=5, max_tokens=8),
        SamplingParams.greedy(max_tokens=8, repetition_penalty=1.3, presence_penalty=0.5, logit_bias={"300": 2.0}),
    ]
    expected, got = ([o.outputs[0] for o in one.generate(prompts, params, use_tqdm=False)] for one in (cpu, mlu))
    assert [o.token_ids for o in got] == [o.token_ids for o in expected]
    for mine, right in zip(logprobs(got[0]), logprobs(expected[0]), strict=True):
        assert [*mine] == [*right]
        assert mine == pytest.approx(right, abs=1e-4)


def test_the_shipped_model_answers_about_a_picture():
    prompt = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": str(DEMO)}, {"type": "text", "text": "What colour is the star?"}]}
        ]
    }  # fmt: skip
    answers = [
        llm("scenes", device).generate(prompt, SamplingParams.greedy(max_tokens=8), use_tqdm=False)[0].outputs[0].text
        for device in ("cpu", "mlu")
    ]
    assert answers[0] == answers[1]
    assert answers[0]


def test_vectors_are_those_of_the_cpu():
    prompts = ["Some words", "Others, and more of them"]
    expected, got = (embed(EVERY["qwen2_vl"], prompts, device=device, dtype="float32") for device in ("cpu", "mlu"))
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(expected), atol=1e-5, rtol=0)


def test_in_float16_the_logits_are_near():
    prompt = "Some words"
    params = SamplingParams.greedy(max_tokens=1, logprobs=5)
    exact, half = (
        LLM(EVERY["qwen2_vl"], device=device, dtype=dtype).generate(prompt, params, use_tqdm=False)[0].outputs[0]
        for device, dtype in (("cpu", "float32"), ("mlu", "float16"))
    )
    expected, got = logprobs(exact)[0], logprobs(half)[0]
    shared = expected.keys() & got.keys()
    assert len(shared) >= 3
    assert {t: got[t] for t in shared} == pytest.approx({t: expected[t] for t in shared}, abs=2e-2)


def stored(folder: Path, change: dict[str, float]) -> Path:
    """The tiny Qwen2-VL in bfloat16, with an element of the tensors named set to a number."""
    for path in EVERY["qwen2_vl"].iterdir():
        if path.suffix == ".safetensors":
            tensors = {name: t.to(torch.bfloat16) for name, t in load_file(path).items()}
            for name, value in change.items():
                if name in tensors:
                    tensors[name].flatten()[0] = value
            save_file(tensors, folder / path.name)
        elif path.name == "config.json":
            config = json.loads(path.read_text(encoding="utf-8"))
            (folder / path.name).write_text(json.dumps({**config, "torch_dtype": "bfloat16"}), encoding="utf-8")
        else:
            (folder / path.name).symlink_to(path)
    return folder


def test_bfloat16_becomes_float16_where_its_range_allows(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    name = next(n for n in load_file(next(EVERY["qwen2_vl"].glob("*.safetensors"))) if n.endswith("mlp.up_proj.weight"))
    assert checkpoint.load(stored(small, {}), device="mlu").dtype == torch.float16
    with caplog.at_level(logging.WARNING, "vlmfx"):
        assert checkpoint.load(stored(large, {name: 7e4}), device="mlu").dtype == torch.float32
    assert f"{name} (7.01e+04); the model is loaded as float32" in caplog.text
    with pytest.raises(CheckpointError, match=rf'dtype is "float16", but 1 of [0-9]+ tensors are beyond .*{name}'):
        checkpoint.load(large, device="mlu", dtype="float16")
    with pytest.raises(DeviceError, match='dtype is "bfloat16", which an MLU370 does not have'):
        checkpoint.load(small, device="mlu", dtype="bfloat16")


def test_tensors_on_two_devices_are_refused_by_name():
    x, weight = torch.ones(2, 64), torch.ones(64)
    with pytest.raises(ShapeError, match="weight is on cpu but x is on mlu:0"):
        rms_norm(x.to("mlu"), weight, 1e-6)
    with pytest.raises((ShapeError, ValueError), match=r"weight is on mlu:0 but .* is on cpu"):
        rms_norm(x, weight.to("mlu"), 1e-6)
    with torch.inference_mode():
        with pytest.raises(ValueError, match="weight is on cpu but the first argument is on mlu:0"):
            rms_norm(x.to("mlu"), weight, 1e-6)
        with pytest.raises((ShapeError, ValueError), match=r"weight is on mlu:0 but .* is on cpu"):
            rms_norm(x, weight.to("mlu"), 1e-6)
        with pytest.raises(ValueError, match="weight is on mlu:0 but the first argument is on cpu"):
            torch.ops.vlmfx.rms_norm(x, weight.to("mlu"), 1e-6)
