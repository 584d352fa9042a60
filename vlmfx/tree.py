"""Maps and paths over parameter trees: nested dicts and lists whose leaves are tensors or ParamSpecs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils import _pytree as pytree

Tree = Any  # a leaf, or a dict or list of trees


def tree_map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """A tree of fn(leaf, *leaves of rest), with the shape of the first tree."""
    return pytree.tree_map(fn, tree, *rest)


def leaves(tree: Tree) -> list[Any]:
    """The leaves in a fixed order: dicts by insertion, lists by index."""
    return pytree.tree_leaves(tree)


def items(tree: Tree, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) pairs; a path joins keys and indices with dots: "text.layers.0.mlp.down"."""
    if isinstance(tree, dict):
        children = tree.items()
    elif isinstance(tree, list):
        children = enumerate(tree)  # type: ignore[assignment]
    else:
        yield path, tree
        return
    for key, child in children:
        yield from items(child, f"{path}.{key}" if path else str(key))
