"""What a request's fields may hold: each check returns the stored form, or raises the InvalidRequest that names the field."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, NoReturn

from vlmfx.errors import InvalidRequest, shown


def refuse(field: str, found: object, expected: str, remedy: str) -> NoReturn:
    raise InvalidRequest(field, f"found {shown(found)} but need {expected}; {remedy}.", found=found, expected=expected)


def refuse_absent(options: Mapping[str, Any], absent: frozenset[str], within: str = "") -> None:
    """Raise InvalidRequest for the first of these options that vLLM has and we have not."""
    for name in options:
        if name in absent:
            raise InvalidRequest(within + name, "vLLM has it, but vlmfx does not yet; remove it.", found=options[name])


def number(field: str, value: object, low: float, high: float, remedy: str, *, above: bool = False) -> float:
    """value as a float in [low, high], or (low, high] where above; numpy's scalars count as numbers, bool does not."""
    if math.inf in (high, -low):
        span = f" {'above' if above else 'of at least'} {low:g}" if low > -math.inf else ""
    else:
        span = f" in {'(' if above else '['}{low:g}, {high:g}]"
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        if math.isfinite(found) and low <= found <= high and not (above and found == low):
            return found
    refuse(field, value, f"a finite number{span}", remedy)


def integer(field: str, value: object, low: int, high: int | None, remedy: str) -> int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        found = int(value)
        if low <= found and (high is None or found <= high):
            return found
    span = f"of at least {low}" if high is None else f"from {low} to {high}"
    refuse(field, value, f"an integer {span}", remedy)


def boolean(field: str, value: object) -> bool:
    if not isinstance(value, bool):
        refuse(field, value, "True or False", "leave it out for the default")
    return value


def strings(
    field: str, value: object, remedy: str, *, most: int | None = None, most_chars: int | None = None
) -> tuple[str, ...]:
    """A list of strings of at least one character, at most `most`, each once, of at most most_chars together. remedy: what an empty
    string would do."""
    if not isinstance(value, (list, tuple)):
        refuse(field, value, "a list of strings", "wrap a single string in a list")
    for string in value:
        if not isinstance(string, str) or not string:
            refuse(field, string, "strings of at least one character", remedy)
        if not is_unicode(string):
            refuse(field, string, "valid Unicode", "remove the lone surrogate")
    if most is not None and len(value) > most:
        raise InvalidRequest(field, f"found {len(value)} strings but need at most {most}; leave some out.", found=value)
    if most_chars is not None and (count := sum(map(len, value))) > most_chars:
        message = f"found {count} characters in all but need at most {most_chars}; leave some out."
        raise InvalidRequest(field, message, found=count, expected=most_chars)
    return tuple(dict.fromkeys(value))


def token_ids(field: str, value: object) -> tuple[int, ...]:
    """A list of ids of 0 or more, each once."""
    if not isinstance(value, (list, tuple)):
        refuse(field, value, "a list of token ids", "wrap a single id in a list")
    return tuple(dict.fromkeys(integer(field, i, 0, None, "look ids up in the tokenizer") for i in value))


def is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8, which half a surrogate pair, that JSON can carry, cannot."""
    try:
        text.encode()
    except UnicodeError:
        return False
    return True
