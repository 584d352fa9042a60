"""memory: what a machine has left, by files of a system that is made up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vlmfx.compile.memory import available_bytes

GIB = 1 << 30


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {
    "proc/meminfo": f"MemTotal: {(64 * GIB) >> 10} kB\nMemFree: 1024 kB\nMemAvailable:   {(48 * GIB) >> 10} kB\n"
}
V2 = {
    "proc/self/cgroup": "0::/machine/job\n",
    "sys/fs/cgroup/machine/memory.max": f"{10 * GIB}\n",
    "sys/fs/cgroup/machine/memory.current": f"{7 * GIB}\n",
    "sys/fs/cgroup/machine/memory.stat": f"anon 5\nactive_file 3\ninactive_file {2 * GIB}\n",
    "sys/fs/cgroup/machine/job/memory.max": "max\n",
    "sys/fs/cgroup/machine/job/memory.current": f"{6 * GIB}\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/job\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
    "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{4 * GIB}\n",
    "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{1 * GIB}\n",
    "sys/fs/cgroup/memory/job/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB >> 1}\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MEMINFO, 48 * GIB),
        (MEMINFO | {"proc/self/cgroup": "0::/\n"}, 48 * GIB),
        (MEMINFO | V2, 5 * GIB),
        (MEMINFO | V2 | {"sys/fs/cgroup/machine/job/memory.max": f"{5 * GIB}"}, 0),
        (MEMINFO | V1, (7 * GIB) >> 1),
    ],
)
def test_the_lowest_limit_counts(tmp_path, files, expected):
    assert available_bytes(system(tmp_path, files)) == expected


def test_a_machine_without_proc_has_its_memory(tmp_path, monkeypatch):
    values = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(os, "sysconf", values.__getitem__)
    assert available_bytes(tmp_path) == 4_096_000

    def unknown(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(os, "sysconf", unknown)
    assert available_bytes(tmp_path) == 0


def test_this_machine_has_some():
    assert available_bytes() > 0
