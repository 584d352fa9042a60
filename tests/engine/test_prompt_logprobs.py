"""prompt_logprobs: by definition from all logits at once, whatever the tiles; and what greedy decoding would have said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden_cases import EVERY, TINY, load_model
from tests.pictures import about, picture
from vlmfx.engine import prompt_logprobs as module
from vlmfx.engine.prompt_logprobs import prompt_logprobs
from vlmfx.engine.sampler import logprobs
from vlmfx.engine.taps import tap
from vlmfx.processing.inputs import ModelInputs
from vlmfx.processing.prompt import prepare


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("num", [0, 3])
def test_by_definition(family, num):
    model = load_model(EVERY[family])
    inputs = prepare(model.processor, about(model, picture(60, 40)))
    with torch.no_grad():
        all_logits = tap(model, inputs, ["logits"])["logits"].float()
    first, *got = prompt_logprobs(model, inputs, num)
    assert first is None
    assert len(got) == len(inputs.token_ids) - 1
    for entry, row, token in zip(got, all_logits, inputs.token_ids[1:], strict=False):
        assert entry is not None
        order = row.argsort(descending=True, stable=True).tolist()
        assert list(entry) == list(dict.fromkeys([token, *order[:num]]))
        for i, one in entry.items():
            assert one.logprob == pytest.approx(row.log_softmax(-1)[i].item(), abs=1e-4)
            assert one.rank == order.index(i) + 1
            assert one.decoded_token == model.processor.tokenizer.decode([i], skip_special_tokens=False)


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_tiles_never_show_and_are_bounded(rows, monkeypatch):
    model = load_model(TINY["qwen2_vl"])
    sizes: list[int] = []

    def noted(logits: Tensor, *rest: Any) -> Any:
        sizes.append(len(logits))
        return logprobs(logits, *rest)

    inputs = prepare(model.processor, about(model, picture(60, 40)))
    expected = prompt_logprobs(model, inputs, 2)
    monkeypatch.setattr(module, "MAX_TILE_BYTES", rows * 4 * model.config.text.vocab_size)
    monkeypatch.setattr(module, "logprobs", noted)
    for mine, theirs in zip(prompt_logprobs(model, inputs, 2), expected, strict=True):
        assert (mine is None) == (theirs is None)
        for (i, one), (j, other) in zip((mine or {}).items(), (theirs or {}).items(), strict=True):
            assert (i, one.rank, one.decoded_token) == (j, other.rank, other.decoded_token)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
    assert max(sizes) <= rows
    assert sum(sizes) == len(inputs.token_ids) - 1


def test_a_prompt_of_one_token():
    model = load_model(TINY["qwen2_vl"])
    inputs: ModelInputs = prepare(model.processor, {"prompt_token_ids": [5]})
    assert prompt_logprobs(model, inputs, 2) == [None]
