"""One line of what vlmfx doctor tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "absent", "broken"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """status: "ok", "absent" (something optional that is not here, or not in a version that fits) or "broken".

    todo says what to do, and is empty for "ok"."""

    name: str
    status: Status
    found: str
    todo: str = ""

    def __str__(self) -> str:
        sign = {"ok": "ok    ", "absent": "–     ", "broken": "BROKEN"}[self.status]
        return f"{sign}  {self.name:<17}  {self.found}" + (f"; {self.todo}" if self.todo else "")


def failed(name: str, error: Exception) -> Check:
    """The line of a check that raised."""
    reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")[:300]
    missing = getattr(error, "name", None) if isinstance(error, ImportError) else None
    todo = f"install {missing} again" if missing else "repair what it names, then run vlmfx doctor again"
    return Check(name=name, status="broken", found=f"{type(error).__name__}: {reason}", todo=todo)
