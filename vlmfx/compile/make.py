"""How a planned executor gets its programs: captured as a graph of the device, compiled in this process, or loaded from packages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vlmfx.compile.argument import spec_of
from vlmfx.compile.compiled import Compiled
from vlmfx.compile.cuda_graph import CapturedProgram
from vlmfx.compile.executor import Run, moved
from vlmfx.compile.stages import jit
from vlmfx.errors import DeviceError
from vlmfx.tree import Tree

Load = Callable[[str, int], Compiled]  # program, bucket → the package's


class Compiling:
    """Programs compiled here and now by a backend of `Lowered.compile`."""

    def __init__(self, backend: str, device: torch.device) -> None:
        self.backend, self.device = backend, device

    def __call__(self, name: str, size: int, fn: Callable[..., Tree], bound: tuple[Tree, ...], inputs: Tree) -> Run:
        program = jit(fn, donate=(1,) if len(bound) > 1 else ()).lower(*bound, moved(inputs, self.device))
        return _on_device(program.compile(self.backend), bound, self.device)


class Loading:
    """Programs of packages."""

    def __init__(self, load: Load, device: torch.device) -> None:
        self.load, self.device = load, device

    def __call__(self, name: str, size: int, fn: Callable[..., Tree], bound: tuple[Tree, ...], inputs: Tree) -> Run:
        return _on_device(self.load(name, size), bound, self.device)


def _on_device(program: Compiled, bound: tuple[Tree, ...], device: torch.device) -> Run:
    call = program.partial(*bound)
    return lambda inputs: call(moved(inputs, device))


class Capturing:
    """Programs recorded as graphs of a GPU or an MLU, which share one memory; of the functions themselves, or of packages by load."""

    def __init__(self, device: torch.device, load: Load | None = None) -> None:
        self.device, self.load = device, load
        self.api, self.graph = graph_api(device)
        self._pool: Any = None

    def __call__(self, name: str, size: int, fn: Callable[..., Tree], bound: tuple[Tree, ...], inputs: Tree) -> Run:
        fixed = [leaf for leaf in pytree.tree_leaves(bound) if isinstance(leaf, Tensor)]
        tensors = _tensors(inputs)
        result: list[pytree.TreeSpec] = []  # the structure, once it has run
        program = self._loaded if self.load is not None else self._plain
        captured = CapturedProgram(
            program(name, size, fn, bound, inputs, result),
            name=f"{name} of {size}",
            specs=[spec_of(t) for t in (*fixed, *tensors)],
            fixed=range(len(fixed)),
            device=self.device,
            api=self.api,
            graph=self.graph,
            pool=self._pool,
        )

        def run(inputs: Tree) -> Any:
            out = captured([*fixed, *_tensors(inputs)])
            if self._pool is None:
                self._pool = captured.pool()
            return pytree.tree_unflatten(list(out), result[0])

        return run

    def _plain(
        self, name: str, size: int, fn: Callable[..., Tree], bound: tuple[Tree, ...], inputs: Tree, result: list[Any]
    ) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
        leaves, structure = pytree.tree_flatten(inputs)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def flat(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            values = list(leaves)
            for place, tensor in zip(places, tensors[-len(places) :], strict=True):
                values[place] = tensor
            with torch.no_grad():
                out, result[:] = _flattened(fn(*bound, pytree.tree_unflatten(values, structure)))
            return out

        return flat

    def _loaded(
        self, name: str, size: int, fn: Callable[..., Tree], bound: tuple[Tree, ...], inputs: Tree, result: list[Any]
    ) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
        assert self.load is not None
        package = self.load(name, size)
        package.signature.tensors((*bound, moved(inputs, self.device)))  # refuses what does not fit

        def flat(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            out, result[:] = _flattened(package.signature.outputs.tree(tensors, package.program(tensors)))
            return out

        return flat


def _flattened(tree: Tree) -> tuple[list[Tensor], list[pytree.TreeSpec]]:
    out, structure = pytree.tree_flatten(tree)
    return out, [structure]


def _tensors(tree: Tree) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def graph_api(device: torch.device) -> tuple[Any, Any]:
    """(module, graph class) of a device that can record graphs. Raises DeviceError for another."""
    if device.type == "cuda":
        return torch.cuda, torch.cuda.CUDAGraph
    mlu: Any = getattr(torch, "mlu", None)
    if device.type == "mlu" and hasattr(mlu, "MLUGraph"):
        return mlu, mlu.MLUGraph
    raise DeviceError(
        f'graphs need "cuda", or "mlu" with torch_mlu, but the device is "{device}"; use backend="eager".'
    )
