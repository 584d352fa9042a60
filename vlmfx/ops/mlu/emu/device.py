"""A pretend `mlu` device in this process, as importing torch_mlu makes a real one: the module torch.mlu and tensors in host memory.

It can be made once and not unmade, so whoever wants it is a process of its own. Graphs are recorded op by op and replayed."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch

from vlmfx.ops.mlu.emu import build

MEMORY = 24 << 30  # bytes that the pretend card says it has
NUM_CORES = 16


class Properties(NamedTuple):
    """As torch_mlu's DeviceProp, what vlmfx reads of it."""

    name: str = "MLU370 (emulated)"
    multi_processor_count: int = NUM_CORES
    total_memory: int = MEMORY


class Event:
    """Work is done when it is launched: there is nothing to wait for."""

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Stream:
    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...


def install(graph: Any = None) -> ModuleType:
    """Make the device, load the emulated kernels where `vlmfx.ops.mlu.load` finds them, and return torch.mlu.

    graph: what stands for torch.mlu.MLUGraph. Raises CompileError."""
    library = ctypes.CDLL(str(build.device()))
    library.mlu_register_hooks()
    os.environ["VLMFX_MLU_LIBRARY"] = str(build.library())
    module: Any = ModuleType("torch.mlu")

    @contextmanager
    def stream(of: Stream) -> Iterator[None]:
        yield

    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.get_device_name = lambda device=None: Properties().name
    module.get_device_properties = lambda device=None: Properties()
    module.mem_get_info = lambda device=None: (MEMORY, MEMORY)
    module.memory_reserved = module.memory_allocated = module.max_memory_allocated = lambda device=None: 0
    module.reset_peak_memory_stats = lambda device=None: None
    module.synchronize = lambda device=None: None
    module.Event, module.Stream, module.stream = Event, Stream, stream
    module.current_stream = lambda device=None: Stream()
    module.manual_seed_all = lambda seed: None
    module._is_in_bad_fork = lambda: False
    module.get_rng_state = lambda device=0: torch.get_rng_state()
    module.set_rng_state = lambda state, device=0: None
    module.get_amp_supported_dtype = lambda: [torch.float16]
    module.capturing = lambda on: library.mlu_capturing(int(on))
    if graph is not None:
        module.MLUGraph = graph
    utils: Any = torch.utils  # whose stub does not export what is documented
    utils.rename_privateuse1_backend("mlu")
    torch._register_device_module("mlu", module)
    utils.generate_methods_for_privateuse1_backend()
    return module
