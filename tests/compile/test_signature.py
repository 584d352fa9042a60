"""Signature: arguments in order, which of their tensors are whose, and where they may be."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from vlmfx.compile.argument import Argument, TensorSpec, spec_of
from vlmfx.compile.signature import Outputs, Signature
from vlmfx.errors import CompileError


def test_any_device_will_do_but_for_named_arguments():
    spec = torch.zeros(2)
    outputs = Outputs(structure=pytree.tree_structure(None), sources=(), specs=())
    signature = Signature(name="f", arguments=(Argument.of("a", spec), Argument.of("b", [spec, 3])), outputs=outputs)
    assert signature.indices(["b"]) == {1}
    free = signature.on_any_device(but=["a"])
    assert free.specs == [spec_of(spec), TensorSpec(shape=(2,), stride=(1,), dtype=torch.float32, device=None)]
    free.tensors([spec, [spec.to("meta"), 3]])
    with pytest.raises(CompileError, match="a is float32"):
        free.tensors([spec.to("meta"), [spec, 3]])
    with pytest.raises(CompileError, match=r"^f: 1 arguments were given but it takes 2 \(a, b\)"):
        free.tensors([spec])
    assert free.tensors([[spec, 3]], 1) == [spec]
