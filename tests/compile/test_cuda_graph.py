"""CapturedProgram: replays give what the program gives, write in place once, and nothing syncs or allocates in a capture.

On a CPU, with a stand-in for torch.cuda whose graph records ops."""

from __future__ import annotations

import pytest
import torch

from tests.compile.functions import mlp, mlp_args, needs_compiler, step, step_args
from tests.compile.standin import Graph, StandIn
from vlmfx.compile.argument import spec_of
from vlmfx.compile.cuda_graph import CapturedProgram
from vlmfx.compile.stages import jit
from vlmfx.errors import CompileError
from vlmfx.tree import leaves

CPU = torch.device("cpu")


def captured(program, tensors, fixed=(), **more):
    specs = [spec_of(t) for t in tensors]
    return CapturedProgram(program, name="f", specs=specs, fixed=fixed, device=CPU, api=StandIn, graph=Graph, **more)


@needs_compiler
def test_replays_give_what_the_program_gives():
    params, cfg, x = mlp_args()
    lowered = jit(mlp, static="cfg").lower(params, cfg, x)
    program = lowered.compile("eager").program
    weights = leaves(params)
    graph = captured(program, [*weights, x], fixed=range(len(weights)))
    outputs = None
    for scale in (1, 2, 3):
        got = graph([*weights, x * scale])
        torch.testing.assert_close(list(got), list(program([*weights, x * scale])))
        assert outputs is None or all(a is b for a, b in zip(got, outputs, strict=True))
        outputs = got
    assert graph.graph.num_replays == 2  # the first call's is the run before the capture


def test_what_is_written_in_place_is_written_once_a_call():
    total, x = torch.zeros(3), torch.ones(3)

    def accumulate(tensors):
        tensors[0].add_(tensors[1])
        return [tensors[0] * 2]

    graph = captured(accumulate, [total, x], fixed={0})
    for count in (1, 2, 3):
        (out,) = graph([total, x])
        assert total.tolist() == [count] * 3
        assert out.tolist() == [2 * count] * 3


def test_inputs_of_all_kinds_are_copied_to_buffers():
    column = torch.arange(6.0).reshape(2, 3).T
    inputs = [torch.ones(3, dtype=torch.int32), torch.zeros(0, 4), column, torch.tensor(2.5), torch.tensor([True])]
    graph = captured(lambda ts: [t + t for t in ts], inputs)
    for other in (inputs, [~t if t.dtype is torch.bool else t * 3 for t in inputs]):
        out = graph(other)
        torch.testing.assert_close(list(out), [t + t for t in other])
    assert graph.inputs[2].stride() == (1, 3)
    given = [*graph.inputs]  # what is in its buffer already is not copied
    torch.testing.assert_close(list(graph(given)), [t + t for t in given])


def test_inputs_on_the_host_go_in_one_transfer():
    graph = captured(lambda ts: [ts[0] + ts[1]], [torch.ones(3), torch.ones(3)])
    graph.device = torch.device("cpu", 0)  # another name of the CPU, so that plain CPU tensors are elsewhere
    StandIn.events.clear()
    for scale in (1.0, 2.0):
        a, b = torch.full((3,), scale), torch.full((3,), 10.0)
        assert graph([a, b])[0].tolist() == [10 + scale] * 3
    assert StandIn.events == ["record", "record"] * 2  # waited for the last transfer, then noted this one
    assert graph.packed.numel() == 2 * 256
    assert graph.from_host == [0, 1]


def test_a_fixed_input_that_moved_is_refused():
    w, x = torch.ones(3), torch.ones(3)
    graph = captured(lambda ts: [ts[0] * ts[1]], [w, x], fixed={0})
    graph([w, x])
    with pytest.raises(
        CompileError, match=r"^f: input tensor 0, of shape \(3,\), is fixed but not the one that was captured; pass"
    ):
        graph([w.clone(), x])


def test_an_input_that_changes_its_device_is_refused():
    x = torch.ones(3)
    graph = captured(lambda ts: [ts[0] * 2], [x])
    graph([x])
    with pytest.raises(
        CompileError, match=r"^f: input tensor 0, of shape \(3,\), is on meta but was on cpu at the first call"
    ):
        graph([x.to("meta")])


@needs_compiler
def test_a_cache_is_written_where_it_is():
    cfg, qkv, *rest = step_args()
    lowered = jit(step, static="cfg", donate="cache").lower(cfg, qkv, *rest)
    program, fixed = lowered.compile("eager").program, lowered.signature.indices(["cache"])
    tensors, others = (lowered.signature.tensors(step_args()[1:]) for _ in range(2))
    graph = captured(program, tensors, fixed=fixed)
    for scale in (1, 2, 3):
        mine = [tensors[i] if i in fixed else t for i, t in enumerate(tensors)]
        mine[0] = others[0] = qkv * scale
        torch.testing.assert_close(list(graph(mine)), list(program(others)))
        torch.testing.assert_close(mine, others)


def test_a_program_that_reads_values_or_allocates_cannot_be_captured():
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="_local_scalar_dense synchronizes while a graph is captured"):
        captured(lambda ts: [ts[0] * ts[0].max().item()], [x])([x])
    with pytest.raises(RuntimeError, match="zeros allocates while a graph is captured"):
        captured(lambda ts: [ts[0] + torch.zeros(3)], [x])([x])
    assert captured(lambda ts: [ts[0] * 2], [x])([x])[0].tolist() == [2, 2, 2]  # the failed captures have ended


def test_programs_share_a_pool():
    first, second = (captured(lambda ts: [ts[0] + 1], [torch.ones(3)], pool=pool) for pool in (None, "pool"))
    first([torch.ones(3)])
    second([torch.ones(3)])
    assert second.pool() == "pool"
    assert first.pool() is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["cuda_graph", "inductor+cuda_graph"])
def test_a_captured_program_on_a_gpu(backend):
    params, cfg, x = mlp_args()
    params, x = torch.utils._pytree.tree_map(lambda t: t.cuda() if isinstance(t, torch.Tensor) else t, (params, x))
    program = jit(mlp, static="cfg").lower(params, cfg, x).compile(backend, fixed="params")
    for scale in (1, 2, 3):
        torch.testing.assert_close(program(params, x * scale), mlp(params, cfg, x * scale), rtol=1e-4, atol=1e-5)
