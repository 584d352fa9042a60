"""Grammars of structured outputs, by llguidance: which tokens may come next for the whole text to have its form.

llguidance is imported with the first grammar. Its limits, as set below, bound the time and memory of what is meant to be slow: the worst
of tests/engine/test_grammar.py takes 2.4 s to compile and 0.05 s a token (one core, a vocabulary of 150,000), during which other threads
go on. Two things they do not cover are refused here: large multipleOf, which would take minutes, and long GBNF, which quadratic Python
converts."""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from vlmfx.engine.structured_outputs import StructuredOutputsParams
from vlmfx.engine.token_mask import Mask, forbid, mask_of
from vlmfx.errors import InvalidRequest, reason_of
from vlmfx.processing.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_KEPT = 32  # compiled forms
MAX_MULTIPLE = 10_000
MAX_GBNF_CHARS = 8192
# max_lexer_states bounds the memory of one answer, at 1 to 2 KiB each; the others its time.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 10_000,
    "max_items_in_row": 2000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}
# Between the tokens of JSON: a line break with what is before and behind it, or a few blanks. Of any number of them a small model would
# write blanks, which are likely after blanks, until its tokens are used up.
WHITESPACE: Any = {"whitespace_pattern": r"[ \t]{1,4}|[ \t]{0,4}\r?\n[ \t]{0,64}"}
POSITION = re.compile(r"^(?:at )?\d+\(\d+\): ")  # in the grammar that a regex is wrapped in


class Grammar:
    """The form of one answer, and how far the answer has come in it. Made by a GrammarCompiler.

    A form is of text: special tokens, which Lark can name, are not in it."""

    def __init__(self, matcher: LLMatcher, field: str, texts: Mask, ends: Mask) -> None:
        self._matcher, self._texts, self._ends = matcher, texts, ends
        self.field = field  # as errors name it

    @property
    def is_complete(self) -> bool:
        """Whether the text so far has the form, so that EOS may come."""
        return bool(self._matcher.is_accepting())

    @property
    def is_finished(self) -> bool:
        """Whether nothing but EOS may come."""
        return bool(self._matcher.is_stopped())

    def mask(self) -> Mask:
        """The tokens that may come next: EOS where the text so far has the form, and no other special token nor a row of padding. Raises
        InvalidRequest where the grammar is too complex at this place, or leads nowhere."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: len(self._texts)]
        self._check()
        # Where all bytes may come (~/x/), llguidance also allows special tokens and rows of padding.
        return bits & (self._texts | self._ends if self.is_complete or self.is_finished else self._texts)

    def accept(self, token_id: int) -> None:
        """Go on by a token of the mask; EOS finishes, and after it nothing changes. Raises InvalidRequest as `mask` does."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token_id)
            self._check()

    def copy(self, field: str | None = None) -> Grammar:
        """At the same place, to go on by itself; field: what errors call the form there, where it is another."""
        return Grammar(self._matcher.deep_copy(), field or self.field, self._texts, self._ends)

    def _check(self) -> None:
        if self._matcher.is_error():
            _refuse(self.field, self._matcher.get_error(), "it cannot be followed", "simplify it")


