"""What holds of every op: it compiles, exports, has its reference's gradient, names what does not fit, and has a kernel and mutants."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vlmfx.ops
from tests.ops.kernels import kernels_of
from tests.strategies import normal
from vlmfx.errors import ShapeError
from vlmfx.ops.registry import Cost, Op, nbytes

HERE = Path(__file__).parent
MODULES = [
    importlib.import_module(f"vlmfx.ops.{m.name}") for m in pkgutil.iter_modules(vlmfx.ops.__path__) if not m.ispkg
]
OPS: list[Op] = [m.OP for m in MODULES if hasattr(m, "OP")]
TESTS: dict[str, Any] = {op.name: importlib.import_module(f"tests.ops.test_{op.name}") for op in OPS}
EACH_OP = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
FEW = settings(max_examples=4, suppress_health_check=[HealthCheck.filter_too_much])
HAS_COMPILER = torch.__version__ >= "2.11"  # what DESIGN promises for compile and export


class Program(torch.nn.Module):
    """An op as torch.export wants it."""

    def __init__(self, op: Op, case: tuple[Any, ...]) -> None:
        super().__init__()
        self.op, self.case = op, case

    def forward(self, tensors: list[Tensor]) -> Any:
        left = iter(tensors)
        return self.op.overload(*(next(left) if isinstance(a, Tensor) else a for a in self.case))


def cloned(case: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in case)


def tensors(case: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in case if isinstance(a, Tensor)]


def flat(out: Any) -> list[Tensor]:
    return [] if out is None else list(out) if isinstance(out, (tuple, list)) else [out]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for mine, right in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=0, equal_nan=True)


@EACH_OP
def test_there_is_a_kernel_here(op):
    assert "no-kernel" not in [param.id for param in kernels_of(op)]


@EACH_OP
@FEW
@given(data=st.data())
def test_opcheck(op, data):
    case = data.draw(TESTS[op.name].cases())
    # What opcheck takes for a difference, and what it cannot copy.
    assume(not any(t.isnan().any() for t in flat(op.overload(*cloned(case)))))
    assume(all(t.numel() for t in tensors(case)))
    torch.library.opcheck(op.overload, case)


@EACH_OP
@FEW
@given(data=st.data())
def test_the_dispatcher_finds_the_cpu_kernel(op, data):
    case = data.draw(TESTS[op.name].cases())
    mine, theirs = cloned(case), cloned(case)
    assert_same(flat(op.overload(*mine)) + tensors(mine), flat(op.cpu(*theirs)) + tensors(theirs))


@pytest.mark.skipif(not HAS_COMPILER, reason="compile and export want torch 2.11")
@EACH_OP
@FEW
@given(data=st.data())
def test_it_compiles_and_exports_as_one_graph(op, data):
    case = data.draw(TESTS[op.name].cases())
    expected, compiled, exported = cloned(case), cloned(case), cloned(case)
    right = flat(op.overload(*expected)) + tensors(expected)
    torch.compiler.reset()
    run = torch.compile(op.overload, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        assert_same(flat(run(*compiled)) + tensors(compiled), right)
        program = torch.export.export(Program(op, case), (tensors(exported),)).module()
        assert_same(flat(program(tensors(exported))) + tensors(exported), right)


@EACH_OP
@FEW
@given(data=st.data())
def test_the_gradient_is_the_references(op, data):
    case = data.draw(TESTS[op.name].cases())
    # Of one element a norm is its bias: the gradient is what rounding leaves of a difference of 1/√eps.
    assume(op.name != "layer_norm" or case[0].shape[-1] > 1)
    at = [i for i, a in enumerate(case) if isinstance(a, Tensor) and a.is_floating_point()]
    if op.is_mutating:
        case = tuple(a.clone().requires_grad_() if i == at[0] else a for i, a in enumerate(case))
        with pytest.raises(ShapeError, match="has no gradient"):
            op.overload(*case)
        return

    def total(fn: Any) -> Any:
        """Of the outputs by fixed weights, so that each output has a gradient of its own, and none that its rounding moves."""

        def of(*floats: Tensor) -> Tensor:
            left = iter(floats)
            outs = flat(fn(*(next(left) if i in at else a for i, a in enumerate(case))))
            weighed = [(o.double() * normal(i, *o.shape)).sum() for i, o in enumerate(outs) if o.is_floating_point()]
            return torch.stack(weighed).sum() if weighed else torch.zeros(())

        return of

    floats = [case[i].clone().requires_grad_() for i in at]
    if not total(op.reference)(*floats).requires_grad:
        pytest.skip(f"{op.name} takes or returns integers, which have no gradient")

    def by_autograd(fn: Any) -> Any:
        return torch.autograd.grad(total(fn)(*floats), floats, allow_unused=True, materialize_grads=True)

    def by_func(fn: Any) -> Any:
        return torch.func.grad(total(fn), argnums=tuple(range(len(at))))(*[f.detach() for f in floats])

    # What runs where a gradient is wanted: beside the reference itself, only what rounds otherwise.
    runs = {op.overload: op.with_grad, op: op.cpu if op.is_inline else op.with_grad}
    # Apart, as torch's silu rounds differently in the two; torch 2.4's torch.func cannot read the lengths that are in a tensor.
    for gradients in (by_autograd, by_func) if HAS_COMPILER else (by_autograd,):
        expected = gradients(op.reference)
        for fn, run in runs.items():
            if run is op.reference:
                assert_same(list(gradients(fn)), list(expected))
            else:
                assert_near(op, gradients(fn), expected)


def assert_near(op: Op, got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Within ten times the op's tolerance of the largest element: a gradient adds up what is of that size."""
    for mine, right in zip(got, expected, strict=True):
        largest = right.abs().nan_to_num(0.0, 0.0).amax().item() if right.numel() else 0.0
        tolerance = 10 * op.tolerance.get(right.dtype, 0.0)
        torch.testing.assert_close(mine, right, atol=tolerance * max(largest, 1.0), rtol=tolerance, equal_nan=True)


