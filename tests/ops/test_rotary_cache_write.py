"""rotary_cache_write is rotary, then cache_write: of kernels, bits and all that is left in the caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops import emulated
from tests.ops.caches import BLOCK_SIZES, empty_cache, fused_qkv, slot_mappings
from tests.ops.device_asserts import device_asserts
from tests.ops.kernels import Kernel, Mutant, assert_equal, kernels_of
from tests.ops.rotary_tables import heads_of, rotary_tables, table_dtypes
from tests.strategies import DTYPES, SEEDS
from vlmfx.errors import ShapeError
from vlmfx.ops import cache_write, rotary
from vlmfx.ops.registry import Op
from vlmfx.ops.rotary import rotary_table
from vlmfx.ops.rotary_cache_write import OP, reference, rotary_cache_write

MUTANTS = [
    Mutant(
        "triton/rotary_cache_write.py", "inside & (k_heads >= 0) & (slot >= 0)", "inside & (k_heads >= 0) & (slot > 0)"
    ),
    Mutant("triton/rotary_cache_write.py", "(TURNED + v_heads)", "(TURNED - KV_HEADS + v_heads)"),
    Mutant(
        "triton/rotary_cache_write.py", "v_inside = (v_heads < KV_HEADS) &", "v_inside = (v_heads < KV_HEADS - 1) &"
    ),
    Mutant(
        "triton/rotary_cache_write.py", "tl.program_id(1) * V_HEADS + tl.arange(0, V_HEADS)", "tl.arange(0, V_HEADS)"
    ),
    Mutant("triton/rotary_cache_write.py", "row_of(slot, k_heads, ", "row_of(token, k_heads, "),
    Mutant("mlu/kernels/rotary_cache_write.mlu", "if (slot < 0 || num <= 0) return;", "if (num <= 0) return;"),
    Mutant("mlu/kernels/rotary_cache_write.mlu", "slot[((step - 2) % 3)", "slot[((step - 1) % 3)"),
    Mutant("mlu/kernels/rotary_cache_write.mlu", "first_v = MAX(turned, t.head)", "first_v = turned"),
    Mutant("mlu/kernels/rotary_cache_write.mlu", "first_k = MAX(heads, t.head)", "first_k = t.head"),
    Mutant("mlu/kernels/rotary_cache_write.mlu", "from + i * t.heads * dim, i * num, num,", "from + i * num * dim, i * num, num,"),
    Mutant("mlu/kernels/rotary_cache_write.mlu", "from + (i * num + first_k - t.head)", "from + (first_k - t.head)"),
    Mutant("mlu/kernels/rotary_cache_write.mlu", "    __sync();\n", ""),
    Mutant("mlu/kernels/rotary.h", "planes + first * pitch + plane, heads", "planes + plane, heads"),
]  # fmt: skip


HALVES = [1, 2, 5, 32, 40, 64, 600]  # of a head; of 600 a program takes two heads


@st.composite
def cases(draw: st.DrawFn, halves: Sequence[int] = HALVES) -> tuple[Any, ...]:
    """No token to a few, one program's heads and more, heads whose half is no power of two; qkv a slice of something wider, too."""
    tokens, half = draw(st.integers(0, 4)), draw(st.sampled_from(halves))
    heads = draw(st.integers(0, 6) if half > 40 else st.sampled_from([0, 1, 2, 7, 28, 61]))
    kv_heads, block_size, dtype = draw(st.integers(1, 5)), draw(BLOCK_SIZES), draw(DTYPES)
    qkv, *_ = fused_qkv(draw(SEEDS), tokens, heads + 2, kv_heads, 2 * half, dtype)
    num_blocks = draw(st.integers(1, 3)) + tokens // block_size
    caches = [empty_cache(num_blocks, kv_heads, block_size, 2 * half, dtype) for _ in range(2)]
    table = draw(rotary_tables(tokens, 2 * half, draw(table_dtypes(dtype))))
    before = draw(st.sampled_from([0, 2]))
    return (
        heads_of(qkv, before, heads + 2 * kv_heads),
        *table,
        *caches,
        draw(slot_mappings(tokens, num_blocks * block_size)),
    )


def telling_cases() -> st.SearchStrategy[tuple[Any, ...]]:
    """Half of them of several programs a token, without which it does not tell which heads of v a program takes."""
    return cases(halves=HALVES[-1:]) | cases()


