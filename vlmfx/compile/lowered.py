"""Lowered: a function's graph for fixed shapes, to be read, weighed and compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmfx.compile.bind import Bound
from vlmfx.compile.compiled import Compiled
from vlmfx.compile.signature import Signature
from vlmfx.errors import CompileError, shown
from vlmfx.ops.registry import Cost

if TYPE_CHECKING:
    from torch.export import ExportedProgram


@dataclass(frozen=True, kw_only=True, eq=False)
class Lowered:
    """A function that was traced. bound: the function of flat tensors; exported: its graph; donate: arguments that it may write;
    device: what it was traced for."""

    signature: Signature
    bound: Bound
    exported: ExportedProgram
    donate: frozenset[str]
    device: torch.device

    def as_text(self) -> str:
        """The graph, one operation a line with shapes, below a list of which input is which."""
        inputs = "".join(f"# tensors_{i}: {path}\n" for i, path in enumerate(self.signature.paths))
        return inputs + str(self.exported.graph_module.print_readable(print_output=False))

    def cost_analysis(self) -> Cost:
        """Operations and bytes of one call: contracts' for our ops, of others every input and output once; see `cost`."""
        from vlmfx.compile.cost import cost

        return cost(self.exported)

    def compile(self, backend: str = "inductor", **options: Any) -> Compiled:
        """The program that runs, by a backend: "eager", "cuda_graph", "inductor", "inductor+cuda_graph", "aot" or "mlu_graph"; options are
        its own.

        Raises CompileError for a backend or option that there is not, DeviceError where the device lacks it."""
        from vlmfx.compile.backends import BACKENDS

        if backend not in BACKENDS:
            raise CompileError(f"backend is {shown(backend)} but must be one of {', '.join(BACKENDS)}; choose one.")
        return BACKENDS[backend](self, options)

    @property
    def constants(self) -> list[Tensor]:
        """The tensors that the function holds itself; in the graph they come before its arguments."""
        held = {**self.exported.state_dict, **self.exported.constants}
        targets = (spec.target for spec in self.exported.graph_signature.input_specs if spec.target is not None)
        return [held[target] for target in targets]

    @property
    def constant_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.constants)
