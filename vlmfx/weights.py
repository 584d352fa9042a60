"""ParamSpec: one declaration of a weight, from which loading, saving, random init and abstract shapes each follow as one tree map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from vlmfx.errors import CheckpointError
from vlmfx.tree import Tree, leaves, tree_map

MAX_NAMED = 8  # keys of one kind in an error


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """A weight as the model wants it, and where a published checkpoint keeps it.

    sources: (name, shape) of each checkpoint tensor, joined along their first axis and then reshaped to `shape`; several
    sources make one fused matrix (q, k and v), a reshape makes a convolution whose stride is its kernel a matmul.
    axes: the logical axis of each dimension ("vocab", "embed", "heads", "mlp", None), for sharding. init: "normal" | "ones" | "zeros".
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    init: str = "normal"


def spec(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], *, init: str = "normal") -> ParamSpec:
    """The spec of a weight that is stored as it is used."""
    return ParamSpec(shape=shape, axes=axes, sources=((name, shape),), init=init)


def fused(
    names: list[str], rows: list[int], rest: tuple[int, ...], axes: tuple[str | None, ...], *, init: str = "normal"
) -> ParamSpec:
    """The spec of several stored matrices, rows[i] × rest each, used as one."""
    sources = tuple((name, (n, *rest)) for name, n in zip(names, rows, strict=True))
    return ParamSpec(shape=(sum(rows), *rest), axes=axes, sources=sources, init=init)


def source_names(specs: Tree) -> set[str]:
    """Every checkpoint name that the specs read."""
    return {name for s in leaves(specs) for name, _ in s.sources}


def load(specs: Tree, read: Callable[[str], Tensor], *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tree:
    """The parameter tree, cast to dtype on device; read(name) gives a checkpoint tensor by its published name.

    A single stored tensor that already has the right dtype and device is used as it is, so a memory-mapped file stays mapped."""

    def one(s: ParamSpec) -> Tensor:
        parts = [read(name).to(device=device, dtype=dtype) for name, _ in s.sources]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(s.shape)

    return tree_map(one, specs)


def save(specs: Tree, params: Tree) -> dict[str, Tensor]:
    """The inverse of `load`: checkpoint name → tensor, in the published names and shapes."""
    out: dict[str, Tensor] = {}
    for s, value in zip(leaves(specs), leaves(params), strict=True):
        flat, start = value.detach().reshape(-1), 0
        for name, shape in s.sources:
            out[name] = flat[start : start + prod(shape)].reshape(shape).contiguous()
            start += prod(shape)
    return out


def init(
    specs: Tree,
    *,
    seed: int = 0,
    std: float = 0.02,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tree:
    """A random parameter tree: normal(0, std) matrices, unit norms, zero biases."""
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def one(s: ParamSpec) -> Tensor:
        if s.init == "normal":
            return (torch.randn(s.shape, generator=generator) * std).to(device=device, dtype=dtype)
        return torch.full(s.shape, 1.0 if s.init == "ones" else 0.0, device=device, dtype=dtype)

    return tree_map(one, specs)


def abstract(specs: Tree, *, dtype: torch.dtype = torch.float32) -> Tree:
    """The parameter tree on the meta device: shapes and dtypes, no memory."""
    return tree_map(lambda s: torch.empty(s.shape, dtype=dtype, device="meta"), specs)


def check(
    specs: Tree,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    where: str,
    ignored: Callable[[str], bool] = lambda name: False,
) -> None:
    """Raise one CheckpointError that names the missing, unexpected and wrongly shaped keys, the first MAX_NAMED of each kind.

    shapes is name → stored shape."""
    wanted = {name: shape for s in leaves(specs) for name, shape in s.sources}
    missing = [f"{name} is missing" for name in wanted if name not in shapes]
    misshapen = [
        f"{name} has shape {tuple(shapes[name])}, expected {shape}"
        for name, shape in wanted.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    unexpected = [
        f"{name} is not a weight of this model" for name in shapes if name not in wanted and not ignored(name)
    ]
    count = len(missing) + len(misshapen) + len(unexpected)
    if count:
        named = [
            problem
            for kind in (missing, misshapen, unexpected)
            for problem in (
                *kind[:MAX_NAMED],
                *([f"and {len(kind) - MAX_NAMED} more"] if len(kind) > MAX_NAMED else []),
            )
        ]
        raise CheckpointError(
            f"{where}: {count} keys do not fit config.json: {'; '.join(named)}; "
            "use the config.json that was saved with these weights."
        )
