"""cache_gather: kernels equal the reference, and give back what was written, wherever its blocks lie and whoever shares them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.caches import HEAD_DIMS, Layout, empty_cache, layouts
from tests.ops.device_asserts import device_asserts
from tests.ops.kernels import Kernel, Mutant, assert_equal, kernels_of
from tests.strategies import DTYPES, SEEDS, normal
from vlmfx.errors import ShapeError
from vlmfx.ops.cache_gather import OP, cache_gather, reference
from vlmfx.ops.cache_write import cache_write

MUTANTS = [
    Mutant("triton/cache_gather.py", "end <= token[:, None]", "end < token[:, None]"),
    Mutant("triton/cache_gather.py", "(sequence < num_seqs)", "(sequence <= num_seqs)"),
    Mutant("triton/cache_gather.py", "sequence += tl.sum", "sequence = tl.sum"),
    Mutant("triton/cache_gather.py", "+ position % BLOCK_SIZE", "+ token % BLOCK_SIZE"),
    Mutant("triton/cache_gather.py", "* max_blocks", "* (max_blocks - 1)"),
    Mutant("triton/cache_gather.py", "tl.load(v_cache + at", "tl.load(k_cache + at"),
    Mutant("mlu/kernels/cache_gather.mlu", "if (token < ends[", "if (token <= ends["),
    Mutant("mlu/kernels/cache_gather.mlu", "sequence + 2 > first_end + ENDS", "sequence + 1 > first_end + ENDS"),
    Mutant("mlu/kernels/cache_gather.mlu", "MIN(block_size - offset, end - token)", "block_size - offset"),
    Mutant(
        "mlu/kernels/cache_gather.mlu", "(int64_t)sequence * max_blocks + first_block", "(int64_t)sequence * max_blocks"
    ),
    Mutant("mlu/kernels/cache_gather.mlu", "        __bang_write_value(v_out + at, tile, (T)0);\n", ""),
    Mutant("mlu/kernels/cache_gather.mlu", "v_by_head + to, v_cache + from", "v_by_head + to, k_cache + from"),
    Mutant(
        "mlu/kernels/cache_gather.mlu", "k_by_head + at + head * pitch, size,", "k_by_head + at + head * dim, size,"
    ),
    Mutant("mlu/kernels/cache_gather.mlu", "    __sync();\n", ""),
]


@st.composite
def placed(draw: st.DrawFn) -> tuple[Layout, Tensor, Tensor, Tensor, Tensor]:
    """Sequences, their packed k and v, and two caches that hold these and nothing else."""
    layout, kv_heads, head_dim = draw(layouts()), draw(st.integers(1, 3)), draw(HEAD_DIMS)
    dtype, seed = draw(DTYPES), draw(SEEDS)
    k, v = (normal(seed + i, layout.num_live, kv_heads, head_dim, dtype=dtype) for i in range(2))
    k_cache, v_cache = (empty_cache(layout.num_blocks, kv_heads, layout.block_size, head_dim, dtype) for _ in range(2))
    cache_write(k, v, k_cache, v_cache, layout.slots())
    return layout, k, v, k_cache, v_cache


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, ...]:
    """As `layouts`, with rows after the last sequence."""
    layout, _, _, k_cache, v_cache = draw(placed())
    num_tokens = layout.num_live + draw(st.sampled_from([0, 0, 1, 7]))
    return k_cache, v_cache, layout.block_table, layout.cu_seqlens, num_tokens


def check(kernel: Kernel, case: tuple[Any, ...]) -> None:
    """The kernel gives what the reference gives."""
    with device_asserts():
        got = kernel(*case)
    assert_equal(OP, got, reference(*case))


def mlu_case() -> tuple[tuple[Any, ...], dict[str, int]]:
    """Four prompts of 250 cached tokens of Qwen2-VL-7B in scattered blocks, and what the kernel's count by hand names."""
    k_cache, v_cache = (normal(seed, 80, 4, 16, 128, dtype=torch.float16) for seed in (0, 1))
    table = torch.randperm(80, generator=torch.Generator().manual_seed(2))[:64].int().view(4, 16)
    return (k_cache, v_cache, table, torch.arange(5, dtype=torch.int32) * 250, 1000), {}


@pytest.mark.parametrize("kernel", kernels_of(OP))
@given(case=cases())
def test_kernel_equals_reference(kernel, case):
    check(kernel, case)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=60)
