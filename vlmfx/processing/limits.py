"""limit_mm_per_prompt: the most images and videos a prompt may hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vlmfx.errors import InvalidRequest, shown

FIELD = "limit_mm_per_prompt"
MODALITIES = ("image", "video", "audio")  # there is no audio here, but scripts of vLLM's set its limit to 0


def limits_of(value: Mapping[str, Any] | str | Sequence[str] | None) -> dict[str, int]:
    """Modality → limit, of a mapping, or of texts "image=2,video=1" or '{"image": 2}' as on a command line. Raises InvalidRequest."""
    if isinstance(value, (list, tuple)):
        return {name: limit for item in value for name, limit in limits_of(item).items()}
    given = _parsed(value) if isinstance(value, str) else {} if value is None else value
    if not isinstance(given, Mapping):
        message = f'it is {shown(value)}; give {{"image": 2}}, or image=2 on the command line.'
        raise InvalidRequest(FIELD, message, found=value)
    for name, limit in given.items():
        if name not in MODALITIES:
            message = f"it has {shown(name)}; use {', '.join(MODALITIES)}."
            raise InvalidRequest(FIELD, message, found=name, expected=MODALITIES)
        if type(limit) is not int or limit < 0:
            message = f"{name} is {shown(limit)}; use a whole number of 0 or more."
            raise InvalidRequest(FIELD, message, found=limit)
    return dict(given)


def _parsed(text: str) -> Any:
    try:
        if text.lstrip().startswith("{"):
            return json.loads(text)
        pairs = [item.partition("=") for item in text.split(",") if item.strip()]
        return {name.strip(): int(limit) for name, _, limit in pairs}
    except (ValueError, RecursionError):
        return None
