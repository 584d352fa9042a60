"""embeds: several images' embeddings come as one flat list, whatever the family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.golden_cases import TINY, load_model
from vlmfx.errors import InvalidRequest
from vlmfx.processing.embeds import joined, rows_of
from vlmfx.processing.inputs import MediaLayout


def one_image(family: str) -> Any:
    """The ready embeddings of one image, as the family takes them."""
    cfg = load_model(TINY[family]).processor.config
    if family == "minicpm_v":
        return {"image_embeds": torch.ones(cfg.num_queries, cfg.hidden_size), "image_size_list": [(30, 30)]}
    return {"image_embeds": torch.ones(4, cfg.hidden_size), "image_grid_thw": [[1, 4, 4]]}


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "minicpm_v"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_two_items_are_joined(family):
    model = load_model(TINY[family])
    functions, cfg = model.processor.functions, model.processor.config
    rows, layouts = functions.embed_inputs(cfg, [one_image(family), one_image(family)])
    assert [item.num_rows for item in layouts] == [len(rows) // 2] * 2
    assert torch.equal(rows, torch.ones_like(rows))


@pytest.mark.parametrize("inner", [[], (), [[]], ["self"]])
def test_a_list_in_the_list_is_refused(family, inner):
    model = load_model(TINY[family])
    inner = [one_image(family)] if inner == ["self"] else inner
    with pytest.raises(InvalidRequest, match="list; give the embeddings of each image") as caught:
        model.processor.functions.embed_inputs(model.processor.config, [one_image(family), inner])
    assert caught.value.field == "multi_modal_data.image[1]"


def test_rows_lie_on_the_device_of_the_first():
    """meta stands for another device."""
    layout = MediaLayout(num_rows=2, grid=(1, 1, 2))
    rows, layouts = joined(["meta", "cpu"], lambda device: (torch.ones(2, 3, device=device), [layout]))
    assert rows.device.type == "meta"
    assert rows.shape == (4, 3)
    assert layouts == [layout] * 2


@pytest.mark.parametrize(
    "value",
    [
        [[1.5, 2.0], [3, -4.0]],
        [(1.5, 2.0), (3, -4.0)],
        [[[1.5, 2.0]], [[3.0, -4.0]]],
        [torch.tensor([[1.5, 2.0]]), torch.tensor([[3.0, -4.0]])],
    ],
)
def test_rows_of_numbers_are_rows(value):
    assert rows_of(value, 2).tolist() == [[1.5, 2.0], [3.0, -4.0]]


@pytest.mark.parametrize("value", [[[1.0, 2.0], [3.0]], [[1.0, "x"]], [[1.0, None]], [[]], [1.0, 2.0], [[1e300, 0.0]]])
def test_what_is_no_table_of_numbers_is_refused(value):
    with pytest.raises(InvalidRequest, match="embeddings"):
        rows_of(value, 2)
