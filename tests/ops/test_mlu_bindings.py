"""What the bindings of mlu refuse, each before a launch and by the argument's name; and that they bind every op."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from tests.ops import emulated
from vlmfx.ops import paged_decode_attention, prefill_attention, rms_norm, rotary_cache_write, vision_attention
from vlmfx.ops.registry import OPS, Op

pytestmark = [emulated.NO_EMULATOR] if not emulated.HAS_EMULATOR else []

HALF = torch.float16
CACHE = torch.zeros(4, 2, 16, 64)
VAST = torch.from_numpy(np.zeros(2**31, np.uint8)).view(HALF)  # zero pages, which no one touches
NUMBERS = torch.zeros(2, dtype=torch.int32)


def refused(op: Op, *args: Any) -> str:
    """What the op says of the arguments; nothing was launched."""
    with pytest.raises(ValueError) as caught:
        emulated.call(op, *args)
    assert emulated.counters().launches == 0
    return str(caught.value).splitlines()[0]


CASES: dict[str, tuple[tuple[Any, ...], str]] = {
    "bfloat16": (
        (rms_norm.OP, torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16), 1e-6),
        "rms_norm: x has BFloat16 but the kernels for mlu take Half and Float",
    ),
    "float64": (
        (rms_norm.OP, torch.ones(2, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64), 1e-6),
        "rms_norm: x has Double but the kernels for mlu take Half and Float",
    ),
    "another device": (
        (rms_norm.OP, torch.ones(2, 8), torch.ones(8, device="meta"), 1e-6),
        "rms_norm: weight is on meta but the first argument is on cpu",
    ),
    "another shape": (
        (rms_norm.OP, torch.ones(2, 8), torch.ones(7), 1e-6),
        r"rms_norm: weight has shape \[7\] but needs \[8\]",
    ),
    "2^31 bytes": (
        (rms_norm.OP, VAST.view(-1, 8), torch.ones(8, dtype=HALF), 1e-6),
        "rms_norm: .* has 2147483648 bytes but the chip takes fewer than 2147483648",
    ),
    "over capacity": (
        (rms_norm.OP, torch.ones(2, 40000), torch.ones(40000), 1e-6),
        "rms_norm: hidden needs [0-9]+ bytes of a core's NRAM but it has 655360",
    ),
    "a head_dim": (
        (vision_attention.OP, *[torch.ones(2, 1, 300)] * 3, NUMBERS, NUMBERS, 1.0),
        "vision_attention: q has a head_dim of 300 but needs 1 to 256",
    ),
    "a table of another length": (
        (paged_decode_attention.OP, torch.ones(2, 4, 64), CACHE, CACHE, NUMBERS.view(1, 2), NUMBERS, None, None, 1.0, 0),
        r"paged_decode_attention: block_table has shape \[1, 2\] but needs \[2, 2\]",
    ),
    "a prefix without its length": (
        (prefill_attention.OP, *[torch.ones(2, 2, 64)] * 3, NUMBERS, CACHE, CACHE, NUMBERS.view(1, 2), None, 1.0, 0),
        "prefill_attention: k_cache needs v_cache, block_table and prefix_lens beside it",
    ),
    "a cache that is not contiguous": (
        (
            rotary_cache_write.OP, torch.ones(2, 8, 64), torch.ones(2, 64), torch.ones(2, 64), CACHE.mT.contiguous().mT, CACHE,
            NUMBERS,
        ),
        "rotary_cache_write: k_cache is not contiguous, but is written in place",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_named(name: str):
    (op, *args), expected = CASES[name]
    assert re.match(expected, refused(op, *args))


def test_every_op_is_bound():
    emulated.path()
    for name in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vlmfx::{name}", "PrivateUse1"), name
