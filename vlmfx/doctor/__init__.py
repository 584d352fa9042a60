"""What of vlmfx runs on this machine, what does not and why, and what to do about it: one line a check.

Nothing here raises and nothing is imported at the top that may be missing or broken: that is what it looks for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict

from vlmfx.doctor import devices, model, packages
from vlmfx.doctor.check import Check, failed

CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    devices.machine, packages.own, devices.torch_build, devices.cpu, devices.cuda, devices.mlu, devices.kernels, devices.triton,
    packages.packages, model.cache, model.scenes,
)  # fmt: skip


def examine(*, is_full: bool = False) -> list[Check]:
    """Every check in order; one that fails by itself is a broken line. is_full also answers a question with the shipped model."""
    found: list[Check] = []
    for check in (*CHECKS, *([model.answer] if is_full else [])):
        try:
            found.extend(check())
        except Exception as error:  # whatever a half-installed package raises
            found.append(failed(check.__name__, error))
    return found


def main(*, is_full: bool = False, as_json: bool = False) -> int:
    """Print the checks; 1 when one is broken."""
    checks = examine(is_full=is_full)
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=1, ensure_ascii=False))
    else:
        counts = {status: sum(c.status == status for c in checks) for status in ("ok", "absent", "broken")}
        print("\n".join(map(str, checks)))
        print(f"\n{counts['ok']} ok, {counts['absent']} absent and optional, {counts['broken']} broken.")
    return int(any(check.status == "broken" for check in checks))
