"""Grammars: what is drawn by their masks has the form, EOS comes when it is complete and not before, and hostile forms are refused soon."""

from __future__ import annotations

import json
import random
import re
import time
from threading import Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.test_token_mask import ids_of
from tests.golden_cases import COMMITTED
from tests.processing.test_tokenizer import metaspace
from tests.strategies import normal
from vlmfx.compile.programs import choose
from vlmfx.engine import grammar as module
from vlmfx.engine.adjustments import adjustments
from vlmfx.engine.grammar import Grammar, GrammarCompiler
from vlmfx.engine.sampler import state
from vlmfx.engine.sampling_params import SamplingParams
from vlmfx.engine.structured_outputs import MAX_CHARS, StructuredOutputsParams
from vlmfx.engine.token_rules import TokenRules
from vlmfx.errors import InvalidRequest
from vlmfx.hub import SCENES
from vlmfx.processing.tokenizer import Tokenizer

# Byte-level; and pieces with "▁" for a space, and bytes that no piece covers.
TOKENIZERS = [
    Tokenizer.load(path) for path in (SCENES, COMMITTED / "models" / "qwen2vl-tiny", COMMITTED / "models" / "llava-b")
]
PADDING = 37
COMPILERS = [GrammarCompiler(t, len(t) + PADDING, [t.eos_token_id or 0]) for t in TOKENIZERS]
EACH = pytest.mark.parametrize(
    ("compiler", "tokenizer"), list(zip(COMPILERS, TOKENIZERS, strict=True)), ids=["scenes", "qwen2", "llama"]
)


def eos(tokenizer: Tokenizer) -> int:
    assert tokenizer.eos_token_id is not None
    return tokenizer.eos_token_id


def drawn(grammar: Grammar, tokenizer: Tokenizer, seed: int, most: int = 80) -> tuple[str, bool]:
    """(text, whether it came to EOS): at random among what the masks allow, EOS rarely; checks each mask."""
    g = random.Random(seed)
    ids: list[int] = []
    while len(ids) < most:
        allowed = ids_of(grammar.mask())
        assert allowed
        assert max(allowed) < len(tokenizer)
        assert allowed & tokenizer.special_ids <= {eos(tokenizer)}
        assert (eos(tokenizer) in allowed) == grammar.is_complete
        assert grammar.is_finished == (allowed == {eos(tokenizer)})
        rest = sorted(allowed - {eos(tokenizer)})
        if not rest or (grammar.is_complete and g.random() < 0.2):
            grammar.accept(eos(tokenizer))
            return tokenizer.decode(ids), True
        token = g.choice(rest)
        grammar.accept(token)
        ids.append(token)
    return tokenizer.decode(ids), False


REGEXES = [
    r"[ab]{2,5}",
    r"(red|green) (circle|square)s?",
    r"-?(0|[1-9][0-9]{0,3})(\.[0-9]+)?",
    r"[^a-z]{1,3}x",
    r"ä?ö{2}",
    r"(a|ab)(c|bcd)*",
]


@EACH
@pytest.mark.parametrize("regex", REGEXES)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**31))
def test_a_regex(compiler, tokenizer, regex, seed):
    text, is_whole = drawn(compiler.compile(StructuredOutputsParams(regex=regex)), tokenizer, seed)
    assert not is_whole or re.fullmatch(regex, text)


@EACH
@settings(max_examples=20)
@given(
    choices=st.lists(
        st.text(min_size=1, max_size=5)
        | st.sampled_from(["yes", "no", 'a"b', "\\", "\n", "\x7f\\u007f", "ab", "a", "😀", "a b", "\uf900", "e\u0301"]),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 2**31),
)
def test_a_choice(compiler, tokenizer, choices, seed):
    grammar = compiler.compile(StructuredOutputsParams(choice=choices))
    g, ids = random.Random(seed), []
    while not grammar.is_finished:
        token = g.choice(sorted(ids_of(grammar.mask())))
        grammar.accept(token)
        ids.append(token)
    text = tokenizer.decode(ids)  # which takes a space off the beginning, where pieces have one
    assert text in [*choices, *(choice.removeprefix(" ") for choice in choices)]


