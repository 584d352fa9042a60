"""Backends: each makes of a lowered function a program that runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfx.compile.bind import split
from vlmfx.compile.compiled import Compiled, Program
from vlmfx.compile.cuda_graph import CapturedProgram
from vlmfx.compile.lowered import Lowered
from vlmfx.compile.package import metadata_of, program
from vlmfx.errors import CompileError, DeviceError, shown
from vlmfx.ops.registry import traced_ops

Options = dict[str, Any]


def eager(lowered: Lowered, options: Options) -> Compiled:
    """The function itself."""
    _refuse_unknown("eager", options, ())
    return _compiled(lowered, "eager", _function(lowered))


def inductor(lowered: Lowered, options: Options) -> Compiled:
    """The graph compiled by Inductor, here and now. options: Inductor's.

    Dynamo takes no part: its guards cost a call more than a small program does, and might compile anew behind our back."""
    return _compiled(lowered, "inductor", _inductor_program(lowered, "inductor", options))


def aot(lowered: Lowered, options: Options) -> Compiled:
    """The graph compiled by AOTInductor to a package, and that loaded; weights are arguments like others. options: Inductor's."""
    import torch._inductor

    _refuse_unknown("aot", options, torch._inductor.list_options())
    lowered = _fusible(lowered)
    metadata = metadata_of(lowered.signature, lowered.constant_bytes)
    folder = tempfile.TemporaryDirectory(prefix="vlmfx-")
    package = Path(folder.name) / "program.pt2"
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(
            lowered.exported,
            package_path=str(package),
            inductor_configs={**options, "aot_inductor.metadata": metadata},
        )
    return _compiled(lowered, "aot", program(package), package=package, folder=folder)


def cuda_graph(lowered: Lowered, options: Options) -> Compiled:
    """The function itself in a CUDA graph, captured at the first call. options: fixed, the arguments that stay where they are, such as
    parameters, beside the donated ones; pool, a graph memory to share."""
    _refuse_unknown("cuda_graph", options, ("fixed", "pool"))
    _need_cuda(lowered, "cuda_graph", "eager")
    run = _function(lowered)
    return _captured(lowered, "cuda_graph", run, options, api=torch.cuda, graph=torch.cuda.CUDAGraph)


def inductor_cuda_graph(lowered: Lowered, options: Options) -> Compiled:
    """As cuda_graph, of Inductor's program; options that are not fixed and pool are Inductor's."""
    backend = "inductor+cuda_graph"
    _need_cuda(lowered, backend, "inductor")
    others = {key: value for key, value in options.items() if key not in ("fixed", "pool")}
    inner = _inductor_program(lowered, backend, others)
    return _captured(lowered, backend, inner, options, api=torch.cuda, graph=torch.cuda.CUDAGraph)


def mlu_graph(lowered: Lowered, options: Options) -> Compiled:
    """The function itself in an MLU graph, captured at the first call. options: fixed and pool, as for CUDA."""
    name = lowered.signature.name
    api: Any = getattr(torch, "mlu", None)
    if not hasattr(api, "MLUGraph"):
        raise DeviceError(
            f'{name}: backend mlu_graph needs torch_mlu, which is not imported; import it or use "eager".'
        )
    if lowered.device.type != "mlu":
        raise DeviceError(
            f'{name}: backend mlu_graph needs "mlu" but this was lowered for "{lowered.device}"; use "eager".'
        )
    _refuse_unknown("mlu_graph", options, ("fixed", "pool"))
    return _captured(lowered, "mlu_graph", _function(lowered), options, api=api, graph=api.MLUGraph)


def _need_cuda(lowered: Lowered, backend: str, other: str) -> None:
    if lowered.device.type != "cuda":
        raise DeviceError(
            f'{lowered.signature.name}: backend {backend} needs "cuda" but this was lowered for "{lowered.device}"; use "{other}".'
        )


BACKENDS: dict[str, Callable[[Lowered, Options], Compiled]] = {
    "eager": eager,
    "inductor": inductor,
    "cuda_graph": cuda_graph,
    "inductor+cuda_graph": inductor_cuda_graph,
    "aot": aot,
    "mlu_graph": mlu_graph,
}


def _compiled(lowered: Lowered, backend: str, run: Program, **more: Any) -> Compiled:
    return Compiled(
        signature=lowered.signature, program=run, backend=backend, constant_bytes=lowered.constant_bytes, **more
    )


def _function(lowered: Lowered) -> Program:
    bound = lowered.bound

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return split(bound.fn(*bound.args_of(tensors)), tensors)[0]

    return run


def _inductor_program(lowered: Lowered, backend: str, options: Options) -> Program:
    import torch._inductor

    _refuse_unknown(backend, options, torch._inductor.list_options())
    lowered = _fusible(lowered)
    examples = [node.meta["val"] for node in lowered.exported.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        compiled = torch._inductor.compile(lowered.exported.graph_module, examples, options=options)
    constants = lowered.constants

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        outputs: Sequence[Tensor] = compiled(*constants, *tensors)
        return outputs

    return run


def _fusible(lowered: Lowered) -> Lowered:
    """The function traced anew for Inductor, with plain torch in place of ops that have a form to be fused; on a GPU none has."""
    if lowered.device.type != "cpu":
        return lowered
    inputs = {node.name: node.meta["val"] for node in lowered.exported.graph.nodes if node.op == "placeholder"}
    tensors = tuple(inputs[str(name)] for name in lowered.exported.graph_signature.user_inputs)
    with torch.no_grad(), traced_ops():
        return replace(lowered, exported=torch.export.export(lowered.bound, tensors, strict=False))


def _captured(lowered: Lowered, backend: str, inner: Program, options: Options, *, api: Any, graph: Any) -> Compiled:
    signature, fixed = lowered.signature, options.get("fixed", ())
    names = {*((fixed,) if isinstance(fixed, str) else fixed)}
    known = [argument.name for argument in signature.arguments]
    for name in names - {*known}:
        raise CompileError(f"{signature.name}: fixed names {shown(name)}, no argument of it; use {', '.join(known)}.")
    names |= lowered.donate
    run = CapturedProgram(
        inner,
        name=signature.name,
        specs=signature.specs,
        fixed=signature.indices(names),
        device=lowered.device,
        api=api,
        graph=graph,
        pool=options.get("pool"),
    )
    return replace(_compiled(lowered, backend, run), signature=signature.on_any_device(but=names))


def _refuse_unknown(backend: str, options: Options, known: Sequence[str]) -> None:
    """Raise CompileError for the first option that a backend does not have."""
    for option in options:
        if option not in known:
            allowed = "those of torch._inductor.list_options()" if len(known) > 8 else ", ".join(known) or "none"
            raise CompileError(f"backend {backend} has no option {shown(option)}; use {allowed}.")
