"""CompileCounter: one compile counts once, calls count nothing, and counting imports no compiler."""

from __future__ import annotations

import pytest
import torch

from tests.compile.functions import needs_compiler
from tests.ops.kernels import HAS_TRITON
from tests.test_import import in_a_new_interpreter
from vlmfx.compile.counter import CompileCounter, Compiles


@needs_compiler
def test_dynamo_is_counted_once_a_shape():
    fn = torch.compile(lambda x: x * 2 + 1, backend="eager", dynamic=False)
    running = CompileCounter()
    for size, graphs in ((3, 1), (3, 0), (4, 1), (3, 0), (4, 0)):
        with CompileCounter() as counter:
            fn(torch.ones(size))
        assert counter.compiles == Compiles(dynamo=graphs, inductor=0, triton=0)
    assert (running.compiles, running.total) == ((2, 0, 0), 2)
    fn(torch.ones(5))
    assert counter.total == 0  # the block is over
    assert running.total == 3


COUNT = """
import sys
from vlmfx.compile.counter import CompileCounter
counter = CompileCounter()
print(counter.total, [m for m in sys.modules if m.startswith(("torch._dynamo", "torch._inductor", "triton"))])
"""


def test_counting_imports_no_compiler():
    assert in_a_new_interpreter(COUNT).strip() == "0 []"


AS_TRITON = """
from triton import knobs
for cache_hit in (False, True, False):
    knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=cache_hit)
print(counter.compiles.triton, len(seen))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="Triton before 3.6 has no such listener")
def test_tritons_listener_is_set_when_it_is_imported_later_and_others_keep_theirs():
    assert in_a_new_interpreter(f"seen = []\n{COUNT}\n{AS_TRITON}").splitlines()[-1] == "2 0"
    before = "from triton import knobs\nseen = []\nknobs.compilation.listener = lambda **kernel: seen.append(kernel)\n"
    assert in_a_new_interpreter(f"{before}\n{COUNT}\n{AS_TRITON}").splitlines()[-1] == "2 3"