@given(placed=placed(), pad=st.integers(0, 5))
def test_what_was_written_comes_back(kernel, placed, pad):
    """And zeros after it, though all else in the cache is NaN."""
    layout, k, v, *caches = placed
    got = kernel(*caches, layout.block_table, layout.cu_seqlens, layout.num_live + pad)
    for mine, right in zip(got, (k, v), strict=True):
        assert torch.equal(mine[: len(right)], right)
        assert torch.equal(mine[len(right) :], torch.zeros_like(mine[len(right) :]))


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=30)
@given(placed=placed(), seed=SEEDS)
def test_where_blocks_lie_does_not_show(kernel, placed, seed):
    layout, k, v, *caches = placed
    to = torch.randperm(layout.num_blocks, generator=torch.Generator().manual_seed(seed))
    moved = [torch.empty_like(cache).index_copy_(0, to, cache) for cache in caches]
    is_block = (layout.block_table >= 0) & (layout.block_table < layout.num_blocks)
    table = torch.where(is_block, to[torch.where(is_block, layout.block_table, 0).long()].int(), -1)
    got = kernel(*moved, table, layout.cu_seqlens, layout.num_live)
    assert torch.equal(got[0], k)
    assert torch.equal(got[1], v)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=30)
@given(prefix=st.integers(0, 3), lengths=st.tuples(*[st.integers(0, 9)] * 2), block_size=st.integers(1, 4), seed=SEEDS)
def test_sequences_share_their_first_blocks(kernel, prefix, lengths, block_size, seed):
    """Two sequences begin with the same `prefix` blocks, which lie in the cache once."""
    shared, counts = prefix * block_size, [-(-n // block_size) for n in lengths]
    own = torch.arange(sum(counts), dtype=torch.int32).flip(0).split(counts)
    table = torch.full((2, prefix + max(counts)), -1, dtype=torch.int32)
    table[:, :prefix] = torch.arange(prefix, dtype=torch.int32) + sum(counts)
    for row, blocks in zip(table, own, strict=True):
        row[prefix : prefix + len(blocks)] = blocks
    ends = [0, shared + lengths[0], 2 * shared + sum(lengths)]
    layout = Layout(prefix + sum(counts) + 1, block_size, table, torch.tensor(ends, dtype=torch.int32))
    rows = normal(seed, layout.num_live, 2, 8)
    rows[ends[1] : ends[1] + shared] = rows[:shared]
    k_cache, v_cache = (empty_cache(layout.num_blocks, 2, block_size, 8, torch.float32) for _ in range(2))
    cache_write(rows, -rows, k_cache, v_cache, layout.slots())
    got = kernel(k_cache, v_cache, table, layout.cu_seqlens, layout.num_live)
    assert torch.equal(got[0], rows)
    assert torch.equal(got[1], -rows)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=30)
@given(placed=placed(), pad=st.integers(1, 3))
def test_more_sequences_and_blocks_in_the_bucket_do_not_show(kernel, placed, pad):
    """A bucket's spare sequences are empty and its table is wider."""
    layout, k, v, *caches = placed
    table = torch.nn.functional.pad(layout.block_table, (0, pad, 0, pad), value=-1)
    ends = torch.nn.functional.pad(layout.cu_seqlens, (0, pad), value=layout.num_live)
    got = kernel(*caches, table, ends, layout.num_live)
    assert torch.equal(got[0], k)
    assert torch.equal(got[1], v)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@pytest.mark.parametrize("block", [-1, 3])
def test_a_block_beyond_the_cache_is_an_error(kernel, block):
    if kernel.device != "cpu":
        pytest.skip("on a GPU only Triton's debug mode looks")
    caches = [torch.zeros(3, 2, 5, 4) for _ in range(2)]
    table, ends = torch.tensor([[1, block]], dtype=torch.int32), torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(Exception, match=r"beyond the cache|out of (range|bounds)"), device_asserts():
        kernel(*caches, table, ends, 6)


def test_wrong_inputs_are_named():
    cache, table = torch.zeros(4, 2, 5, 8), torch.zeros(3, 2, dtype=torch.int32)
    ends = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ShapeError, match=r"block_table has shape \(3,\) but needs shape \(num_seqs, max_blocks\)"):
        cache_gather(cache, cache, table[:, 0], ends, 3)
    with pytest.raises(ShapeError, match=r"cu_seqlens has shape \(3,\) but needs shape \(4,\), one more than"):
        cache_gather(cache, cache, table, ends[:3], 3)
    with pytest.raises(ShapeError, match=r"block_table has torch.int64 but needs torch.int32"):
        cache_gather(cache, cache, table.long(), ends, 3)
    with pytest.raises(ShapeError, match=r"cu_seqlens has torch.int64 but needs torch.int32"):
        cache_gather(cache, cache, table, ends.long(), 3)
    with pytest.raises(ShapeError, match=r"num_tokens has -1 but needs 0 or more"):
        cache_gather(cache, cache, table, ends, -1)
