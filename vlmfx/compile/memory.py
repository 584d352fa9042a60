"""The memory of this machine that new processes may take."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

# Of a control group of version 2 and 1: its folder, and the files of its limit, of what it uses, and which of that are files read
# before, which make room by themselves.
_V2 = ("", "memory.max", "memory.current", "inactive_file")
_V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_bytes(root: Path = Path("/")) -> int:
    """What can be had without swapping: Linux's MemAvailable, or what the process's control groups leave where that is less.

    All the machine's memory where there is no /proc, 0 where that is not known either. root: of the files of the system."""
    available = _number(root / "proc" / "meminfo", "MemAvailable:")
    if available is None:
        return _physical_bytes()
    return max(0, min([available << 10, *_left_by_groups(root)]))


def _left_by_groups(root: Path) -> Iterator[int]:
    """What is left of each limit on this process: of its group's and of those that this one is in."""
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, limit, usage, reclaimable = _V1 if controllers else _V2
        mount = root / "sys" / "fs" / "cgroup" / folder
        for at in (mount / group.lstrip("/"), *(mount / group.lstrip("/")).parents):
            most, used = _number(at / limit), _number(at / usage)
            if most is not None and used is not None:
                yield most - used + (_number(at / "memory.stat", f"{reclaimable} ") or 0)
            if at == mount:
                break


def _number(file: Path, key: str = "") -> int | None:
    """The number behind a key that begins a line; None where there is none, as in a limit that is "max"."""
    try:
        found = re.search(rf"^{key}\s*(\d+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def _physical_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
