"""Abstract values: shapes come out of functions with no tensor made."""

from __future__ import annotations

import pytest
import torch

import vlmfx
from tests.compile.functions import mlp, mlp_args, needs_compiler
from vlmfx.compile.abstract import ShapeDtype, eval_shape, fake, target_device, tracing
from vlmfx.errors import CompileError, DeviceError
from vlmfx.models.layers import norm_spec
from vlmfx.tree import leaves, tree_map

pytestmark = needs_compiler


def test_shapes_are_those_of_the_result():
    params, cfg, x = mlp_args()
    expected = mlp(params, cfg, x)
    for abstract in (params, tree_map(lambda t: t.to("meta"), params)):
        for rows in (x, x.to("meta"), ShapeDtype((3, 8), torch.float32)):
            got = vlmfx.eval_shape(mlp, abstract, cfg, rows)
            assert tree_map(lambda t: getattr(t, "shape", t), got) == tree_map(
                lambda t: getattr(t, "shape", t), expected
            )
            assert all(leaf.is_meta for leaf in leaves(got) if isinstance(leaf, torch.Tensor))


def test_nothing_is_allocated():
    huge = ShapeDtype((1 << 40, 8), torch.bfloat16)
    out = eval_shape(lambda x: (x @ x.T[:, :4], x), huge)
    assert [(t.shape, t.dtype) for t in out] == [((1 << 40, 4), torch.bfloat16), ((1 << 40, 8), torch.bfloat16)]


def test_strides_and_constants_are_kept():
    with tracing() as mode:
        column, number = fake([torch.zeros(3, 4).T, 7], mode, torch.device("cpu"))
    assert (column.shape, column.stride(), number) == ((4, 3), (1, 4), 7)


def test_the_device_is_asked_for_or_that_of_the_tensors():
    assert target_device([None, torch.zeros(1, device="meta")]).type == "cpu"
    assert target_device([torch.zeros(1)], None).type == "cpu"
    with pytest.raises(DeviceError, match='device is "tpu" but must be one of'):
        target_device([], "tpu")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match='device "cuda" is not present on this machine'):
            target_device([torch.zeros(1, device="meta")], "cuda")


def test_a_spec_without_a_dtype_is_refused():
    with pytest.raises(
        CompileError, match=r"^ParamSpec norm\.weight has no dtype; pass `weights\.abstract\(specs, dtype=\.\.\.\)`"
    ):
        eval_shape(lambda p: p, {"norm": norm_spec("norm", 4)})
