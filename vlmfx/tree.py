"""Maps and paths over trees: nested dicts and lists whose leaves are tensors or ParamSpecs, and dataclasses that are `node`s."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, TypeVar

from torch.utils import _pytree as pytree

Tree = Any  # a leaf, or a dict, list or node of trees
T = TypeVar("T")


def node(*static: str) -> Callable[[type[T]], type[T]]:
    """Decorates a frozen dataclass whose fields are trees, but for the static ones, which are part of the tree's shape: programs that
    are traced have these fixed. Static values can be compared and hashed, and JSON can hold them."""

    def register(cls: type[T]) -> type[T]:
        names = tuple(f.name for f in fields(cls) if f.name not in static)  # type: ignore[arg-type]

        def flatten(value: T) -> tuple[list[Any], tuple[Any, ...]]:
            return [getattr(value, name) for name in names], tuple(getattr(value, name) for name in static)

        def unflatten(children: Any, context: tuple[Any, ...]) -> T:
            return cls(**dict(zip(names, children, strict=True)), **dict(zip(static, context, strict=True)))

        def flatten_with_keys(value: T) -> tuple[list[Any], tuple[Any, ...]]:
            children, context = flatten(value)
            return [(pytree.GetAttrKey(name), child) for name, child in zip(names, children, strict=True)], context

        pytree.register_pytree_node(
            cls,
            flatten,
            unflatten,
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            to_dumpable_context=list,
            from_dumpable_context=_as_tuples,
            flatten_with_keys_fn=flatten_with_keys,
        )
        return cls

    return register


def _as_tuples(value: Any) -> Any:
    """What JSON made lists of; static values are hashable, so none was a list."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


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
