"""Abstract values: what stands for tensors while a function is traced, so that nothing is allocated.

A tree of meta tensors, such as `weights.abstract` gives, is abstract; so is one of tensors, of fake tensors and of ShapeDtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmfx.device import resolve_device
from vlmfx.errors import CompileError
from vlmfx.tree import Tree, leaves, tree_map
from vlmfx.weights import ParamSpec

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


@dataclass(frozen=True)
class ShapeDtype:
    """A contiguous tensor that is yet to be."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def eval_shape(fn: Callable[..., Tree], *abstract: Tree) -> Tree:
    """The tree that fn(*abstract) would give, of meta tensors: shapes and dtypes, no memory, no compute.

    abstract: trees of tensors, meta or fake tensors or ShapeDtypes; fn gets other leaves as they are."""
    with tracing() as mode:
        result = fn(*(fake(value, mode, target_device(abstract)) for value in abstract))
    return as_meta(result)


def as_meta(tree: Tree) -> Tree:
    """The same tree of meta tensors, strides and all, which `.to("meta")` does not keep."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")

    return tree_map(one, tree)


@contextmanager
def tracing() -> Iterator[FakeTensorMode]:
    """A new fake mode, entered, without gradients: ops tell shapes and do nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports the compiler when first used

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def target_device(abstract: Tree, device: str | torch.device | None = None) -> torch.device:
    """The device to trace for: the one asked for, or that of the first tensor which has one, or the CPU. Raises DeviceError."""
    found = [leaf.device for leaf in leaves(abstract) if isinstance(leaf, Tensor) and not leaf.is_meta]
    return resolve_device(device if device is not None else found[0] if found else "cpu")


def fake(abstract: Tree, mode: FakeTensorMode, device: torch.device) -> Tree:
    """The same tree of mode's fake tensors; a tensor keeps its strides, and its device if it has one."""

    def one(leaf: Any) -> Any:
        with mode:
            if isinstance(leaf, ShapeDtype):
                return torch.empty(leaf.shape, dtype=leaf.dtype, device=device)
            if isinstance(leaf, Tensor):
                at = device if leaf.is_meta else leaf.device
                return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=at)
        if isinstance(leaf, ParamSpec):
            raise CompileError(
                f"ParamSpec {leaf.sources[0][0]} has no dtype; pass `weights.abstract(specs, dtype=...)` in its place."
            )
        return leaf

    return tree_map(one, abstract)
