"""StructuredOutputsParams holds exactly one form, checked and of bounded size, and is a value."""

import dataclasses
import pickle
from typing import Any

import pytest

from vlmfx.engine.structured_outputs import ABSENT, MAX_CHARS, StructuredOutputsParams
from vlmfx.errors import InvalidRequest


def test_stored_form():
    form = StructuredOutputsParams(json={"type": "object", "title": "ä"})
    assert (form.kind, form.json, form.text) == ("json", '{"type": "object", "title": "\\u00e4"}', form.json)
    assert StructuredOutputsParams(json=form.json) == form
    assert StructuredOutputsParams(choice=["a", "b", "a"]).choice == ("a", "b")
    assert StructuredOutputsParams(regex="a+", json_object=False) == StructuredOutputsParams(regex="a+")
    assert StructuredOutputsParams(json_object=True).kind == "json_object"
    for one in (form, StructuredOutputsParams(choice=["x"]), StructuredOutputsParams(grammar="start: /a/")):
        assert dataclasses.replace(one) == pickle.loads(pickle.dumps(one)) == one
        assert hash(dataclasses.replace(one)) == hash(one)


def deep(levels: int) -> dict[str, object]:
    schema: dict[str, object] = {}
    for _ in range(levels):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {},
            "structured_outputs: found none but need exactly one of json, regex, choice, grammar, json_object; give one",
        ),
        ({"json_object": False}, "structured_outputs: found none"),
        (
            {"json": {}, "regex": "a"},
            "structured_outputs: found json and regex but need exactly one of .*; leave out all",
        ),
        ({"json": "{"}, r"structured_outputs.json: it is no JSON \(.*\); give a JSON schema, as a dict or as text"),
        ({"json": "[]"}, "structured_outputs.json: found '\\[\\]' but need a JSON schema"),
        ({"json": 5}, "structured_outputs.json: found 5 but need a JSON schema"),
        ({"json": "\ud800"}, "structured_outputs.json: it is no JSON"),
        ({"json": {"a": object()}}, "structured_outputs.json: it is no JSON"),
        ({"json": {"a": {1, 2}}}, "structured_outputs.json: it is no JSON"),
        ({"json": deep(100_000)}, "structured_outputs.json: it is no JSON"),
        ({"json": "[" * MAX_CHARS}, "structured_outputs.json: it is no JSON"),
        (
            {"json": {"title": "a" * MAX_CHARS}},
            "structured_outputs.json: found 65549 characters but need at most 65536",
        ),
        ({"regex": "a" * (MAX_CHARS + 1)}, "structured_outputs.regex: found 65537 characters but need at most 65536"),
        ({"regex": ""}, "structured_outputs.regex: found '' but need a string"),
        ({"regex": b"a"}, "structured_outputs.regex: found b'a' but need a string"),
        ({"grammar": "\udfff"}, "structured_outputs.grammar: found '.*' but need a string .* of valid Unicode"),
        ({"choice": []}, r"structured_outputs.choice: found \[\] but need a list of at least one string"),
        ({"choice": "ab"}, "structured_outputs.choice: found 'ab' but need a list of strings"),
        ({"choice": ["a", ""]}, "structured_outputs.choice: found '' but need strings of at least one character"),
        ({"choice": ["a" * 40_000, "b" * 40_000]}, "structured_outputs.choice: found 80000 characters"),
        ({"json_object": 1}, "structured_outputs.json_object: found 1 but need True or False"),
    ],
)
def test_refuses_in_a_sentence(fields, said):
    with pytest.raises(InvalidRequest, match=f"^{said}") as caught:
        StructuredOutputsParams(**fields)
    assert str(caught.value).endswith(".")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", sorted(ABSENT))
def test_what_vllm_has_beyond_is_named(name):
    options: dict[str, Any] = {"regex": "a", name: True}
    with pytest.raises(
        InvalidRequest, match=f"^structured_outputs.{name}: vLLM has it, but vlmfx does not yet; remove it"
    ):
        StructuredOutputsParams(**options)
    with pytest.raises(TypeError, match="rejex"):
        StructuredOutputsParams(rejex="a")  # type: ignore[call-arg]