@EACH
@pytest.mark.parametrize("text", ["\uf900", "x\u212b", "e\u0301", "\u1100\u1161"])
def test_characters_that_unicode_has_another_form_of_stay_as_they_are(compiler, tokenizer, text):
    grammar, ids = compiler.compile(StructuredOutputsParams(choice=[text])), []
    while not grammar.is_complete:
        token = min(ids_of(grammar.mask()))
        grammar.accept(token)
        ids.append(token)
    assert tokenizer.decode(ids) == text


def test_every_character_can_be_chosen():
    characters = [chr(i) for i in range(0x300)] + list("\u2028\ufeff\uffff😀\U0010ffff")
    for start in range(0, len(characters), 50):
        choices = characters[start : start + 50]
        grammar = COMPILERS[0].compile(StructuredOutputsParams(choice=choices))
        for choice in choices:
            answer = grammar.copy()
            for token in TOKENIZERS[0].encode(choice, add_special_tokens=False):
                assert token in ids_of(answer.mask())
                answer.accept(token)
            assert answer.is_complete


SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object", "required": ["n"], "additionalProperties": False,
        "properties": {"n": {"type": "integer", "minimum": 3, "maximum": 250}},
    },
    {"enum": ["red", 5, None, {"a": [1]}]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 3},
    {"anyOf": [{"type": "string", "pattern": "^[xy]{1,3}$"}, {"type": "null"}]},
]  # fmt: skip


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """As far as the schemas above go."""
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if schema["type"] == "object":
        return set(value) == {"n"} and type(value["n"]) is int and 3 <= value["n"] <= 250
    if schema["type"] == "array":
        return 1 <= len(value) <= 3 and all(type(v) is bool for v in value)
    if schema["type"] == "number":
        return 0 <= value <= 3 and value * 4 == int(value * 4)
    if schema["type"] == "string":
        return isinstance(value, str) and re.fullmatch("[xy]{1,3}", value) is not None
    return value is None


@EACH
@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: str(next(iter(s.values()))))
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_a_schema(compiler, tokenizer, schema, seed):
    text, is_whole = drawn(compiler.compile(StructuredOutputsParams(json=schema)), tokenizer, seed)
    assert not is_whole or fits(json.loads(text), schema)


@pytest.mark.parametrize("form", [{"json_object": True}, {"json": {"properties": {"a": {"type": "array"}}}}], ids=str)
def test_blanks_between_the_tokens_of_json_come_to_an_end(form):
    """A model that prefers blanks to all else is kept from them in the end; what json.dumps writes may be written."""
    compiler, tokenizer = COMPILERS[0], TOKENIZERS[0]

    def taken(text: str) -> int:
        grammar, ids = (
            compiler.compile(StructuredOutputsParams(**form)),
            tokenizer.encode(text, add_special_tokens=False),
        )
        for place, token in enumerate(ids):
            if token not in ids_of(grammar.mask()):
                return place
            grammar.accept(token)
        return len(ids) if grammar.is_complete else -1

    value = {"a": [1, {"b": "c d"}, [], {}], "e": {"f": None}}
    for text in (json.dumps(value, indent=indent) for indent in (None, 1, 2, 4, 8, "\t")):
        assert taken(text) == len(tokenizer.encode(text, add_special_tokens=False))
    assert taken(json.dumps(value, separators=(",", ":"))) > 0
    for blank in (" ", "\n", "\t", "\r\n", " \n"):
        assert taken('{"a"' + blank * 500) < 150


@EACH
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_any_object(compiler, tokenizer, seed):
    text, is_whole = drawn(compiler.compile(StructuredOutputsParams(json_object=True)), tokenizer, seed)
    assert not is_whole or isinstance(json.loads(text), dict)


@EACH
@pytest.mark.parametrize(
    "grammar", ['start: "a" start "b" | "ab"', 'root ::= "a" root "b" | "ab"'], ids=["lark", "gbnf"]
)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_a_grammar_that_no_regex_is(compiler, tokenizer, grammar, seed):
    text, is_whole = drawn(compiler.compile(StructuredOutputsParams(grammar=grammar)), tokenizer, seed)
    half = len(text) // 2
    assert not is_whole or text == "a" * half + "b" * half


