"""URLs in what is asked: those that may have to be fetched from elsewhere, which is done by threads of its own."""

from __future__ import annotations

import re
from typing import Any

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:", re.ASCII)


def names_urls(prompt: dict[str, Any]) -> bool:
    """Whether some part of a prompt's messages may have to be fetched from elsewhere."""
    messages = prompt.get("messages")
    rest = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    parts: list[Any] = [part for content in rest if isinstance(content, list) for part in content]
    while parts:
        value = parts.pop()
        if isinstance(value, dict):
            parts += [item for key, item in value.items() if key not in ("text", "type")]
        elif isinstance(value, list):
            parts += value
        elif isinstance(value, str) and URL.match(value) and is_fetched(value):
            return True
    return False


def is_fetched(url: str) -> bool:
    """Whether what a URL names is elsewhere, and not in itself."""
    return url[:5].lower() != "data:"
