"""Argument: one argument of a program, a tree that is flattened to its tensors and checked.

A leaf that is no tensor (None, a number) is part of the shape: a program has it fixed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vlmfx.errors import CompileError, shown
from vlmfx.tree import Tree


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor as a program was lowered for it; device None: on any."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device | None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def fits(self, value: Any) -> bool:
        """True for a tensor of this kind; strides of axes of size 1 do not count, since nothing is reached by them."""
        return (
            isinstance(value, Tensor)
            and value.shape == self.shape
            and value.dtype is self.dtype
            and (self.device is None or value.device == self.device)
            and (
                value.stride() == self.stride or _steps(value.shape, value.stride()) == _steps(self.shape, self.stride)
            )
        )


def spec_of(value: Tensor) -> TensorSpec:
    """The TensorSpec that a tensor fits."""
    return TensorSpec(shape=tuple(value.shape), stride=value.stride(), dtype=value.dtype, device=value.device)


def _steps(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    return [step for size, step in zip(shape, stride, strict=True) if size != 1 and 0 not in shape]


@dataclass(kw_only=True)
class Argument:
    """One argument: its name, the tree's structure as text, and leaf by leaf its path and a TensorSpec or the constant it is.

    seen: the structure of a tree that fitted, which is cheaper to compare than its text."""

    name: str
    structure: str
    paths: tuple[str, ...]
    leaves: tuple[Any, ...]
    seen: pytree.TreeSpec | None = field(default=None, compare=False)

    @classmethod
    def of(cls, name: str, value: Tree) -> Argument:
        """The argument that `value` is an example of."""
        pairs, spec = pytree.tree_flatten_with_path(value)
        return cls(
            name=name,
            structure=str(spec),
            paths=tuple(name + pytree.keystr(path) for path, _ in pairs),
            leaves=tuple(spec_of(leaf) if isinstance(leaf, Tensor) else leaf for _, leaf in pairs),
            seen=spec,
        )

    @property
    def specs(self) -> list[TensorSpec]:
        """Of the tensors alone, in order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorSpec)]

    @property
    def tensor_paths(self) -> list[str]:
        return [path for path, leaf in zip(self.paths, self.leaves, strict=True) if isinstance(leaf, TensorSpec)]

    def tensors(self, program: str, value: Tree) -> list[Tensor]:
        """The tensors of `value`; raises CompileError, which names the first leaf that is otherwise than lowered."""
        values, spec = pytree.tree_flatten(value)
        if spec != self.seen:
            if str(spec) != self.structure:
                self._refuse_structure(program, value)
            self.seen = spec
        found = []
        for path, leaf, given in zip(self.paths, self.leaves, values, strict=True):
            if isinstance(leaf, TensorSpec):
                if not leaf.fits(given):
                    raise _unfit(program, path, _described(given, leaf), _described(leaf, leaf))
                found.append(given)
            elif given is not leaf and (isinstance(given, Tensor) or given != leaf):
                raise _unfit(program, path, _described(given), shown(leaf))
        return found

    def tree(self, tensors: Iterable[Tensor]) -> Tree:
        """The argument that has these tensors; the inverse of `tensors`."""
        assert self.seen is not None, "a structure is known as an object where it was lowered"
        left = iter(tensors)
        values = [next(left) if isinstance(leaf, TensorSpec) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(values, self.seen)

    def _refuse_structure(self, program: str, value: Tree) -> None:
        given = [self.name + pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(value)[0]]
        for path in [*self.paths, *given]:
            if (path in given) != (path in self.paths):
                raise _unfit(program, path, *(("nothing", "a leaf") if path in self.paths else ("a leaf", "nothing")))
        spec = pytree.tree_structure(value)
        raise _unfit(program, self.name, shown(str(spec), 200), shown(self.structure, 200))


def _described(value: Any, beside: TensorSpec | None = None) -> str:
    """A leaf for a message; strides are said where shape, dtype and device are as in `beside`."""
    if not isinstance(value, (Tensor, TensorSpec)):
        return shown(value)
    text = f"{value.dtype} {tuple(value.shape)} on {value.device or 'any device'}".removeprefix("torch.")
    stride = value.stride() if isinstance(value, Tensor) else value.stride
    return text if beside is None else f"{text} with strides {tuple(stride)}"


def _unfit(program: str, path: str, found: str, expected: str) -> CompileError:
    return CompileError(
        f"{program}: {path} is {found} but was lowered as {expected}; pass that, or lower the function for what you have."
    )
