"""tree: dataclasses that are nodes map like dicts, and keep what is static."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.utils import _pytree as pytree

from vlmfx.models.vision_inputs import VisionInputs, cumulative
from vlmfx.tree import leaves, node, tree_map


@node("name")
@dataclass(frozen=True)
class Pair:
    left: object
    name: object
    right: object = None


def test_a_node_maps_its_fields_and_keeps_its_static_ones():
    doubled = tree_map(lambda x: x * 2, {"a": Pair(1, "n", [2, 3])})
    assert doubled == {"a": Pair(2, "n", [4, 6])}
    assert leaves(Pair(1, "n", [2, 3])) == [1, 2, 3]


def test_the_leaves_of_a_node_have_paths():
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path({"a": Pair(1, "n", [2])})[0]]
    assert paths == ["['a'].left", "['a'].right[0]"]


def test_the_shape_of_a_tree_survives_json():
    for static in ("n", (1.5, (2.0, None)), ()):
        shape = pytree.tree_structure([Pair(1, static, {"a": 2})])
        assert pytree.treespec_loads(pytree.treespec_dumps(shape)) == shape


def test_static_fields_are_part_of_the_shape():
    with pytest.raises(ValueError, match="mismatch"):
        tree_map(lambda x, y: x + y, Pair(1, "n", 2), Pair(1, "other", 2))


def test_vision_inputs_move_as_a_tree():
    inputs = VisionInputs(
        pixels=torch.zeros(3),
        position_ids=torch.zeros(1, 2),
        cu_seqlens=cumulative([1]),
        mean=(0.5,) * 3,
        std=(1.0,) * 3,
    )
    moved = inputs.to(torch.device("meta"))
    assert moved.pixels.is_meta
    assert moved.patch_offsets is None
    assert moved.mean == inputs.mean
