"""pool and normalize: by hand, and against a loop in float64; the pooling configs that folders hold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import SEEDS, normal
from vlmfx.errors import CheckpointError
from vlmfx.models.pooling import normalize, pool, stored_pooling
from vlmfx.models.vision_inputs import cumulative

# Three sequences of 2, 1 and 3 tokens, then a token of padding.
HIDDEN = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8], [9, 10], [14, 3], [torch.nan, torch.nan]])
LENS = [2, 1, 3]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("last", [[3, 4], [5, 6], [14, 3]]),
        ("cls", [[1, 2], [5, 6], [7, 8]]),
        ("mean", [[2, 3], [5, 6], [10, 7]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_hand(kind, expected, dtype):
    pooled = pool(HIDDEN.to(dtype), cumulative(LENS), kind)
    assert pooled.dtype == torch.float32
    assert pooled.tolist() == expected


@settings(deadline=None)
@given(seed=SEEDS, lens=st.lists(st.integers(1, 9), min_size=1, max_size=6), width=st.integers(1, 8))
def test_mean_is_that_of_each_sequence(seed, lens, width):
    hidden = normal(seed, sum(lens), width)
    rows, start = [], 0
    for n in lens:
        rows.append([math.fsum(hidden[start : start + n, j].tolist()) / n for j in range(width)])
        start += n
    torch.testing.assert_close(pool(hidden, cumulative(lens), "mean"), torch.tensor(rows), atol=1e-6, rtol=0)


def test_the_mean_of_many_bfloat16_rows_is_summed_in_float32():
    hidden = torch.full((1000, 1), 1.0).to(torch.bfloat16)
    hidden[-1] = 3
    assert pool(hidden, cumulative([1000]), "mean").item() == pytest.approx(
        1.002, abs=1e-6
    )  # in bfloat16 the sum stops at 256


def test_dimensions_are_cut_before_the_length_is_taken():
    vectors = torch.tensor([[3.0, 4.0, 12.0], [0.0, 0.0, 5.0]])
    torch.testing.assert_close(normalize(vectors), torch.tensor([[3 / 13, 4 / 13, 12 / 13], [0, 0, 1]]))
    torch.testing.assert_close(normalize(vectors, 2), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    torch.testing.assert_close(normalize(vectors, 1), torch.tensor([[1.0], [0.0]]))


FLAGS = {
    "word_embedding_dimension": 1536,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
    "pooling_mode_weightedmean_tokens": False,
    "pooling_mode_lasttoken": False,
    "include_prompt": True,
}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({**FLAGS, "pooling_mode_lasttoken": True}, "last"),
        ({**FLAGS, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 8}, "last"),
        ({"pooling_mode": ["mean"]}, "mean"),
    ],
)
def test_stored_configs(config, kind):
    assert stored_pooling(config, "1_Pooling/config.json") == kind


@pytest.mark.parametrize(
    "config",
    [
        FLAGS,
        {},
        {**FLAGS, "pooling_mode_max_tokens": True},
        {**FLAGS, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        {"pooling_mode": "weightedmean"},
        {"pooling_mode": ["mean", "cls"]},
        {"pooling_mode": None},
        {"pooling_mode": {}},
    ],
)
def test_configs_that_are_refused(config):
    with pytest.raises(CheckpointError, match=r"1_Pooling/config.json: pooling_mode is .*, expected one of lasttoken"):
        stored_pooling(config, "1_Pooling/config.json")
