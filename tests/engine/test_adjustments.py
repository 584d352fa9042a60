"""adjustments: the rows' rules side by side, what no row needs left out, and rows of padding that change nothing."""

from __future__ import annotations

import torch

from tests.engine.test_token_mask import ids_of
from tests.engine.test_token_rules import EOS, VOCAB, rules
from vlmfx.engine.adjustments import adjustments


def test_no_rules_no_adjustments():
    assert adjustments([rules(), rules(temperature=0.0, stop="x")], VOCAB) is None
    assert adjustments([], VOCAB) is None


def test_parts_that_no_row_needs_are_none():
    (only_bias, only_mask, only_counts) = (
        adjustments([rules(), rules([5], **params)], VOCAB)
        for params in ({"logit_bias": {1: 2.0}}, {"min_tokens": 1}, {"presence_penalty": 1.0})
    )
    assert only_bias is not None
    assert only_mask is not None
    assert only_counts is not None
    assert {name for name, part in vars(only_bias).items() if part is not None} == {"bias_ids", "bias"}
    assert {name for name, part in vars(only_mask).items() if part is not None} == {"mask"}
    assert {name for name, part in vars(only_counts).items() if part is not None} == {
        "history", "prompt_lens", "newest", "presence", "frequency", "repetition",
    }  # fmt: skip


def test_rows_side_by_side():
    one = rules([5, 6, 7], repetition_penalty=1e300, logit_bias={3: 1.5, 1: -2.0})
    two = rules([8], frequency_penalty=0.5, allowed_token_ids=[0, 33])
    two.accept(9)
    got = adjustments([one, two, rules([4, 4, 4, 4])], VOCAB, num_rows=4)
    assert got is not None
    parts = {name: part for name, part in vars(got).items() if part is not None}
    assert {name: part.dtype for name, part in parts.items()} == {
        "mask": torch.int32, "bias_ids": torch.int32, "bias": torch.float32, "history": torch.int32, "prompt_lens": torch.int32,
        "newest": torch.int64, "presence": torch.float32, "frequency": torch.float32, "repetition": torch.float32,
    }  # fmt: skip
    every = set(range(VOCAB))
    assert [ids_of(row.numpy()) for row in parts["mask"]] == [every, {0, 33}, every, every]
    assert parts["bias_ids"].tolist() == [[3, 1], [-1, -1], [-1, -1], [-1, -1]]
    assert parts["bias"].tolist() == [[1.5, -2.0], [0, 0], [0, 0], [0, 0]]
    assert parts["history"].tolist() == [[5, 6, 7], [8, 9, -1], [-1, -1, -1], [-1, -1, -1]]
    assert parts["prompt_lens"].tolist() == [3, 1, 4, 0]
    assert parts["newest"].tolist() == [-1] * 4
    assert parts["presence"].tolist() == [0.0] * 4
    assert parts["frequency"].tolist() == [0.0, 0.5, 0.0, 0.0]
    assert parts["repetition"].tolist() == [torch.finfo(torch.float32).max, 1.0, 1.0, 1.0]


def test_a_token_that_is_ahead_counts_for_min_tokens():
    one = rules(min_tokens=1)
    for ahead, ids in ((False, set(range(VOCAB)) - set(EOS)), (True, set(range(VOCAB)))):
        got = adjustments([one, rules(min_tokens=9)], VOCAB, is_ahead=[ahead, False])
        assert got is not None
        assert got.mask is not None
        assert ids_of(got.mask[0].numpy()) == ids
