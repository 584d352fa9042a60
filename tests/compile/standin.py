"""What stands for torch.cuda on a CPU: a graph that records ops and replays them, and fails on what a real capture would.

A real graph runs nothing while it is captured. So does this one, in effect: what was written in place is put back."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero")
FACTORIES = ("empty", "zeros", "ones", "full", "arange", "empty_strided", "scalar_tensor")


class Recording(TorchDispatchMode):
    def __init__(self, factories: Collection[str] = FACTORIES) -> None:
        super().__init__()
        self.factories = factories
        self.calls: list[Any] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in SYNCS:
            raise RuntimeError(f"{name} synchronizes while a graph is captured")
        if name in self.factories:
            raise RuntimeError(f"{name} allocates while a graph is captured")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.setdefault(id(value), (value, value.clone()))
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Graph:
    """As torch.cuda.CUDAGraph."""

    num_replays = 0
    factories: Collection[str] = FACTORIES  # ops that may not be captured, as they allocate

    def capture_begin(self, pool: Any = None) -> None:
        self._pool = pool or object()
        self.recording = Recording(self.factories)
        self.recording.__enter__()
        StandIn.capturing = True

    def capture_end(self) -> None:
        StandIn.capturing = False
        self.recording.__exit__(None, None, None)
        for tensor, value in self.recording.before.values():
            tensor.copy_(value)

    def replay(self) -> None:
        self.num_replays += 1
        for func, args, kwargs, out in self.recording.calls:
            for kept, made in zip(pytree.tree_leaves(out), pytree.tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != made.data_ptr():
                    kept.copy_(made)

    def pool(self) -> Any:
        return self._pool


class Stream:
    def wait_stream(self, other: Any) -> None:
        assert not StandIn.capturing

    def record(self) -> None:
        StandIn.events.append("record")

    synchronize = record


class StandIn:
    """As the module torch.cuda."""

    capturing = False
    events: list[str] = []  # noqa: RUF012
    Stream = Event = Stream

    @staticmethod
    def current_stream() -> Any:
        return Stream()

    @staticmethod
    @contextmanager
    def stream(stream: Any) -> Any:
        yield

    @staticmethod
    def synchronize() -> None:
        if StandIn.capturing:
            raise RuntimeError("synchronize while a graph is captured")
