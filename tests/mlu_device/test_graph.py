"""Programs on `mlu`: exported for it, and recorded as graphs by a stand-in for torch.mlu.MLUGraph that fails as a capture would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.compile.functions import needs_compiler
from tests.golden_cases import EVERY
from vlmfx import LLM, SamplingParams, checkpoint
from vlmfx.compile import programs
from vlmfx.compile.argument import spec_of
from vlmfx.compile.cuda_graph import CapturedProgram
from vlmfx.compile.stages import jit
from vlmfx.errors import InvalidRequest
from vlmfx.tree import leaves

FOLDER = EVERY["qwen2_vl"]
PROMPTS = ["Some words", "One two three four five six seven " * 9]
PARAMS = SamplingParams.greedy(max_tokens=8)
HOST = torch.ones(3)


def tokens(llm: LLM) -> list[Any]:
    return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def test_recorded_programs_give_the_tokens_of_plain_ones():
    options: dict[str, Any] = {"device": "mlu", "dtype": "float32"}
    recorded = LLM(FOLDER, backend="mlu_graph", max_num_seqs=4, max_num_batched_tokens=256, **options)
    recorded.warm_up(use_tqdm=False)
    before, graphs = recorded.compiles, torch.mlu.MLUGraph.made  # type: ignore[attr-defined]
    replays = sum(graph.num_replays for graph in graphs)
    assert tokens(recorded) == tokens(LLM(FOLDER, device="cpu", dtype="float32"))
    assert recorded.compiles == before
    assert sum(graph.num_replays for graph in graphs) >= replays + 8  # a token each


def decode_call() -> tuple[Any, tuple[Any, ...]]:
    """The decode program of a model on `mlu`, and what the runner gave it."""
    model = checkpoint.load(FOLDER, device="mlu", dtype="float32")
    seen: list[Any] = []
    original = programs.step
    patch = pytest.MonkeyPatch()

    def remembered(functions: Any, config: Any, *args: Any) -> Any:
        seen.append(args)
        return original(functions, config, *args)

    patch.setattr(programs, "step", remembered)
    LLM(model).generate("Some words", replace(PARAMS, max_tokens=3), use_tqdm=False)
    patch.undo()
    return model, seen[-1]


class Program(torch.nn.Module):
    """The decode program of flat tensors, as torch.export wants it; what is no tensor is fixed."""

    def __init__(self, model: Any, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.model = model
        self.values, self.structure = pytree.tree_flatten(args)
        self.tensors = tuple(v for v in self.values if isinstance(v, Tensor))

    def forward(self, *tensors: Tensor) -> Any:
        left = iter(tensors)
        values = [next(left) if isinstance(v, Tensor) else v for v in self.values]
        args = pytree.tree_unflatten(values, self.structure)
        return programs.step(self.model.functions, self.model.config, *args)


def test_the_decode_program_is_exported_for_mlu():
    program = Program(*decode_call())
    assert {t.device.type for t in program.tensors} == {"mlu"}
    with torch.no_grad():
        exported = torch.export.export(program, program.tensors, strict=False)
        seen = " ".join(f"{node.target} {node.args[:1]}" for node in exported.graph.nodes)
        for op in ("paged_decode_attention", "rotary_cache_write", "rms_norm", "gated_activation"):
            assert f"vlmfx.{op}" in seen, seen
        got, expected = exported.module()(*program.tensors), program(*program.tensors)
    for mine, right in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), right.cpu(), rtol=0, atol=0)


@needs_compiler
def test_it_is_lowered_and_compiled_for_mlu():
    model, args = decode_call()

    def run(params: Any, cache: Any, inputs: Any) -> Any:
        return programs.step(model.functions, model.config, params, cache, inputs)

    with torch.no_grad():
        lowered = jit(run, donate="cache").lower(*args)
        assert lowered.device.type == "mlu"
        expected = leaves(run(*args))
        for backend in ("eager", "mlu_graph"):
            for mine, right in zip(leaves(lowered.compile(backend)(*args)), expected, strict=True):
                torch.testing.assert_close(mine.cpu(), right.cpu(), rtol=0, atol=0)


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "a number is read on the host": lambda x: x * x.sum().item(),
    "a copy from the host": lambda x: x + HOST.to("mlu"),
    "memory of the host's": lambda x: x + torch.empty(3, pin_memory=True).sum(),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_captured_fails(name: str):
    x = torch.ones(3, device="mlu")
    wrong, api = WRONG[name], torch.mlu  # type: ignore[attr-defined]
    program = CapturedProgram(
        lambda tensors: [wrong(*tensors)],
        name="f",
        specs=[spec_of(x)],
        fixed=(),
        device=x.device,
        api=api,
        graph=api.MLUGraph,
    )
    with pytest.raises(RuntimeError, match="while a graph is captured"):
        program([x])


def test_a_plan_needs_a_backend_that_compiles():
    with pytest.raises(InvalidRequest, match=r'backend "eager" on mlu compiles nothing'):
        LLM(FOLDER, device="mlu", dtype="float32", backend="eager", plan={"decode": [1]})  # type: ignore[arg-type]
