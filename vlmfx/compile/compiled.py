"""Compiled: a program that runs. It takes the trees that its function takes, checked against what it was lowered for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from torch import Tensor

from vlmfx.compile.signature import Signature
from vlmfx.errors import CompileError, reason_of
from vlmfx.tree import Tree

Program = Callable[[Sequence[Tensor]], Sequence[Tensor]]  # input tensors to output tensors, in the signature's order


class Memory(NamedTuple):
    """Bytes of a program: its arguments, the outputs it makes, its constants, and what a call needs besides; None where not known."""

    argument: int
    output: int
    constant: int
    temp: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Compiled:
    """A program; call it as its function, without the static arguments. It never recompiles: what it was not lowered for is a
    CompileError, before any compute. A call has no gradient; run single-threaded, since programs may own buffers.

    program: of flat tensors, in the signature's order, unchecked. package: the file of an ahead-of-time program, in a folder
    that lives as long as this does."""

    signature: Signature
    program: Program
    backend: str
    constant_bytes: int = 0
    package: Path | None = None
    folder: TemporaryDirectory[str] | None = None

    def __call__(self, *args: Tree) -> Tree:
        tensors = self.signature.tensors(args)
        return self.signature.outputs.tree(tensors, self.program(tensors))

    def partial(self, *first: Tree) -> Callable[..., Tree]:
        """The program of the remaining arguments: the first ones (parameters, a cache) are flattened and checked once, here."""
        fixed, count = self.signature.tensors(first, 0, len(first)), len(first)

        def call(*rest: Tree) -> Tree:
            tensors = fixed + self.signature.tensors(rest, count)
            return self.signature.outputs.tree(tensors, self.program(tensors))

        return call

    def memory_analysis(self) -> Memory:
        """Bytes by kind; an output that is an argument counts as argument alone."""
        return Memory(
            argument=sum(spec.nbytes for spec in self.signature.specs),
            output=sum(spec.nbytes for spec in self.signature.outputs.specs),
            constant=self.constant_bytes,
            temp=None,  # no backend tells
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the package, whole or not at all, to a path that ends in .pt2. Raises CompileError."""
        target = Path(path)
        if self.package is None:
            raise CompileError(
                f'{self.signature.name}: backend {self.backend} keeps no file; compile with backend="aot" to save.'
            )
        if target.suffix != ".pt2":
            raise CompileError(
                f"{self.signature.name}: path {target.name!r} must end in .pt2, as packages do; rename it."
            )
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            shutil.copyfile(self.package, part)
            os.replace(part, target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise CompileError(
                f"{self.signature.name}: {target.name} cannot be written ({reason_of(error)}); choose a place with room that is writable."
            ) from None
