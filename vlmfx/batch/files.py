"""The two files of a batch: lines in, one at a time, and lines out, each whole or cut off on the next start."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from vlmfx.errors import InvalidRequest, reason_of

CHUNK = 1 << 20
START = b'{"id": '  # of each line that we write


def check_paths(source: str | Path, target: str | Path) -> None:
    """Raise InvalidRequest for a source that cannot be read, or that is the target."""
    try:
        with open(source, "rb"):
            pass
    except OSError as error:
        message = f"{source} cannot be read ({reason_of(error)}); name a file of JSON lines."
        raise InvalidRequest("in", message, found=str(source)) from error
    if os.path.exists(target) and os.path.samefile(source, target):
        raise InvalidRequest("out", f"{target} is the input itself; name another file.", found=str(target))


def lines(source: str | Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, the line without its end) of each line that is not blank."""
    with open(source, "rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield number, line.strip()


def count_lines(source: str | Path) -> int | None:
    """How many lines a file has, the blank ones too; None of what cannot be read twice."""
    if not os.path.isfile(source):
        return None
    count, last = 0, b"\n"
    with open(source, "rb") as file:
        while chunk := file.read(CHUNK):
            count, last = count + chunk.count(b"\n"), chunk[-1:]
    return count + (last != b"\n")


class Results:
    """The output file: what an earlier run has written stays, and a line that it was writing when it ended is cut off.

    Raises InvalidRequest for a file that cannot be written, that another run is writing, or that holds anything else."""

    def __init__(self, target: str | Path) -> None:
        self.target = target
        try:
            self._file: BinaryIO = open(target, "r+b" if os.path.exists(target) else "w+b")  # noqa: SIM115
        except OSError as error:
            raise self._not_writable(error) from error
        try:
            self._lock()
        except BaseException:
            self._file.close()
            raise

    def earlier(self) -> Iterator[dict[str, Any]]:
        """The lines that are there, then the place where new ones go. To be read to its end before `write`."""
        file, number, end = self._file, 0, 0
        file.seek(0)
        for number, line in enumerate(file, start=1):
            result = _result(line)
            if result is not None:
                yield result
            elif line.endswith(b"\n") or not (line.startswith(START) or START.startswith(line)):
                message = f"line {number} of {self.target} is not a result of a batch; name another file."
                raise InvalidRequest("out", message, found=str(self.target))
            else:
                break  # torn
            end += len(line)
            if not line.endswith(b"\n"):  # whole, but for its end
                file.seek(end)
                file.write(b"\n")
                end += 1
                break
        file.seek(end)
        file.truncate()

    def write(self, line: bytes) -> None:
        """Append a line, which is in the file when this returns."""
        try:
            self._file.write(line + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._not_writable(error) from error

    def close(self) -> None:
        with suppress(OSError):  # what could not be written was told
            self._file.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no POSIX
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            message = f"{self.target} is being written by another run; wait for it, or name another file."
            raise InvalidRequest("out", message, found=str(self.target)) from error

    def _not_writable(self, error: OSError) -> InvalidRequest:
        message = f"{self.target} cannot be written ({reason_of(error)}); name another file, or make room."
        return InvalidRequest("out", message, found=str(self.target))


def _result(line: bytes) -> dict[str, Any] | None:
    """A line of an output file; None for anything else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and {"id", "custom_id", "response"} <= value.keys() else None
