"""Argument: trees to checked tensors and back; constants and structure are part of the shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmfx.compile.argument import Argument, spec_of
from vlmfx.errors import CompileError
from vlmfx.models.layers import Batch
from vlmfx.models.vision_inputs import VisionInputs
from vlmfx.tree import leaves

LEAVES = st.builds(torch.zeros, st.tuples(st.integers(0, 3), st.integers(1, 3))) | st.sampled_from([None, 1, 2.5, "a"])
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(Batch, cu_seqlens=inner, mask=inner)
    ),
    max_leaves=8,
)


@given(tree=TREES)
def test_an_argument_gives_its_tensors_and_is_made_of_them(tree):
    argument = Argument.of("x", tree)
    tensors = argument.tensors("f", tree)
    assert tensors == [leaf for leaf in leaves(tree) if isinstance(leaf, torch.Tensor)]
    made = argument.tree(tensors)
    assert [a is b or a == b for a, b in zip(leaves(made), leaves(tree), strict=True)] == [True] * len(leaves(tree))
    assert Argument.of("x", made) == argument


@given(tree=TREES, other=TREES)
def test_a_tree_fits_just_where_it_would_have_been_lowered_alike(tree, other):
    argument = Argument.of("x", tree)
    if Argument.of("x", other) == argument:
        argument.tensors("f", other)
    else:
        with pytest.raises(CompileError, match=r"^f: x.* but was lowered as .*; pass that"):
            argument.tensors("f", other)


def test_a_static_field_of_a_node_is_part_of_the_shape():
    def inputs(mean: float) -> VisionInputs:
        t = torch.zeros(1)
        return VisionInputs(pixels=t, position_ids=t, cu_seqlens=t, mean=(mean,), std=(1.0,))

    with pytest.raises(CompileError, match=r"^encode: inputs is .*0\.25.* but was lowered as .*0\.5"):
        Argument.of("inputs", inputs(0.5)).tensors("encode", inputs(0.25))


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        (torch.zeros(3, 1, 4), True),
        (torch.zeros(3, 4)[:, None], True),
        (torch.zeros(3, 4).as_strided((3, 1, 4), (4, 77, 1)), True),  # no element is reached by the 77
        (torch.zeros(3, 1, 5)[..., :4], False),
        (torch.zeros(3, 1, 4).half(), False),
        (torch.zeros(3, 1, 4, device="meta"), False),
        (torch.zeros(3, 4), False),
        (None, False),
    ],
)
def test_a_tensor_fits_by_shape_dtype_device_and_the_strides_that_count(value, fits):
    assert spec_of(torch.zeros(3, 1, 4)).fits(value) is fits
