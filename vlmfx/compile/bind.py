"""Bound: a function of trees as a module of flat tensors, which is what torch.export traces. The only nn.Module here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vlmfx.compile.argument import Argument, spec_of
from vlmfx.compile.signature import Outputs, Source
from vlmfx.tree import Tree


class _Traced:
    """What forward learns: export puts back the module's own attributes as they were before."""

    outputs: Outputs | None = None


class Bound(torch.nn.Module):
    """forward(*tensors) → the tensors that fn makes of them; what tree they are is in `outputs`, once it has run.

    static: position → what fn gets there. Between these stand the arguments, in order, made of the tensors. Tensors that fn writes
    in place are the ones passed, never copies; one that fn returns as it came is no output, since the caller has it."""

    def __init__(self, fn: Callable[..., Tree], static: Mapping[int, Any], arguments: Sequence[Argument]) -> None:
        super().__init__()
        self.fn, self.static, self.arguments = fn, dict(static), list(arguments)
        self._traced = _Traced()

    @property
    def outputs(self) -> Outputs:
        """How fn's result is made of the tensors that forward gave."""
        assert self._traced.outputs is not None, "forward has run"
        return self._traced.outputs

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        result = self.fn(*self.args_of(tensors))
        out, self._traced.outputs = split(result, tensors)
        return out

    def args_of(self, tensors: Sequence[Tensor]) -> list[Any]:
        """fn's arguments, the static ones among them."""
        left = iter(tensors)
        trees = iter([argument.tree([next(left) for _ in argument.specs]) for argument in self.arguments])
        count = len(self.static) + len(self.arguments)
        return [self.static[i] if i in self.static else next(trees) for i in range(count)]


def split(result: Tree, tensors_in: Sequence[Tensor]) -> tuple[list[Tensor], Outputs]:
    """The tensors of a result that were not passed in, each once, and how the result is made of these."""
    leaves, structure = pytree.tree_flatten(result)
    given = {id(t): i for i, t in enumerate(tensors_in)}
    made: dict[int, int] = {}
    out: list[Tensor] = []
    sources = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            sources.append(Source("constant", leaf))
        elif id(leaf) in given:
            sources.append(Source("in", given[id(leaf)]))
        else:
            if id(leaf) not in made:
                made[id(leaf)] = len(out)
                out.append(leaf)
            sources.append(Source("out", made[id(leaf)]))
    return out, Outputs(structure=structure, sources=tuple(sources), specs=tuple(map(spec_of, out)))
