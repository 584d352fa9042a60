"""How an op is registered: one contract, from which torch learns its schema, shapes, gradient and kernels.

`register` defines `torch.ops.vlmfx.<name>`. What it does on a device is the kernel of that device; the definition of right is the
reference, in plain torch. Inputs are checked once, where a kernel is chosen or a graph is traced: never inside a captured graph.

The gradient is the reference's: where one is wanted, the op is the reference, or other plain torch that is equal and faster, so
autograd, torch.func, forward mode and double backward see plain torch. torch.library's `custom_op` decorator would cost three times
as much a call and import the compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmfx.errors import ShapeError

LIBRARY = torch.library.Library("vlmfx", "DEF")
DISPATCH_KEYS = {"cuda": "CUDA"}
TRACED_OPS = ContextVar("TRACED_OPS", default=False)
OPS: dict[str, Op] = {}  # name → contract, of the ops whose modules are imported


class Cost(NamedTuple):
    """What one call must do at least: floating-point operations, and bytes read and written, each tensor counted once."""

    flops: int
    bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Op:
    """The contract of one op; call it with the schema's arguments, in order.

    reference: plain torch, the definition of right, differentiable unless the op mutates. fake: the outputs' shapes and dtypes.
    check: raises ShapeError for inputs the kernels do not take. cost: of the same arguments. cpu: the CPU kernel, where it is not
    the reference. with_grad: what runs where a gradient is wanted, if the reference would be slow. kernels: device type → the
    module below vlmfx.ops that has a function of the op's name; those of mlu are bound in C++, see ops/mlu. tolerance: how far a kernel
    may be from the reference, absolute and relative, by dtype. is_inline: `torch.compile` sees, and fuses, the plain torch of the CPU
    kernel. traced: plain torch of static shapes that stands for the op on the CPU within `traced_ops`, where the CPU kernel is none
    that can be traced.

    On the CPU a plain call skips the dispatcher, which with its two layers of Python costs as much as a small op does."""

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    check: Callable[..., None]
    cost: Callable[..., Cost]
    tolerance: Mapping[torch.dtype, float]
    kernels: Mapping[str, str]
    cpu: Callable[..., Any]
    with_grad: Callable[..., Any]
    is_inline: bool
    traced: Callable[..., Any] | None

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]

    @cached_property
    def overload(self) -> Any:
        """`torch.ops.vlmfx.<name>.default`."""
        return getattr(torch.ops.vlmfx, self.name).default

    @cached_property
    def argument_names(self) -> tuple[str, ...]:
        return tuple(argument.name for argument in self.overload._schema.arguments)

    @property
    def is_mutating(self) -> bool:
        return bool(self.overload._schema.is_mutable)

    def __call__(self, *args: Any) -> Any:
        if args[0].is_cpu and (kernel := self._direct(args[0])):
            for value in args:
                if isinstance(value, Tensor) and not value.is_cpu:
                    self.checked(*args)
            self.check(*args)
            return kernel(*args)
        return self.overload(*args)

    def _direct(self, x: Tensor) -> Callable[..., Any] | None:
        """What a call on the CPU runs without the dispatcher, if anything."""
        if self.is_inline or _is_plain(x):
            return self.cpu
        # Dynamo cannot look at a context variable; it gets the op.
        is_traced = self.traced is not None and not torch.compiler.is_dynamo_compiling() and TRACED_OPS.get()
        return self.traced if is_traced else None

    def checked(self, *args: Any) -> None:
        """Raise ShapeError, naming the argument, unless all tensors are on one device and `check` is content."""
        device = args[0].device
        for name, value in zip(self.argument_names, args, strict=True):
            if isinstance(value, Tensor) and value.device != device:
                raise ShapeError(
                    f"{self.name}: {name} is on {value.device} but {self.argument_names[0]} is on {device}; "
                    "move both to one device."
                )
        self.check(*args)

    def kernel(self, device: str) -> Callable[..., Any]:
        """The kernel of a device type, imported on the first call: importing vlmfx needs no Triton."""
        return _load(self.kernels[device], self.name)


@contextmanager
def traced_ops() -> Iterator[None]:
    """Within it a graph gets, of an op that has such a form, the plain torch that a compiler fuses, in place of the op."""
    token = TRACED_OPS.set(True)
    try:
        yield
    finally:
        TRACED_OPS.reset(token)


@cache
def _load(module: str, name: str) -> Callable[..., Any]:
    return getattr(import_module(f"vlmfx.ops.{module}"), name)


def _is_plain(x: Tensor) -> bool:
    """Whether a call runs now and nobody looks on: no gradient, compiler, dispatch mode or subclass such as a fake tensor."""
    return (
        type(x) is Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    )


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    check: Callable[..., None],
    cost: Callable[..., Cost],
    tolerance: Mapping[torch.dtype, float],
    kernels: Mapping[str, str],
    cpu: Callable[..., Any] | None = None,
    with_grad: Callable[..., Any] | None = None,
    is_inline: bool = False,
    traced: Callable[..., Any] | None = None,
) -> Op:
    """Define `torch.ops.vlmfx.<name>` and return its contract; the schema has no defaults, which torch would not pass on."""
    op = Op(
        schema=schema,
        reference=reference,
        fake=fake,
        check=check,
        cost=cost,
        tolerance=tolerance,
        kernels=kernels,
        cpu=cpu or reference,
        with_grad=with_grad or reference,
        is_inline=is_inline,
        traced=traced,
    )
    OPS[op.name] = op
    LIBRARY.define(schema)
    LIBRARY.impl(op.name, _after_check(op, op.cpu), "CPU")
    for device in kernels:
        LIBRARY.impl(
            op.name, _after_check(op, lambda *args, device=device: op.kernel(device)(*args)), DISPATCH_KEYS[device]
        )
    torch.library.register_fake(f"vlmfx::{op.name}", _after_check(op, fake), lib=LIBRARY)
    LIBRARY.impl(op.name, _differentiable(op), "Autograd")
    _ = op.overload, op.argument_names  # looked up now: a compiler that traces a call cannot see through the look-up
    return op


def _after_check(op: Op, kernel: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        op.checked(*args)
        return kernel(*args)

    return run


def _differentiable(op: Op) -> Callable[..., Any]:
    """The op as autograd sees it: plain torch where a gradient is wanted, else the device's kernel."""

    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            if op.is_mutating:
                raise ShapeError(f"{op.name} writes in place and has no gradient; call it under torch.no_grad().")
            op.checked(*args)
            return op.with_grad(*args)
        if args[0].device.type == "mlu":  # whose kernels are bound in C++, by ops/mlu/bindings.cpp
            op.checked(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.overload(*args)

    return run


def wide(x: Tensor) -> Tensor:
    """x as references compute with it: float32, or float64 where it is that."""
    return x if x.dtype == torch.float64 else x.float()


def nbytes(*tensors: Tensor | None) -> int:
    """The bytes of all elements, for `cost`."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def refuse(op: str, argument: str, found: object, expected: str) -> None:
    """Raise the ShapeError that names the argument, what it is and what it should be."""
    shown = f"shape {tuple(found)}" if isinstance(found, torch.Size) else found
    raise ShapeError(f"{op}: {argument} has {shown} but needs {expected}; pass one that has.")
