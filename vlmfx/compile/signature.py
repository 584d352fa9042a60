"""Signature: what a program of flat tensors takes and gives, as the trees that its function has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from vlmfx.compile.argument import Argument, TensorSpec
from vlmfx.errors import CompileError
from vlmfx.tree import Tree


class Source(NamedTuple):
    """Where a leaf of the result is from: the n-th tensor "in", the n-th tensor "out", or a "constant"."""

    kind: str
    value: Any


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The result's tree, the source of each leaf, and the tensors that the program gives. An argument that is returned is no output of
    the program: the result holds what the caller passed."""

    structure: pytree.TreeSpec
    sources: tuple[Source, ...]
    specs: tuple[TensorSpec, ...]

    def tree(self, tensors_in: Sequence[Tensor], tensors_out: Sequence[Tensor]) -> Tree:
        """The result of a call."""
        tensors = {"in": tensors_in, "out": tensors_out}
        values = [tensors[kind][value] if kind in tensors else value for kind, value in self.sources]
        return pytree.tree_unflatten(values, self.structure)


@dataclass(frozen=True, kw_only=True)
class Signature:
    """A program's name, its arguments without the static ones, and its outputs."""

    name: str
    arguments: tuple[Argument, ...]
    outputs: Outputs

    @property
    def specs(self) -> list[TensorSpec]:
        """Of the input tensors, in order."""
        return [spec for argument in self.arguments for spec in argument.specs]

    @property
    def paths(self) -> list[str]:
        """Where in its argument each input tensor is, as "params['norm']"."""
        return [path for argument in self.arguments for path in argument.tensor_paths]

    def tensors(self, args: Sequence[Tree], start: int = 0, stop: int | None = None) -> list[Tensor]:
        """The tensors of arguments start to stop, checked. Raises CompileError."""
        wanted = self.arguments[start:stop]
        if len(args) != len(wanted):
            names = ", ".join(argument.name for argument in wanted) or "none"
            raise CompileError(
                f"{self.name}: {len(args)} arguments were given but it takes {len(wanted)} ({names}); "
                "pass these, without the static ones."
            )
        return [t for argument, value in zip(wanted, args, strict=True) for t in argument.tensors(self.name, value)]

    def indices(self, names: Iterable[str]) -> frozenset[int]:
        """The places of the named arguments' tensors among all input tensors."""
        owners = [argument.name for argument in self.arguments for _ in argument.specs]
        wanted = frozenset(names)
        return frozenset(i for i, owner in enumerate(owners) if owner in wanted)

    def on_any_device(self, but: Iterable[str]) -> Signature:
        """The signature whose tensors may be anywhere, but for those of the named arguments."""
        kept = frozenset(but)
        return replace(self, arguments=tuple(a if a.name in kept else _anywhere(a) for a in self.arguments))


def _anywhere(argument: Argument) -> Argument:
    free = [replace(leaf, device=None) if isinstance(leaf, TensorSpec) else leaf for leaf in argument.leaves]
    return replace(argument, leaves=tuple(free))
