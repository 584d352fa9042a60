"""Ahead-of-time packages: what is in them, and loading them with no compiler in the process.

A package is a program of this machine's own kind, and loading it runs it: load none that you did not build or do not trust."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vlmfx.compile.argument import Argument, TensorSpec
from vlmfx.compile.compiled import Compiled, Program
from vlmfx.compile.signature import Outputs, Signature, Source
from vlmfx.errors import CompileError, reason_of

KEY = "vlmfx"  # of our part of a package's metadata
MODEL = "model"  # AOTInductor's name for the only program in a package


def load(path: str | os.PathLike[str]) -> Compiled:
    """The program that `Compiled.save` wrote. Raises CompileError for a file that is no package of this torch."""
    file = Path(path)
    try:
        metadata = _packages().load_metadata_from_package(str(file), MODEL)
    except RuntimeError as error:
        raise CompileError(f"{file.name} cannot be read as a package ({reason_of(error)}); export it again.") from None
    if KEY not in metadata:
        raise CompileError(f"{file.name} was not written by vlmfx, which needs its own metadata; export it with vlmfx.")
    found = json.loads(metadata[KEY])
    if found["torch"] != str(torch.__version__):
        raise CompileError(
            f"{file.name} was built by torch {found['torch']} but this is {torch.__version__}; export it again with this torch."
        )
    return Compiled(
        signature=signature_of(found),
        program=program(file),
        backend="aot",
        constant_bytes=found["constant_bytes"],
        package=file,
    )


def program(file: Path) -> Program:
    """The package's program of flat tensors, which it writes in place where its function does."""
    # With libstdc++ in the global scope first: a package has parts of its own, with which std::regex crashes otherwise.
    ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)
    try:
        # Single-threaded, as only so a CUDA graph can capture it; one runner, on the device it was built for.
        loader = _packages()(str(file), MODEL, True, 1, -1)
    except RuntimeError as error:
        raise CompileError(
            f"{file.name} cannot be loaded ({reason_of(error)}); export it again on this machine."
        ) from None

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        # A program has no gradient, and what it calls of ours is then called by the dispatcher once, not twice.
        with torch._C._AutoDispatchBelowAutograd():
            outputs: Sequence[Tensor] = loader.run(tensors)
        return outputs

    return run


@cache
def _packages() -> Any:
    return torch._C._aoti.AOTIModelPackageLoader


def metadata_of(signature: Signature, constant_bytes: int) -> dict[str, str]:
    """What a package carries beside its code: the signature and the torch that built it. Raises CompileError for a signature that
    cannot be written, such as one with a number type of its own."""
    out = signature.outputs
    try:
        text = json.dumps(
            {
                "torch": str(torch.__version__),
                "name": signature.name,
                "constant_bytes": constant_bytes,
                "arguments": [
                    {"name": a.name, "structure": a.structure, "paths": a.paths, "leaves": [_leaf(v) for v in a.leaves]}
                    for a in signature.arguments
                ],
                "structure": pytree.treespec_dumps(out.structure),
                "sources": out.sources,
                "outputs": [_leaf(spec) for spec in out.specs],
            }
        )
    except (TypeError, NotImplementedError) as error:
        raise CompileError(
            f"{signature.name}: a package cannot hold its signature ({reason_of(error)}); name configs in static, "
            "and return tuples, lists, dicts and nodes of tensors."
        ) from None
    return {KEY: text}


def signature_of(found: dict[str, Any]) -> Signature:
    """The signature that `metadata_of` wrote."""
    return Signature(
        name=found["name"],
        arguments=tuple(
            Argument(
                name=a["name"],
                structure=a["structure"],
                paths=tuple(a["paths"]),
                leaves=tuple(map(_from_leaf, a["leaves"])),
            )
            for a in found["arguments"]
        ),
        outputs=Outputs(
            structure=pytree.treespec_loads(found["structure"]),
            sources=tuple(Source(*source) for source in found["sources"]),
            specs=tuple(map(_from_leaf, found["outputs"])),
        ),
    )


def _leaf(value: Any) -> dict[str, Any]:
    if not isinstance(value, TensorSpec):
        return {"constant": value}
    dtype = str(value.dtype).removeprefix("torch.")
    return {"shape": value.shape, "stride": value.stride, "dtype": dtype, "device": str(value.device)}


def _from_leaf(value: dict[str, Any]) -> Any:
    if "constant" in value:
        return value["constant"]
    return TensorSpec(
        shape=tuple(value["shape"]),
        stride=tuple(value["stride"]),
        dtype=getattr(torch, value["dtype"]),
        device=torch.device(value["device"]),
    )
