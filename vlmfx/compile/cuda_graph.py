"""CapturedProgram: a program recorded once as a graph of its device, then replayed, which costs the host one call.

Written against `torch.cuda` and `torch.cuda.CUDAGraph`; `torch.mlu` has the same names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmfx.compile.argument import TensorSpec
from vlmfx.compile.compiled import Program
from vlmfx.errors import CompileError

ALIGNMENT = 256  # bytes between inputs that share a buffer, as a device's allocator keeps them apart


class CapturedProgram:
    """The program of flat tensors, by replay. The outputs are the same tensors at each call, and the next one overwrites them.

    fixed: places of inputs that are read and written where they are, such as weights and caches; they must be the same tensors at each
    call. All others are copied to buffers of this object first: those that the first call has on the host in one transfer from
    pinned memory, those on the device one by one. pool: a graph memory, such as another's `pool()`, for programs that do not run at
    once. api, graph: torch.cuda and torch.cuda.CUDAGraph, or what stands for them."""

    def __init__(
        self,
        program: Program,
        *,
        name: str,
        specs: Sequence[TensorSpec],
        fixed: Collection[int],
        device: torch.device,
        api: Any,
        graph: Any,
        pool: Any = None,
    ) -> None:
        self.program, self.name, self.specs, self.fixed = program, name, list(specs), frozenset(fixed)
        # With its number, which tensors have: "cuda" is not equal to "cuda:0".
        self.device = torch.empty(0, device=device).device
        self.api, self.pool_handle = api, pool
        self.graph = graph()
        self.outputs: list[Tensor] | None = None

    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.outputs is None:
            return self._capture(tensors)
        self._check(tensors)
        self._copy_in(tensors)
        self.graph.replay()
        return self.outputs

    def pool(self) -> Any:
        """The graph's memory, to be shared with programs captured later; there is one after the first call."""
        return self.graph.pool()

    def _capture(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The first call: the program runs as it is, which loads kernels and makes scratch memory, and is then recorded, which runs
        nothing; so what it writes in place is written once."""
        self._allocate(tensors)
        self._copy_in(tensors)
        side = self.api.Stream()
        side.wait_stream(self.api.current_stream())
        with self.api.stream(side):
            first = self.program(self.inputs)
            self.api.synchronize()
            # Other threads may be freeing pinned memory, or be collecting garbage that lies on the device.
            mode = {"capture_error_mode": "thread_local"} if self.device.type == "cuda" else {}
            self.graph.capture_begin(*([] if self.pool_handle is None else [self.pool_handle]), **mode)
            try:
                outputs = list(self.program(self.inputs))
            finally:
                self.graph.capture_end()
            for output, value in zip(outputs, first, strict=True):
                output.copy_(value)
        self.api.current_stream().wait_stream(side)
        self.outputs = outputs
        return outputs

    def _allocate(self, tensors: Sequence[Tensor]) -> None:
        moving = [i for i in range(len(tensors)) if i not in self.fixed]
        self.from_host = [i for i in moving if tensors[i].device != self.device]
        self.from_device = [i for i in moving if tensors[i].device == self.device]
        size = sum(_padded(self.specs[i]) for i in self.from_host)
        is_pinned = self.device.type != "cpu"  # pinning is for a device to read; a stand-in has none
        self.staging = torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned)
        self.packed = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.staged = dict(
            zip(self.from_host, _views(self.staging, [self.specs[i] for i in self.from_host]), strict=True)
        )
        self.inputs = list(tensors)
        for i, view in zip(self.from_host, _views(self.packed, [self.specs[i] for i in self.from_host]), strict=True):
            self.inputs[i] = view
        for i in self.from_device:
            self.inputs[i] = torch.empty_strided(
                self.specs[i].shape, self.specs[i].stride, dtype=self.specs[i].dtype, device=self.device
            )
        self.addresses = {i: tensors[i].data_ptr() for i in self.fixed}
        self.sent = self.api.Event()

    def _check(self, tensors: Sequence[Tensor]) -> None:
        for i, address in self.addresses.items():
            if tensors[i].data_ptr() != address:
                raise CompileError(
                    f"{self.name}: input tensor {i}, of shape {tuple(tensors[i].shape)}, is fixed but not the one that was captured; "
                    "pass the same tensor, or do not name its argument in fixed or donate."
                )
        for i in self.from_host:
            if tensors[i].device == self.device:
                raise self._moved(i, tensors[i])
        for i in self.from_device:
            if tensors[i].device != self.device:
                raise self._moved(i, tensors[i])

    def _moved(self, i: int, tensor: Tensor) -> CompileError:
        before = "the host" if i in self.from_host else self.device
        return CompileError(
            f"{self.name}: input tensor {i}, of shape {tuple(tensor.shape)}, is on {tensor.device} but was on {before} at the first "
            "call; pass it there."
        )

    def _copy_in(self, tensors: Sequence[Tensor]) -> None:
        if self.from_host:
            self.sent.synchronize()  # the transfer before this one has read the staging buffer
            for i, view in self.staged.items():
                view.copy_(tensors[i])
            self.packed.copy_(self.staging, non_blocking=True)
            self.sent.record()
        for i in self.from_device:
            if tensors[i].data_ptr() != self.inputs[i].data_ptr():
                self.inputs[i].copy_(tensors[i])


def _extent(spec: TensorSpec) -> int:
    """Bytes from the first element to the last."""
    if 0 in spec.shape:
        return 0
    last = sum((size - 1) * step for size, step in zip(spec.shape, spec.stride, strict=True))
    return (last + 1) * spec.dtype.itemsize


def _padded(spec: TensorSpec) -> int:
    return -(-_extent(spec) // ALIGNMENT) * ALIGNMENT


def _views(buffer: Tensor, specs: Sequence[TensorSpec]) -> list[Tensor]:
    """Tensors of these kinds, one after another in a buffer of bytes."""
    views, start = [], 0
    for spec in specs:
        flat = buffer[start : start + _extent(spec)].view(spec.dtype)
        views.append(flat.as_strided(spec.shape, spec.stride))
        start += _padded(spec)
    return views
