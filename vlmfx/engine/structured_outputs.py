"""StructuredOutputsParams: the form that an answer is to have. Plain Python; `vlmfx.engine.grammar` makes a grammar of it.

Source of names: vllm-project/vllm: vllm/sampling_params.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmfx.engine.fields import boolean, is_unicode, refuse, refuse_absent, strings
from vlmfx.errors import InvalidRequest, reason_of

KINDS = ("json", "regex", "choice", "grammar", "json_object")
MAX_CHARS = 65_536  # of a schema, a regex, a grammar, or of all choices together
ABSENT = frozenset({
    "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern", "structural_tag",
    "backend", "disable_fallback",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What the text of an answer is to match, exactly one of: json, a JSON schema; regex, which the whole text matches; choice, one
    of these strings; grammar, in Lark's notation or GBNF; json_object, any JSON object.

    sent_as: the name that errors have for it, where it came in a field that is not structured_outputs.

    json is stored as text, choice as a tuple. The form is checked here, up to 65,536 characters; whether it can be compiled, when the
    request is admitted. Raises InvalidRequest."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    sent_as: str | None = field(default=None, compare=False, repr=False)

    def __new__(cls, **options: Any) -> StructuredOutputsParams:
        refuse_absent(options, ABSENT, "structured_outputs.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.json_object is not None and not boolean("structured_outputs.json_object", self.json_object):
            object.__setattr__(self, "json_object", None)
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            hint = "leave out all but one" if given else "give one, or no structured_outputs"
            raise InvalidRequest(
                "structured_outputs", f"found {found} but need exactly one of {', '.join(KINDS)}; {hint}."
            )
        at = self.field
        if self.json is not None:
            object.__setattr__(self, "json", _schema(at, self.json))
        elif self.choice is not None:
            choices = strings(at, self.choice, "leave the empty one out")
            if not choices:
                refuse(at, self.choice, "a list of at least one string", "write the choices")
            object.__setattr__(self, "choice", choices)
        elif not self.json_object and (not isinstance(self.text, str) or not self.text or not is_unicode(self.text)):
            refuse(at, self.text, "a string of at least one character of valid Unicode", f"write the {self.kind}")
        size = sum(map(len, self.choice or ())) if self.choice is not None else len(self.text)
        if size > MAX_CHARS:
            raise InvalidRequest(at, f"found {size} characters but need at most {MAX_CHARS}; shorten it.", found=size)

    @property
    def kind(self) -> str:
        """Which one is given."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def field(self) -> str:
        """What errors call it."""
        return self.sent_as or f"structured_outputs.{self.kind}"

    @property
    def text(self) -> str:
        """The schema, regex or grammar as text; empty for json_object."""
        text = self.json or self.regex or self.grammar or ""
        return text  # type: ignore[return-value]  # json is stored as text


def _schema(at: str, schema: object) -> str:
    """A JSON schema, a dict or its text, as text."""
    expected, remedy = "a JSON schema, as a dict or as text", "a pydantic model has model_json_schema()"
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        text.encode()
        if len(text) <= MAX_CHARS and not isinstance(json.loads(text), dict):
            refuse(at, schema, expected, remedy)
    except InvalidRequest:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        reason = reason_of(error)
        raise InvalidRequest(
            at, f"it is no JSON ({reason}); give {expected}.", found=schema, expected=expected
        ) from error
    return text


GuidedDecodingParams = StructuredOutputsParams  # vLLM's older name