def after(kernel: Any, case: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel returns, and the two caches."""
    qkv, cos, sin, k_cache, v_cache, slots = case
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    return kernel(qkv, cos, sin, k_cache, v_cache, slots), k_cache, v_cache


def check(kernel: Kernel, case: tuple[Any, ...]) -> None:
    """The kernel returns what the reference returns, and leaves the caches so."""
    with device_asserts():
        mine = after(kernel, case)
    assert_equal(OP, mine, after(reference, case))
    assert mine[0].is_contiguous()


def mlu_case() -> tuple[tuple[Any, ...], dict[str, int]]:
    """A prefill of 512 tokens of Qwen2-VL-7B, and what the kernel's count by hand names."""
    qkv, _, _ = fused_qkv(0, 512, 28, 4, 128, torch.float16)
    table = rotary_table(torch.arange(512)[:, None] * torch.ones(64), torch.float16)
    caches = [empty_cache(32, 4, 16, 128, torch.float16) for _ in range(2)]
    numbers = {"tokens": 512, "heads": 28, "kv_heads": 4, "dim": 128}
    return (qkv, *table, *caches, torch.arange(512, dtype=torch.int32)), numbers


@pytest.mark.parametrize("kernel", kernels_of(OP))
@given(case=cases())
def test_kernel_equals_reference(kernel, case):
    check(kernel, case)


def run_of(kernel: str, op: Op) -> Any:
    """What the kernel of this name is of another op."""
    if kernel == "mlu-emulated":
        return emulated.kernel(op)
    return op.cpu if kernel in ("cpu", "traced") else op.kernel("cuda")


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=40)
@given(case=cases())
def test_it_is_the_two_ops(kernel, case):
    """To the bit, on the CPU; on a GPU another compilation may fuse another product with the sum."""
    qkv, cos, sin, k_cache, v_cache, slots = case
    kv_heads, k_cache, v_cache = k_cache.shape[1], k_cache.clone(), v_cache.clone()
    turn, write = (
        Kernel(op, kernel.name, kernel.device, run_of(kernel.name, op)) for op in (rotary.OP, cache_write.OP)
    )
    turned = turn(qkv[:, :-kv_heads], cos, sin)
    write(turned[:, -kv_heads:], qkv[:, -kv_heads:], k_cache, v_cache, slots)
    mine = after(kernel, case)
    if kernel.device != "cpu":
        assert_equal(OP, mine, (turned, k_cache, v_cache))
        return
    for got, right in zip(mine, (turned, k_cache, v_cache), strict=True):
        torch.testing.assert_close(got, right, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=30)
@given(case=cases(), pad=st.integers(1, 5))
def test_padding_never_shows(kernel, case, pad):
    """Rows of slot −1 beyond the batch, NaN in all they hold, change neither the others nor the caches."""
    qkv, cos, sin, k_cache, v_cache, slots = case
    rows = [torch.cat([t, t.new_full((pad, *t.shape[1:]), torch.nan)]) for t in (qkv, cos, sin)]
    padded = after(kernel, (*rows, k_cache, v_cache, torch.nn.functional.pad(slots, (0, pad), value=-1)))
    alone = after(kernel, case)
    assert torch.equal(padded[0][: len(qkv)], alone[0])
    for mine, right in zip(padded[1:], alone[1:], strict=True):
        torch.testing.assert_close(mine, right, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", kernels_of(OP))
def test_a_slot_beyond_the_cache_is_an_error(kernel):
    if kernel.device != "cpu":
        pytest.skip("on a GPU only Triton's debug mode looks")
    caches, table = [torch.zeros(3, 1, 5, 4) for _ in range(2)], rotary_table(torch.ones(1, 2), torch.float32)
    with pytest.raises(Exception, match=r"beyond the cache|out of bounds"), device_asserts():
        kernel(torch.ones(1, 3, 4), *table, *caches, torch.tensor([15], dtype=torch.int32))


def test_wrong_inputs_are_named():
    qkv, k_cache, v_cache = torch.ones(3, 6, 8), torch.zeros(4, 2, 5, 8), torch.zeros(4, 2, 5, 8)
    table, slots = rotary_table(torch.ones(3, 4), torch.float32), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ShapeError, match=r"qkv has shape \(3, 3, 8\) but needs shape .* with 4 heads of k and v"):
        rotary_cache_write(qkv[:, :3], table, k_cache, v_cache, slots)
    with pytest.raises(ShapeError, match=r"qkv has torch.float16 but needs torch.float32, as the cache has"):
        rotary_cache_write(qkv.half(), table, k_cache, v_cache, slots)
    with pytest.raises(ShapeError, match=r"rotary_cache_write: cos has shape \(2, 8\) but needs shape \(3, 8\)"):
        rotary_cache_write(qkv, rotary.RotaryTable(table.cos[:2], table.sin), k_cache, v_cache, slots)
    with pytest.raises(ShapeError, match=r"slot_mapping has shape \(2,\) but needs shape \(3,\)"):
        rotary_cache_write(qkv, table, k_cache, v_cache, slots[:2])
    with pytest.raises(ShapeError, match=r"v_cache has shape \(3, 2, 5, 8\) but needs shape \(4, 2, 5, 8\)"):
        rotary_cache_write(qkv, table, k_cache, v_cache[:3], slots)
