"""The way from a function to a program, in the stages of JAX's ahead-of-time API.

    program = vlmfx.jit(fn, static="cfg", donate="cache").lower(params, cfg, x, cache).compile(backend="inductor")
    y, cache = program(params, x, cache)

Nothing is compiled but by `compile`, and a program runs on what it was lowered for only."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmfx.compile.abstract import fake, target_device, tracing
from vlmfx.compile.argument import Argument
from vlmfx.compile.bind import Bound
from vlmfx.compile.lowered import Lowered
from vlmfx.compile.signature import Signature
from vlmfx.errors import CompileError, shown
from vlmfx.tree import Tree, leaves

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Names = str | int | Sequence[str | int]  # of arguments: names or positions


def jit(fn: Callable[..., Tree], *, static: Names = (), donate: Names = ()) -> Jitted:
    """fn, to be lowered for arguments of given shapes.

    static: arguments that a program has fixed, such as a config; any value will do. donate: arguments whose tensors fn may write in
    place, such as a cache; fn writing others is an error. Raises CompileError for names that fn does not have."""
    name = getattr(fn, "__name__", type(fn).__name__)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(p.name for p in inspect.signature(fn).parameters.values() if p.kind in kinds)
    return Jitted(
        fn=fn,
        name=name,
        names=names,
        static=_named(name, names, "static", static),
        donate=_named(name, names, "donate", donate),
    )


def _named(name: str, names: tuple[str, ...], option: str, wanted: Names) -> frozenset[str]:
    found = set()
    for one in [wanted] if isinstance(wanted, (str, int)) else wanted:
        if isinstance(one, int) and -len(names) <= one < len(names):
            found.add(names[one])
        elif one in names:
            found.add(str(one))
        else:
            raise CompileError(
                f"{name}: {option} names {shown(one)}, which is no positional argument of it; use one of {', '.join(names)}."
            )
    return frozenset(found)


@dataclass(frozen=True, kw_only=True)
class Jitted:
    """A function whose static and donated arguments are known; names are those of its positional arguments."""

    fn: Callable[..., Tree]
    name: str
    names: tuple[str, ...]
    static: frozenset[str]
    donate: frozenset[str]

    def lower(self, *abstract: Any, device: str | torch.device | None = None) -> Lowered:
        """The function's graph for arguments like these: static ones as they are, others trees of tensors, meta or fake tensors or
        ShapeDtypes. Nothing is allocated. device: where meta tensors and ShapeDtypes will be, by default with the other tensors.

        Raises CompileError where the graph would depend on the tensors' values, or an argument that is not donated is written in
        place; DeviceError for a device that is not here; what fn raises of shapes that do not fit."""
        if torch.__version__ < "2.11":
            raise CompileError(
                f"{self.name}: torch is {torch.__version__} but programs need 2.11; call the function itself."
            )
        try:
            inspect.signature(self.fn).bind(*abstract)
        except TypeError as error:
            raise CompileError(
                f"{self.name}: {error}; pass its arguments ({', '.join(self.names)}) in order."
            ) from None
        named = dict(zip(self.names, abstract, strict=False))
        static = {i: value for i, (name, value) in enumerate(named.items()) if name in self.static}
        given = {name: value for name, value in named.items() if name not in self.static}
        where = target_device(list(given.values()), device)
        with tracing() as mode:
            trees = {name: fake(value, mode, where) for name, value in given.items()}
        bound = Bound(self.fn, static, [Argument.of(name, tree) for name, tree in trees.items()])
        exported = _exported(bound, [t for t in leaves(list(trees.values())) if isinstance(t, Tensor)], self.name)
        signature = Signature(name=self.name, arguments=tuple(bound.arguments), outputs=bound.outputs)
        _refuse_writes(signature, exported, self.donate)
        return Lowered(signature=signature, bound=bound, exported=exported, donate=self.donate, device=where)


def _exported(bound: Bound, tensors: Sequence[Tensor], name: str) -> ExportedProgram:
    """The graph of a bound function. Raises CompileError for a number or a size that depends on values: the device would have to stop
    for the host to read it."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    def refusal(what: object) -> CompileError:
        return CompileError(
            f"{name}: {what} gives a number or a size that depends on the values of tensors; "
            "work it out on the host and pass it as a tensor of fixed size."
        )

    try:
        with torch.no_grad():
            exported = torch.export.export(bound, tuple(tensors), strict=False)
    except GuardOnDataDependentSymNode:
        raise refusal("a condition or a loop") from None
    for node in exported.graph.nodes:
        values = leaves(node.meta.get("val"))
        if any(map(_is_unknown, values + [size for v in values if isinstance(v, Tensor) for size in v.shape])):
            raise refusal(node.target)
    if any(_is_unknown(source.value) for source in bound.outputs.sources):
        raise refusal("the result")
    return exported


def _is_unknown(value: object) -> bool:
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _refuse_writes(signature: Signature, exported: ExportedProgram, donate: frozenset[str]) -> None:
    """Raise CompileError for a tensor that the graph writes although its argument is not donated."""
    inputs = {node.name: _storage(node) for node in exported.graph.nodes if node.op == "placeholder"}
    written = set(_written_storages(exported))
    allowed = signature.indices(donate)
    for at, name in enumerate(exported.graph_signature.user_inputs):
        if inputs[str(name)] in written and at not in allowed:
            argument = next(a.name for a in signature.arguments if at in signature.indices([a.name]))
            raise CompileError(
                f"{signature.name}: it writes {signature.paths[at]} in place but {argument} is not donated; "
                f'pass donate="{argument}" to jit, or do not write it.'
            )


def _written_storages(exported: ExportedProgram) -> Iterator[int]:
    """Of the tensors that an op of the graph writes in place, views among them.

    torch's own answer, the signature of the functionalized graph, takes three times as long as all the rest of lowering."""
    for node in exported.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            arguments = node.target._schema.arguments
            values = {**{a.name: value for a, value in zip(arguments, node.args, strict=False)}, **node.kwargs}
            for argument in arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written = leaves(values.get(argument.name))
                    yield from (_storage(leaf) for leaf in written if isinstance(leaf, torch.fx.Node))


def _storage(node: torch.fx.Node) -> int:
    return int(node.meta["val"].untyped_storage()._cdata)