class GrammarCompiler:
    """Makes the grammars of one model's requests; the engine owns it, and threads may share it.

    vocab_size: the model's number of logits. The tokens are gathered with the first grammar, a second or two for 150,000."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._eos = sorted(i for i in eos_token_ids or own if i < min(vocab_size, len(tokenizer)))
        self._bytes: LLTokenizer | None = None
        self._kept: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()
        self._lock = Lock()

    @cached_property
    def _ends(self) -> Mask:
        return mask_of(self._eos, self._vocab_size)

    @cached_property
    def _texts(self) -> Mask:
        ids = self._tokenizer.backend.get_vocab(with_added_tokens=True).values()
        texts = mask_of(ids, self._vocab_size)
        forbid(texts, [*self._tokenizer.special_ids, *self._eos])
        return texts

    def compile(self, form: StructuredOutputsParams) -> Grammar:
        """The grammar of a form, at its start. Raises InvalidRequest where it cannot be compiled, or no text can have the form."""
        with self._lock:
            if form in self._kept:
                self._kept.move_to_end(form)
                return self._kept[form].copy(form.field)
            self._bytes = self._bytes or self._gathered()
        from llguidance import LLMatcher, LLParserLimits

        matcher = LLMatcher(self._bytes, _source(form), log_level=0, limits=LLParserLimits(**LIMITS))
        if matcher.is_error():
            _refuse(form.field, matcher.get_error(), "it cannot be compiled", "correct or simplify it")
        grammar = Grammar(matcher, form.field, self._texts, self._ends)
        if not grammar.copy().mask().any():
            _refuse(grammar.field, "no token can begin it", "it cannot be followed", "correct it")
        with self._lock:
            self._kept[form] = grammar
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return grammar.copy()

    def _gathered(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        field, without = "structured_outputs", "leave structured_outputs out"
        if not self._eos:
            _refuse(field, "the model has no EOS to end an answer by", "no form can be asked of it", without)
        size = max(self._vocab_size, len(self._tokenizer))
        try:
            return LLTokenizer(_as_written(self._tokenizer.backend.to_str()), n_vocab=size, eos_token=self._eos)
        except Exception as error:
            _refuse(field, str(error), "the model's tokenizer is of no kind that can be constrained", without)


def _as_written(tokenizer: str) -> str:
    """A tokenizer.json that leaves characters as they are. llguidance tokenizes text that must come, which a form of Unicode (Qwen's
    tokenizers have NFC) would make other text, that the grammar then refuses."""
    value = json.loads(tokenizer)

    def kept(part: dict[str, Any]) -> bool:
        return part.get("type") not in ("NFC", "NFD", "NFKC", "NFKD")

    normalizer = value.get("normalizer") or {}
    if normalizer.get("type") == "Sequence":
        normalizer["normalizers"] = [*filter(kept, normalizer["normalizers"])]
    elif not kept(normalizer):
        value["normalizer"] = None
    return json.dumps(value)


def _source(form: StructuredOutputsParams) -> str:
    """The form as llguidance takes it."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

    at = form.field
    if form.kind == "json_object":
        return LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=WHITESPACE)
    if form.kind == "json":
        schema = json.loads(form.text)
        _check_multiples(at, schema)
        # Written anew: what was checked is what is compiled.
        return LLMatcher.grammar_from_json_schema(
            json.dumps(schema), defaults=WHITESPACE if isinstance(schema, dict) else None
        )
    if form.kind == "regex":
        return LLMatcher.grammar_from_regex(form.text)
    if form.kind == "choice":
        # One terminal: as alternatives of a rule they would each be an item of the parser's row, of which there are 2000.
        # A string of Lark is one of JSON, but DEL has to be escaped.
        choices = [json.dumps(choice, ensure_ascii=False).replace("\x7f", "\\u007f") for choice in form.choice or ()]
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {' | '.join(choices)}")
    if not is_lark_syntax(form.text):
        if len(form.text) > MAX_GBNF_CHARS:
            found = f"it is no Lark, which has a line start:, and {len(form.text)} characters of GBNF are too many"
            _refuse(at, found, "it cannot be compiled", f"write Lark, or at most {MAX_GBNF_CHARS} characters")
        try:
            return LLMatcher.grammar_from_lark(gbnf_to_lark(form.text))
        except Exception as error:
            _refuse(at, f"{error}", "it is no Lark, which has a line start:, nor GBNF", "correct it")
    if "%json" in form.text:
        _refuse(at, "%json is not taken", "it cannot be compiled", "give a schema as structured_outputs.json")
    return LLMatcher.grammar_from_lark(form.text)


def _check_multiples(at: str, schema: Any) -> None:
    """Raise InvalidRequest where the values of multipleOf, which may come together by allOf, have a large common multiple.

    The time to compile one grows with it, in steps of the smallest decimal place: 10,000 takes a tenth of a second, 1,000,000 14 s."""
    found = list(_multiples(schema))
    places = max((places for _, places in found), default=0)
    common = 1
    for number, own in found:
        common = math.lcm(common, number * 10 ** (places - own))
        if common > MAX_MULTIPLE:
            message = f"the common multiple of its multipleOf is over {MAX_MULTIPLE} of the smallest decimal place; leave them out."
            raise InvalidRequest(at, message, expected=MAX_MULTIPLE)


def _multiples(schema: Any) -> Iterator[tuple[int, int]]:
    """(digits, decimal places) of each multipleOf: 0.25 is (25, 2)."""
    rest = [schema]
    while rest:
        value = rest.pop()
        if isinstance(value, list):
            rest += value
        elif isinstance(value, dict):
            rest += value.values()
            step = value.get("multipleOf")
            if isinstance(step, (int, float)) and not isinstance(step, bool) and math.isfinite(step):
                places = 0
                while step != int(step):
                    step, places = step * 10, places + 1
                yield abs(int(step)) or 1, places


def _refuse(field: str, reason: str, what: str, remedy: str) -> NoReturn:
    lines = [line.strip() for line in reason.splitlines()] or [""]
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    told = "no text has this form" if told.startswith("NoExtension") else told
    told = told if field.endswith(".grammar") else POSITION.sub("", told)
    raise InvalidRequest(field, f"{what} ({reason_of(ValueError(told))}); {remedy}.")