@EACH_OP
@FEW
@given(data=st.data())
def test_tensors_on_two_devices_are_named(op, data):
    case = data.draw(TESTS[op.name].cases())
    at = [i for i, a in enumerate(case) if isinstance(a, Tensor)]
    if len(at) == 1:
        return
    mixed = tuple(a.to("meta") if i == at[-1] else a for i, a in enumerate(case))
    with pytest.raises(
        ShapeError, match=f"{op.argument_names[at[-1]]} is on meta but {op.argument_names[at[0]]} is on cpu"
    ):
        op(*mixed)


# These read each input and write each output once, and nothing else.
ROW_BY_ROW = ["rms_norm", "add_rms_norm", "layer_norm", "activation", "gated_activation", "rotary"]


@EACH_OP
@FEW
@given(data=st.data())
def test_the_cost_counts_each_operand(op, data):
    case = data.draw(TESTS[op.name].cases())
    cost = op.cost(*case)
    assert isinstance(cost.flops, int)
    assert isinstance(cost.bytes, int)
    assert cost.flops >= 0
    written = nbytes(*flat(op.reference(*cloned(case))))
    assert cost.bytes >= written
    if op.name in ROW_BY_ROW:
        unread = nbytes(*case[1:]) // 2 if op.name == "rotary" else 0  # half of its table: the halves are equal
        assert cost.bytes == nbytes(*tensors(case)) - unread + written


def test_the_cost_of_attention_by_hand():
    """Two segments of 3 tokens, 4 heads of 8: for each pair of a query and a key, a head takes 2·8 operations for the score and as
    many for the mean."""
    q, k, starts, a_pair = torch.zeros(6, 4, 8), torch.zeros(6, 2, 8), torch.tensor([0, 3, 6]).int(), 4 * (16 + 16)
    vision = costs("vision_attention", q, q, q, starts, starts, 1.0)
    assert vision.flops == (3 * 3 + 3 * 3) * a_pair
    assert vision.bytes == 4 * (4 * 6 * 4 * 8 + 3 + 3)
    for window, pairs in ((0, 1 + 2 + 3), (2, 1 + 2 + 2), (9, 1 + 2 + 3)):
        prefill = costs("prefill_attention", q, k, k, starts, None, None, None, None, 1.0, window)
        assert prefill.flops == 2 * pairs * a_pair
        assert prefill.bytes == 4 * (2 * 6 * 4 * 8 + 2 * 6 * 2 * 8 + 3)


def test_the_cost_of_decode_attention_by_hand():
    """Two sequences, to each of which the table gives 3 blocks of 5 slots; 4 heads of 8 read 2 heads of k and v."""
    q, cache, lens, table = torch.zeros(2, 4, 8), torch.zeros(9, 2, 5, 8), torch.zeros(2).int(), torch.zeros(2, 3).int()
    for block_table, window, keys in ((table, 0, 15), (table, 7, 7), (table, 40, 15), (None, 0, 5)):
        cost = costs("paged_decode_attention", q, cache, cache, block_table, lens, None, None, 1.0, window)
        assert cost.flops == 2 * keys * 4 * (16 + 16)
        assert cost.bytes == 4 * (2 * 2 * keys * 2 * 8 + 2 * 2 * 4 * 8 + 2 + (0 if block_table is None else 6))


def costs(name: str, *args: Any) -> Cost:
    """The cost of a call."""
    return next(op for op in OPS if op.name == name).cost(*args)
