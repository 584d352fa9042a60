"""Recording: the lines of a Recorder in a file, and the tensors that they name in a folder beside it.

The first line says what the engine was made of: {"vlmfx": version, "torch": version, "model": name or null, "options": LLM's}."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from vlmfx.engine.recorder import Line, Recorder, Tensors
from vlmfx.errors import InvalidRequest, reason_of

HEADER = {"vlmfx", "torch", "model", "options"}
log = logging.getLogger("vlmfx")


def tensors_folder(path: str | Path) -> Path:
    """Where the tensors of a recording are, an image a file."""
    return Path(f"{path}.tensors")


def record_to(path: str | Path, header: Mapping[str, Any]) -> Recorder:
    """A Recorder that writes a file, which only its owner can read: it holds what users ask and show.

    Where the disk fails later, one log line says so and the recording ends; no request is harmed. Raises InvalidRequest for a file that
    is there already, or cannot be written."""
    folder = tensors_folder(path)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        file = open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        message = f"{path} cannot be written ({reason_of(error)}); name a new file in a folder that you may write to."
        raise InvalidRequest("record", message, found=str(path)) from error
    is_open = True

    def stop(error: OSError) -> None:
        nonlocal is_open
        is_open = False
        log.warning("the recording %s ends here, as it cannot be written (%s)", path, reason_of(error))

    def write(line: Line) -> None:
        if is_open:
            try:
                file.write(json.dumps(line, separators=(",", ":")) + "\n")
                file.flush()  # what was planned is there if the step brings the process down
            except OSError as error:
                stop(error)

    def keep(name: str, tensors: Tensors) -> None:
        target = folder / f"{name}.safetensors"
        if is_open and not target.exists():
            try:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target)
            except Exception as error:  # safetensors has its own
                stop(OSError(reason_of(error)))

    write({**header})
    return Recorder(write, keep)


def read_recording(path: str | Path) -> Iterator[Line]:
    """The lines of a recording, of which the last may be torn and is then left out. Raises InvalidRequest."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                try:
                    line = json.loads(text)
                except ValueError:
                    if not text.endswith("\n"):
                        return
                    line = None
                if not isinstance(line, dict) or (number == 1 and not line.keys() >= HEADER):
                    message = f"line {number} of {path} is not one of a recording; name a file that --record wrote."
                    raise InvalidRequest("file", message, found=str(path))
                yield line
    except (OSError, UnicodeDecodeError) as error:
        message = f"{path} cannot be read ({reason_of(error)}); name a file that --record wrote."
        raise InvalidRequest("file", message, found=str(path)) from error


def load_tensors(path: str | Path, name: str) -> Tensors:
    """The tensors that a line of a recording names. Raises InvalidRequest."""
    try:
        found: Tensors = load_file(tensors_folder(path) / f"{name}.safetensors")
    except Exception as error:  # safetensors has its own
        folder = tensors_folder(path).name
        message = f"the tensors {name} of {path} cannot be read ({reason_of(error)}); copy {folder} with the file."
        raise InvalidRequest("file", message, found=str(path)) from error
    return found
