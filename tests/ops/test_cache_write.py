"""cache_write: kernels equal the reference; what is not in a slot stays, and the order of tokens does not show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.caches import BLOCK_SIZES, HEAD_DIMS, empty_cache, fused_qkv, slot_mappings
from tests.ops.device_asserts import device_asserts
from tests.ops.kernels import Kernel, Mutant, kernels_of
from tests.strategies import DTYPES, SEEDS, normal
from vlmfx.errors import ShapeError
from vlmfx.ops.cache_write import LOOP, OP, cache_write, reference

MUTANTS = [
    Mutant("triton/cache_write.py", "(slot >= 0)[:, None]", "(slot > 0)[:, None]"),
    Mutant("triton/cache_write.py", "(cols < HEAD_DIM)", "(cols < HEAD_DIM - 1)"),
    Mutant("triton/cache_write.py", "head * V_HEAD_STRIDE", "head"),
    Mutant("triton/cache_write.py", "token * K_TOKEN_STRIDE", "token * (KV_HEADS * HEAD_DIM)"),
    Mutant("triton/cache_write.py", "slot % BLOCK_SIZE\n", "0 * slot\n"),
    Mutant("mlu/kernels/cache_write.mlu", "if (slot[first] < 0) continue;", ""),
    Mutant("mlu/kernels/cache_write.mlu", " && slot[first + run] % block_size)", ")"),
    Mutant("mlu/kernels/cache_write.mlu", "slot[first + run] == slot[first] + run && ", ""),
    Mutant("mlu/kernels/cache_write.mlu", "of_tile = slot + ((step - 2) % 3)", "of_tile = slot + (step % 3)"),
    Mutant("mlu/kernels/cache_write.mlu", "v_in + at + head * dim, size,", "v_in + at, size,"),
    Mutant("mlu/kernels/cache_write.mlu", "step < mine + 2; ++step", "step < mine + 1; ++step"),
    Mutant("mlu/kernels/cache_write.mlu", "    __sync();\n", ""),
]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, ...]:
    """No token, as many as the CPU's loop takes and one more, several tiles; slots in any order, k and v of a fused projection."""
    tokens = draw(st.one_of(st.integers(0, 5), st.sampled_from([LOOP, LOOP + 1, 33, 65])))
    kv_heads, head_dim, block_size, dtype = draw(st.integers(1, 3)), draw(HEAD_DIMS), draw(BLOCK_SIZES), draw(DTYPES)
    num_blocks = draw(st.integers(1, 6)) + tokens // block_size
    _, k, v = fused_qkv(draw(SEEDS), tokens, draw(st.integers(0, 3)), kv_heads, head_dim, dtype)
    caches = [empty_cache(num_blocks, kv_heads, block_size, head_dim, dtype) for _ in range(2)]
    return k, v, *caches, draw(slot_mappings(tokens, num_blocks * block_size))


def written(kernel: Any, case: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The two caches after the kernel."""
    k, v, k_cache, v_cache, slots = case
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    assert kernel(k, v, k_cache, v_cache, slots) is None
    return k_cache, v_cache


def check(kernel: Kernel, case: tuple[Any, ...]) -> None:
    """The kernel leaves the caches as the reference does."""
    with device_asserts():
        mine = written(kernel, case)
    for cache, right in zip(mine, written(reference, case), strict=True):
        torch.testing.assert_close(cache, right, atol=0, rtol=0, equal_nan=True)


def mlu_case() -> tuple[tuple[Any, ...], dict[str, int]]:
    """A prefill of 512 tokens of Qwen2-VL-7B into scattered blocks, and what the kernel's count by hand names."""
    k, v = (normal(seed, 512, 4, 128, dtype=torch.float16) for seed in (0, 1))
    caches = [empty_cache(40, 4, 16, 128, torch.float16) for _ in range(2)]
    blocks = torch.randperm(40, generator=torch.Generator().manual_seed(2))[:32].int()
    return (k, v, *caches, (blocks[:, None] * 16 + torch.arange(16, dtype=torch.int32)).flatten()), {}


@pytest.mark.parametrize("kernel", kernels_of(OP))
@given(case=cases())
def test_kernel_equals_reference(kernel, case):
    check(kernel, case)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=50)
@given(case=cases())
def test_each_row_is_in_its_slot_and_nothing_else_changed(kernel, case):
    k, v, k_cache, _, slots = case
    block_size = k_cache.shape[2]
    for rows, cache in zip((k, v), written(kernel, case), strict=True):
        by_slot = cache.transpose(1, 2).flatten(0, 1)
        live = slots >= 0
        assert torch.equal(by_slot[slots[live].long()], rows[live])
        others = torch.ones(len(cache) * block_size, dtype=torch.bool)
        others[slots[live].long()] = False
        assert by_slot[others].isnan().all()


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=30)
@given(case=cases(), seed=SEEDS)
def test_the_order_of_tokens_does_not_show(kernel, case, seed):
    k, v, k_cache, v_cache, slots = case
    order = torch.randperm(len(k), generator=torch.Generator().manual_seed(seed))
    shuffled = written(kernel, (k[order], v[order], k_cache, v_cache, slots[order]))
    for cache, right in zip(shuffled, written(kernel, case), strict=True):
        torch.testing.assert_close(cache, right, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@pytest.mark.parametrize("tokens", [1, LOOP + 1])
def test_a_slot_beyond_the_cache_is_an_error(kernel, tokens):
    if kernel.device != "cpu":
        pytest.skip("on a GPU only Triton's debug mode looks")
    k, caches = torch.ones(tokens, 2, 4), [torch.zeros(3, 2, 5, 4) for _ in range(2)]
    slots = torch.arange(tokens, dtype=torch.int32)
    slots[-1] = 15
    with pytest.raises(Exception, match=r"beyond the cache|out of bounds"), device_asserts():
        kernel(k, k, *caches, slots)


def test_wrong_inputs_are_named():
    k, cache, slots = torch.ones(3, 2, 8), torch.zeros(4, 2, 5, 8), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ShapeError, match=r"v has shape \(2, 2, 8\) but needs shape \(3, 2, 8\)"):
        cache_write(k, k[:2], cache, cache.clone(), slots)
    with pytest.raises(ShapeError, match=r"k has torch.float16 but needs torch.float32, as the cache has"):
        cache_write(k.half(), k, cache, cache.clone(), slots)
    with pytest.raises(
        ShapeError, match=r"v_cache has shape \(3, 2, 5, 8\) but needs shape \(4, 2, 5, 8\), as k_cache"
    ):
        cache_write(k, k, cache, cache[:3].clone(), slots)
    with pytest.raises(ShapeError, match=r"v_cache has torch.float16 but needs torch.float32"):
        cache_write(k, k, cache, cache.half(), slots)
    with pytest.raises(ShapeError, match=r"k_cache has strides .* but needs contiguous memory"):
        cache_write(k[:, :1], k[:, :1], cache[:, :1], cache[:, :1], slots)
    with pytest.raises(ShapeError, match=r"k_cache has shape \(4, 2, 5\) but needs shape \(num_blocks,"):
        cache_write(k, k, cache[..., 0], cache, slots)
    with pytest.raises(ShapeError, match=r"slot_mapping has torch.int64 but needs torch.int32"):
        cache_write(k, k, cache, cache.clone(), slots.long())
    with pytest.raises(ShapeError, match=r"slot_mapping has shape \(3, 1\) but needs shape \(3,\)"):
        cache_write(k, k, cache, cache.clone(), slots[:, None])
