"""`tl.device_assert` in Triton's interpreter, which like the compiler passes over it unless it debugs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from tests.ops.kernels import IS_INTERPRETED


@contextmanager
def device_asserts() -> Iterator[None]:
    """In this context an interpreted kernel fails where a device assertion does; a compiled one is as it was."""
    if not IS_INTERPRETED:
        yield
        return
    from triton.runtime.errors import InterpreterError
    from triton.runtime.interpreter import interpreter_builder

    before = interpreter_builder.options
    interpreter_builder.options = replace(before, debug=True)
    try:
        yield
    except InterpreterError as error:
        raise AssertionError(str(error)) from error
    finally:
        interpreter_builder.options = before