# ---- as rules of a sequence


def rules(**params: Any) -> TokenRules:
    p = SamplingParams(**{"max_tokens": None, **params})
    grammar = COMPILERS[0].compile(p.structured_outputs) if p.structured_outputs is not None else None
    tokenizer = TOKENIZERS[0]
    vocab = len(tokenizer) + PADDING
    return TokenRules(p, [], tokenizer=tokenizer, vocab_size=vocab, eos_token_ids=[eos(tokenizer)], grammar=grammar)


def allowed(r: TokenRules) -> set[str]:
    mask = r.mask()
    assert mask is not None
    return {TOKENIZERS[0].id_to_token(i) or "" for i in ids_of(mask)}


def accept(r: TokenRules, token: str) -> None:
    token_id = TOKENIZERS[0].token_to_id(token)
    assert token_id is not None
    r.accept(token_id)


def test_all_rules_hold_together():
    ids = [TOKENIZERS[0].token_to_id(c) or 0 for c in "abc"]
    r = rules(
        structured_outputs=StructuredOutputsParams(regex="[ab]{2}c?"),
        allowed_token_ids=[*ids, eos(TOKENIZERS[0])],
        bad_words=["a"],
    )
    assert r.needs_host
    assert allowed(r) == {"b"}
    other = r.copy()
    accept(r, "b")
    assert (allowed(r), allowed(other)) == ({"b"}, {"b"})
    accept(r, "b")
    assert allowed(r) == {"c", "<|im_end|>"}
    assert allowed(other) == {"b"}


def test_min_tokens_holds_where_the_form_can_go_on():
    r = rules(structured_outputs=StructuredOutputsParams(regex="a{1,2}"), min_tokens=5)
    accept(r, "a")
    assert allowed(r) == {"a"}
    accept(r, "a")
    assert allowed(r) == {"<|im_end|>"}
    for _ in range(3):  # EOS that is ignored
        accept(r, "<|im_end|>")
        assert allowed(r) == {"<|im_end|>"}


def test_rules_that_together_leave_no_token():
    with pytest.raises(
        InvalidRequest, match=r"^bad_words: bad_words and structured_outputs leave no token to draw as number 1; "
    ):
        rules(structured_outputs=StructuredOutputsParams(choice=["a"]), bad_words=["a"])
    with pytest.raises(AssertionError, match="of a GrammarCompiler"):
        TokenRules(
            SamplingParams(structured_outputs=StructuredOutputsParams(regex="a")),
            [],
            tokenizer=TOKENIZERS[0],
            vocab_size=1000,
            eos_token_ids=[],
        )


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_drawn_in_a_batch_with_others(seed):
    """The answer is one of the choices and then EOS; its mate's answer does not change."""
    choices, vocab = ["red", "green circle", "0.5"], len(TOKENIZERS[0]) + PADDING
    free: list[list[int]] = []
    for form in (StructuredOutputsParams(choice=choices), None):
        rows = [rules(structured_outputs=form), rules()]
        answers: list[list[int]] = [[], []]
        for step in range(12):
            logits = normal(seed % 2**30 + step, 2, vocab)
            draw = state([r.params for r in rows], [seed, seed], [step] * 2, logits.device)
            for r, answer, token in zip(
                rows, answers, choose(logits, draw, adjustments(rows, vocab))[0].tolist(), strict=True
            ):
                r.accept(token)
                answer.append(token)
        free.append(answers[1])
        if form is not None:
            text = answers[0][: answers[0].index(eos(TOKENIZERS[0]))]
            assert TOKENIZERS[0].decode(text) in choices
            assert set(answers[0][len(text) :]) == {eos(TOKENIZERS[0])}
    assert free[0] == free[1]


# ---- compiling


