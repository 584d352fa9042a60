"""Checks of values in a model folder's JSON files; each raises CheckpointError, which names key, found and expected."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from vlmfx.errors import CheckpointError, shown

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
MAX_INT, MAX_FLOAT, MAX_LAYERS = 2**31 - 1, 3.4e38, 1000


def refuse(key: str, found: Any, expected: str, *, file: str = CONFIG) -> NoReturn:
    """Raise the CheckpointError of one key."""
    raise CheckpointError(f"{file}: {key} is {shown(found)}, expected {expected}; restore the published {file}.")


def section(
    hf: Mapping[str, Any], key: str, *, optional: bool = False, at: str = "", file: str = CONFIG
) -> dict[str, Any]:
    """The object under a key; {} where an optional one is absent or null. Raises KeyError where another is absent."""
    value = hf.get(key) if optional else hf[key]
    if value is None and optional:
        return {}
    if not isinstance(value, dict):
        refuse(at + key, value, "an object", file=file)
    return value


def listed(
    hf: Mapping[str, Any], key: str, *, default: tuple[Any, ...] | None = None, at: str = "", file: str = CONFIG
) -> tuple[Any, ...]:
    """The list under a key. Raises KeyError where it is absent and has no default."""
    value = hf[key] if default is None else hf.get(key, default)
    if not isinstance(value, (list, tuple)):
        refuse(at + key, value, "a list", file=file)
    return tuple(value)


def positive_int(key: str, value: Any, *, most: int = MAX_INT, file: str = CONFIG) -> int:
    """An integer from 1 to most; True and 1.0 are none."""
    if type(value) is not int or not 1 <= value <= most:
        refuse(key, value, f"an integer from 1 to {most}", file=file)
    return value


def positive_float(key: str, value: Any, *, file: str = CONFIG) -> float:
    """A finite number above 0, in float32's range."""
    if type(value) not in (int, float) or not 0 < value <= MAX_FLOAT:
        refuse(key, value, "a finite number above 0", file=file)
    return float(value)


def one_of(key: str, value: Any, allowed: Iterable[Any], *, file: str = CONFIG) -> Any:
    """A value that is among those allowed."""
    choices = tuple(allowed)
    if value not in choices:
        refuse(key, value, f"one of {', '.join(map(str, choices))}", file=file)
    return value


def multiple_of(key: str, value: int, of: str, factor: int) -> int:
    """A multiple of another key's value."""
    if value % factor:
        refuse(key, value, f"a multiple of {of}, which is {factor}")
    return value


def token_id(key: str, value: Any, vocab_size: int) -> int:
    """An id of the vocabulary."""
    if type(value) is not int or not 0 <= value < vocab_size:
        refuse(key, value, f"an integer from 0 to {vocab_size - 1}, the last row of the embeddings")
    return value


def three_numbers(key: str, value: Any, *, positive: bool) -> tuple[float, ...]:
    """A preprocessor's number for each of red, green and blue."""
    low = 0 if positive else -MAX_FLOAT
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 3
        or any(type(v) not in (int, float) or not low <= v <= MAX_FLOAT or (positive and v == 0) for v in value)
    ):
        refuse(key, value, f"three finite numbers{' above 0' if positive else ''}", file=PREPROCESSOR)
    return tuple(value)


def supported(found: Mapping[str, Any], table: Mapping[str, Any], *, file: str = CONFIG, at: str = "") -> None:
    """Refuse every key of `table` that is set to another value than the one there; numbers are compared within 1e-9.

    A key that is absent or null has its default, which is the value in the table."""
    for key, expected in table.items():
        value = found.get(key)
        same = value == expected or (
            type(value) is type(expected) is float and math.isclose(value, expected, rel_tol=0, abs_tol=1e-9)
        )
        if value is not None and not same:
            refuse(at + key, value, f"{expected!r}, the only one implemented", file=file)
