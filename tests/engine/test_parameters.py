"""What SamplingParams ask for, through the engine: each is honoured, beside requests that ask for nothing and as if alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from tests.golden_cases import TINY, load_model
from tests.invariants import token_ids
from tests.pictures import about, mixed, picture
from vlmfx import LLM, InvalidRequest, SamplingParams
from vlmfx.engine import runner
from vlmfx.engine.launched import Launched
from vlmfx.engine.structured_outputs import StructuredOutputsParams

DRAWN = SamplingParams(temperature=1.0, seed=11, max_tokens=10, ignore_eos=True)
GREEDY = SamplingParams.greedy(max_tokens=10, ignore_eos=True)
MODEL = TINY["qwen2_vl"]


@pytest.fixture(params=[False, True], ids=["in turn", "overlapping"])
def llm(request: pytest.FixtureRequest) -> LLM:
    return LLM(load_model(MODEL), max_num_seqs=8, async_scheduling=request.param)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("overlaps", [False, True])
def test_texts_of_one_request_are_those_of_its_seed_in_any_batch(family, overlaps):
    model = load_model(TINY[family])
    prompt = about(model, picture(60, 40))
    llm = LLM(model, max_num_seqs=6, async_scheduling=overlaps)
    (four,) = llm.generate(prompt, replace(DRAWN, n=4))
    assert [o.index for o in four.outputs] == [0, 1, 2, 3]
    assert len({o.token_ids for o in four.outputs}) > 1
    (one,) = LLM(model).generate(prompt, DRAWN)
    assert four.outputs[0].token_ids == one.outputs[0].token_ids
    again = llm.generate([*mixed(model), prompt], [replace(DRAWN, n=2)] * 7 + [replace(DRAWN, n=4)], use_tqdm=False)
    assert [o.token_ids for o in again[-1].outputs] == [o.token_ids for o in four.outputs]
    assert llm.engine.blocks.num_free == llm.engine.blocks.num_blocks


def test_texts_end_each_for_itself_and_are_few_enough(llm):
    (output,) = llm.generate("Hello", replace(DRAWN, n=8, max_tokens=30, ignore_eos=False, logit_bias={"5": 1.0}))
    assert len(output.outputs) == 8
    assert all(o.finish_reason in ("stop", "length") for o in output.outputs)
    with pytest.raises(InvalidRequest, match=r"n: it is 9, but only 8 texts can begin at once \(max_num_seqs, "):
        llm.generate("Hello", replace(DRAWN, n=9))


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": {7: 100.0}},
        {"allowed_token_ids": [3, 4, 5]},
        {"presence_penalty": -2.0, "frequency_penalty": -2.0},
        {"repetition_penalty": 1.7},
        {"min_tokens": 4, "ignore_eos": False},
        {"bad_words": ["a", "the"]},
    ],
    ids=lambda params: next(iter(params)),
)
def test_a_parameter_is_honoured_whoever_shares_the_batch(llm, params):
    model = llm.model
    asked = replace(DRAWN, **params)
    greedy = replace(GREEDY, **params)
    alone = [token_ids(LLM(model).generate("Hello there", p))[0] for p in (asked, greedy)]
    plain = [token_ids(LLM(model).generate(p, GREEDY))[0] for p in mixed(model)]
    found = token_ids(
        llm.generate(["Hello there", *mixed(model), "Hello there"], [asked, *[GREEDY] * 7, greedy], use_tqdm=False)
    )
    assert [found[0], found[-1]] == alone
    assert found[1:-1] == plain
    if "logit_bias" in params:
        assert set(alone[1]) == {7}
    if "allowed_token_ids" in params:
        assert {*alone[0], *alone[1]} <= {3, 4, 5}
    if "presence_penalty" in params:
        assert len(set(alone[1])) < len(set(plain[0])), "tokens that were said are wanted again"


FORMS = {
    "choice": (StructuredOutputsParams(choice=["yes", "no", "perhaps"]), r"yes|no|perhaps"),
    "regex": (StructuredOutputsParams(regex=r"[a-c]{3}-\d{2}"), r"[a-c]{3}-\d{2}"),
    "json": (
        StructuredOutputsParams(json={"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}},
                                      "required": ["n"], "additionalProperties": False}),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMS)
def test_an_answer_has_its_form_and_others_are_free(llm, kind):
    form, pattern = FORMS[kind]
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=60, structured_outputs=form)
    plain = [token_ids(LLM(llm.model).generate(p, GREEDY))[0] for p in mixed(llm.model)]
    outputs = llm.generate(["Hello", *mixed(llm.model), "There"], [params, *[GREEDY] * 7, params], use_tqdm=False)
    for output in (outputs[0], outputs[-1]):
        text = output.outputs[0].text
        assert output.outputs[0].finish_reason == "stop"
        if pattern is None:
            assert set(json.loads(text)) == {"n"}
        else:
            assert re.fullmatch(pattern, text)
    assert token_ids(outputs[1:-1]) == plain


def test_a_form_that_is_none_fails_alone(llm):
    bad = SamplingParams(structured_outputs=StructuredOutputsParams(regex="(((("))
    with pytest.warns(UserWarning, match="1 of 2 prompts failed"):
        outputs = llm.generate(["Hello", "There"], [bad, GREEDY], use_tqdm=False)
    assert isinstance(outputs[0].error, InvalidRequest)
    assert outputs[0].error.field.startswith("structured_outputs")
    assert outputs[1].error is None


def test_prompt_logprobs_come_with_the_output(llm):
    (output,) = llm.generate("Hello there", replace(GREEDY, prompt_logprobs=2, logprobs=1))
    found: Any = output.prompt_logprobs
    assert found[0] is None
    assert [next(iter(entry)) for entry in found[1:]] == output.prompt_token_ids[1:]
    assert all(len(entry) in (2, 3) for entry in found[1:])


def test_a_step_is_launched_before_the_one_before_it_is_read_also_where_rules_need_the_host(monkeypatch):
    model = load_model(TINY["qwen2_vl"])
    order: list[str] = []

    def noting(what: str, run: Any) -> Any:
        def noted(*args: Any, **options: Any) -> Any:
            order.append(what)
            return run(*args, **options)

        return noted

    monkeypatch.setattr(runner, "decode", noting("launch", runner.decode))
    monkeypatch.setattr(Launched, "read", noting("read", Launched.read))
    params = [
        SamplingParams.greedy(max_tokens=4, ignore_eos=True, bad_words=["a bad word"]),
        SamplingParams(max_tokens=4),
    ]
    expected = [LLM(model).generate("Hello", p)[0].outputs[0].token_ids for p in params[:1]]
    order.clear()
    outputs = LLM(model, async_scheduling=True).generate(["Hello", "What?"], params, use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == expected[0]
    assert order == ["launch", "read", "launch", "read", "launch", "read", "read"], "the first read is of the prompts"