def test_forms_are_compiled_once_and_answers_go_on_by_themselves(monkeypatch):
    compiler, source = GrammarCompiler(TOKENIZERS[0], len(TOKENIZERS[0]), []), module._source
    sources: list[StructuredOutputsParams] = []

    def noted(form: StructuredOutputsParams) -> str:
        sources.append(form)
        return source(form)

    monkeypatch.setattr(module, "_source", noted)
    form = StructuredOutputsParams(regex="[ab]{2}")
    one, other = compiler.compile(form), compiler.compile(StructuredOutputsParams(regex="[ab]{2}"))
    assert sources == [form]
    before = other.mask()
    one.accept(TOKENIZERS[0].token_to_id("ab") or 0)
    assert one.is_finished
    assert np.array_equal(other.mask(), before)
    assert np.array_equal(compiler.compile(form).mask(), before)
    for i in range(module.MAX_KEPT + 1):
        compiler.compile(StructuredOutputsParams(regex=f"x{i}"))
    compiler.compile(form)
    assert sources.count(form) == 2


def test_threads_share_a_compiler():
    compiler = GrammarCompiler(TOKENIZERS[0], len(TOKENIZERS[0]), [])
    found: list[bool] = []

    def compile_one(i: int) -> None:
        grammar = compiler.compile(StructuredOutputsParams(regex=f"a{{{i % 3 + 1}}}"))
        found.append(bool(grammar.mask().any()))

    work = [Thread(target=compile_one, args=[i]) for i in range(12)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert found == [True] * 12


def test_a_vocabulary_smaller_than_the_tokenizers():
    vocab, form = 300, StructuredOutputsParams(regex="[a-z ]+")
    assert eos(TOKENIZERS[0]) >= vocab
    with pytest.raises(
        InvalidRequest, match=r"no form can be asked of it \(the model has no EOS to end an answer by\); leave"
    ):
        GrammarCompiler(TOKENIZERS[0], vocab, []).compile(form)
    grammar = GrammarCompiler(TOKENIZERS[0], vocab, [5]).compile(form)
    assert len(grammar.mask()) == 10
    assert max(ids_of(grammar.mask())) < vocab


@EACH
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_where_all_bytes_may_come_special_tokens_and_padding_may_not(compiler, tokenizer, seed):
    text, is_whole = drawn(compiler.compile(StructuredOutputsParams(grammar="start: A\nA: ~/b|.*c/")), tokenizer, seed)
    has_other_bytes = "\ufffd" in text  # which "." does not match
    assert not is_whole or has_other_bytes or not re.fullmatch("b|.*c", text)


def test_a_tokenizer_that_cannot_be_constrained():
    compiler = GrammarCompiler(Tokenizer(metaspace()), 4, [0])
    with pytest.raises(
        InvalidRequest,
        match=r"^structured_outputs: the model's tokenizer is of no kind that can be constrained \(can't determine",
    ):
        compiler.compile(StructuredOutputsParams(regex="a"))


REFUSED = [
    ("regex", "(a", r"it cannot be compiled \(unclosed group\); correct or simplify it"),
    ("regex", r"(a)\1", r"it cannot be compiled \(backreferences are not supported\)"),
    ("regex", "[^\\s\\S]", r"it cannot be (compiled|followed) \("),
    ("json", {"type": "nothing"}, r"it cannot be compiled \("),
    ("json", {"not": {}}, r'it cannot be compiled \(Unimplemented keys: \["not"\]\)'),
    ("json", {"type": "string", "enum": [1]}, r"it cannot be compiled \(Unsatisfiable schema: incompatible types\)"),
    ("json", {"$ref": "#"}, r"it cannot be followed \(no text has this form\); simplify it"),
    ("json", {"$ref": "http://127.0.0.1:9/schema"}, r"it cannot be compiled \(Resource .* does not fetch resources\)"),
    ("json", {"multipleOf": 10_001}, r"the common multiple of its multipleOf is over 10000 of the smallest decimal place; leave"),
    ("json", {"allOf": [{"multipleOf": 997}, {"multipleOf": 9.91}]}, r"the common multiple of its multipleOf is over 10000"),
    ("json", {"items": [{"properties": {"a": {"multipleOf": 4294967295}}}]}, r"the common multiple of its multipleOf"),
    ("grammar", "start: (", r"it cannot be compiled \(1\(9\): "),
    ("grammar", "start: other", r"it cannot be compiled \("),
    ("grammar", "this is neither", r"it is no Lark, which has a line start:, nor GBNF \(.*\); correct it"),
    ("grammar", 'start: %json {"multipleOf": 999983}', r"it cannot be compiled \(%json is not taken\); give a schema as"),
    ("grammar", 'start: @"file"', r"it cannot be compiled \("),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value", "said"), REFUSED)
def test_what_cannot_be_compiled_is_refused_in_a_sentence(kind, value, said):
    fields: dict[str, Any] = {kind: value}
    with pytest.raises(InvalidRequest, match=f"^structured_outputs.{kind}: {said}") as caught:
        COMPILERS[0].compile(StructuredOutputsParams(**fields))
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def doubling(times: int) -> str:
    return "\n".join(
        ["start: X0", *(f"X{i}: X{i + 1} X{i + 1} X{i + 1} X{i + 1}" for i in range(times)), f'X{times}: "a" | "b"']
    )


A, B = {"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}
HOSTILE: dict[str, dict[str, Any]] = {
    "powers": {"regex": "((((a{1,1000}){1,1000}){1,1000}){1,1000}){1,1000}"},
    "states": {"regex": "(.*a.{40}){3}"},
    "long": {"regex": "|".join(f"w{i}x{i * 7}" for i in range(5500))},
    "classes": {"regex": r"(\p{L}{1,500}\d{1,500}){500}"},
    "stars": {"regex": "(?:a*)" * 10_000},
    "deep regex": {"regex": "(" * 30_000 + "a" + ")" * 30_000},
    "deep schema": {"json": '{"properties":{"a":' * 900 + "{}" + "}}" * 900},
    "products": {"json": {"allOf": [{"anyOf": [{"type": "string", "pattern": f"a{i}{j}.*"} for j in range(30)]} for i in range(20)]}},
    "ranges": {"json": {"allOf": [{"anyOf": [{"type": "integer", "minimum": i * 99 + j} for j in range(30)]} for i in range(3)]}},
    "properties": {"json": {"properties": {f"p{i}": {"type": "integer", "minimum": i} for i in range(1400)}}},
    "enumeration": {"json": {"enum": [f"v{i}" for i in range(7000)]}},
    "lengths": {"json": {"type": "array", "minItems": 10**9, "items": {"type": "string", "minLength": 10**9}}},
    "references": {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [A, B]}, "b": {"allOf": [A, A]}}}},
    "multiples": {"json": {"properties": {f"p{i}": {"type": "integer", "multipleOf": 9973, "minimum": i} for i in range(900)}}},
    "terminals": {"grammar": doubling(30)},
    "ambiguity": {"grammar": 'start: start start start | start start | "a" | "b" | ""'},
    "repetition": {"grammar": 'start: ("a"{1,1000}){1,1000}'},
    "intersections": {"grammar": "start: A\nA: " + " & ".join(f"~/.*{c}.{{5}}{c}.*/" for c in "bcdefghijklmnopqrst")},
    "substrings": {"grammar": 'start: A\nA: %regex {"substring_chars": "' + "ab" * 25_000 + '"}'},
    "deep Lark": {"grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000},
    "deep GBNF": {"grammar": "root ::= " + "(" * 4000 + '"a"' + ")" * 4000},
    "long GBNF": {"grammar": "\n".join(f'r{i} ::= r{i + 1} "a"' for i in range(3000)) + '\nr3000 ::= "b"\nroot ::= r0'},
    "rules of GBNF": {"grammar": "\n".join(f'r{i} ::= r{i + 1} "a"' for i in range(450)) + '\nr450 ::= "b"\nroot ::= r0'},
    "choices": {"choice": [f"option number {i}" for i in range(3000)]},
    "a long choice": {"choice": ["a" * MAX_CHARS]},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_meant_to_be_slow_is_not(name):
    """Refused or compiled, then followed for a while, in time that a machine many times slower still has."""
    start, said = time.process_time(), ""
    try:
        drawn(COMPILERS[0].compile(StructuredOutputsParams(**HOSTILE[name])), TOKENIZERS[0], 0)
    except InvalidRequest as error:
        said = str(error)
    assert said == "" or re.fullmatch(r"structured_outputs\.\w+: .{10,380}\.", said)
    assert time.process_time() - start < 20
