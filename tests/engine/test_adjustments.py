"""adjustments: the rows' rules side by side, what no row needs left out, and rows of padding that change nothing; and that what is drawn
by them keeps to the rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.engine.test_token_mask import ids_of
from tests.engine.test_token_rules import EOS, TOKENIZER, VOCAB, rules
from tests.strategies import SEEDS, normal
from vlmfx.compile.programs import choose
from vlmfx.engine.adjustments import adjustments
from vlmfx.engine.sampler import state
from vlmfx.engine.token_rules import TokenRules


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


def answers(rows: list[TokenRules], seed: int, num: int, favoured: list[int] | None = None) -> list[list[int]]:
    """num tokens of each row, drawn from random logits; those of `favoured` are likely."""
    out: list[list[int]] = [[] for _ in rows]
    for step in range(num):
        logits = normal(seed + step, len(rows), VOCAB)
        logits[:, favoured or []] += 9
        before = logits.clone()
        draw = state([r.params for r in rows], range(len(rows)), [step] * len(rows), logits.device)
        ids, raw = choose(logits, draw, adjustments(rows, VOCAB))
        assert raw is logits
        assert torch.equal(logits, before)
        for r, token, answer in zip(rows, ids.tolist(), out, strict=True):
            r.accept(token)
            answer.append(token)
    return out


@settings(max_examples=20)
@given(seed=SEEDS)
def test_what_is_drawn_keeps_to_the_rules_of_its_row(seed):
    word = TOKENIZER.encode("zz", add_special_tokens=False)
    favoured = [*word, *EOS, 50, 51]
    rows = [
        rules(bad_words=["zz"]),
        rules(min_tokens=6),
        rules(allowed_token_ids=[50, 51, 52]),
        rules(temperature=0.0),
        rules(),
    ]
    no_word, late, few, greedy, free = answers(rows, seed, 8, favoured)
    assert all(no_word[i : i + len(word)] != word for i in range(8))
    assert not set(late[:6]) & set(EOS)
    assert set(few) <= {50, 51, 52}
    assert set(greedy) | set(free) <= set(range(VOCAB))
    for row, answer in enumerate((no_word, late, few, greedy, free)):
        alone = [rules() for _ in rows]
        alone[row] = rules(
            **{
                name: getattr(rows[row].params, name)
                for name in ("bad_words", "min_tokens", "allowed_token_ids", "temperature")
            }
        )
        assert answers(alone, seed, 8, favoured)[row] == answer


def test_greedy_answers_by_hand():
    """A bias wins; a repetition penalty, and a frequency penalty as soon as it has grown, move on to the next best."""
    logits = torch.zeros(3, VOCAB)
    logits[:, 1], logits[:, 2], logits[:, 3] = 3.0, 2.0, 1.5
    bias, repetition, frequency = rows = [
        rules(temperature=0.0, logit_bias={"5": 3.5}),
        rules([1], temperature=0.0, repetition_penalty=1.9),
        rules([1], temperature=0.0, frequency_penalty=0.6),
    ]
    drawn = []
    for _ in range(4):
        ids, _ = choose(logits, None, adjustments(rows, VOCAB))
        drawn.append(ids.tolist())
        for r, token in zip(rows, drawn[-1], strict=True):
            r.accept(token)
    assert [list(column) for column in zip(*drawn, strict=True)] == [[5, 5, 5, 5], [2, 1, 1, 1], [1, 1, 2, 1]]
    assert (bias.history.tolist(), repetition.history.tolist()) == ([], [1, 2, 1, 1, 1])
    assert frequency.history.tolist() == [1, 1, 1, 2, 1]


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_a_token_on_the_device_counts_as_one_that_is_accepted(penalty):
    params: dict[str, Any] = {penalty: 1.5}

    def adjusted(newest: Tensor | None) -> Tensor:
        rows = [rules([4, 5], **params), rules()]
        rows[0].accept(6)
        if newest is None:
            rows[0].accept(7)
        got = adjustments(rows, VOCAB, is_ahead=[newest is not None, False])
        assert got is not None
        got = got if newest is None else replace(got, newest=newest)
        row = torch.zeros(2, VOCAB)
        row[:, 4:9] = torch.tensor([1.0, 1.1, 1.2, 5.0, 4.9])
        return choose(row, None, got)[0]

    assert adjusted(None).tolist() == adjusted(torch.tensor([7, -1])).tolist() == [8, 7]
