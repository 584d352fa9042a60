"""What holds of every op: it compiles, exports, has its reference's gradient, names what does not fit, and has a kernel and mutants."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vlmfx.ops
from tests.ops.kernels import kernels_of
from vlmfx.errors import ShapeError
from vlmfx.ops.registry import Op

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
    at = [i for i, a in enumerate(case) if isinstance(a, Tensor) and a.is_floating_point()]
    if op.is_mutating:
        case = tuple(a.clone().requires_grad_() if i == at[0] else a for i, a in enumerate(case))
        with pytest.raises(ShapeError, match="has no gradient"):
            op.overload(*case)
        return

    def total(fn: Any) -> Any:
        def of(*floats: Tensor) -> Tensor:
            left = iter(floats)
            outs = flat(fn(*(next(left) if i in at else a for i, a in enumerate(case))))
            differentiable = [o.double().sin().sum() for o in outs if o.is_floating_point()]
            return torch.stack(differentiable).sum() if differentiable else torch.zeros(())

        return of

    floats = [case[i].clone().requires_grad_() for i in at]
    expected_value = total(op.reference)(*floats)
    if not expected_value.requires_grad:
        pytest.skip(f"{op.name} takes or returns integers, which have no gradient")
    expected = torch.autograd.grad(expected_value, floats, allow_unused=True, materialize_grads=True)
    for fn in (op.overload, op):
        got = torch.autograd.grad(total(fn)(*floats), floats, allow_unused=True, materialize_grads=True)
        for mine, right in zip(got, expected, strict=True):
            is_reference = fn is op.overload and op.with_grad is op.reference
            tolerance = 0.0 if is_reference else 10 * op.tolerance.get(right.dtype, 0.0)
            torch.testing.assert_close(mine, right, atol=tolerance, rtol=tolerance, equal_nan=True)
    mine, right = (
        torch.func.grad(total(fn), argnums=tuple(range(len(at))))(*[f.detach() for f in floats])
        for fn in (op.overload, op.with_grad)  # whose silu rounds differently here than in torch.autograd
    )
    assert_same(list(mine), list(right))


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


@EACH_OP
@FEW
@given(data=st.data())
def test_the_cost_counts_each_operand(op, data):
    case = data.draw(TESTS[op.name].cases())
    cost = op.cost(*case)
    assert cost.flops >= 0
    assert cost.bytes >= 0
    assert isinstance(cost.flops, int)
    assert isinstance(cost.bytes, int)
