"""prefill_attention: kernels equal the reference; chunks, the place of blocks, batch mates and padding never show."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.caches import vast_caches
from tests.ops.device_asserts import device_asserts
from tests.ops.kernels import IS_INTERPRETED, Kernel, Mutant, assert_equal, kernels_of
from tests.ops.packed_cases import HEAD_DIMS, assert_same, heads, int32, starts_of, tiny
from tests.ops.shared_mutants import SharedMutant
from tests.strategies import DTYPES, SEEDS, normal
from vlmfx.errors import ShapeError
from vlmfx.ops.prefill_attention import OP, prefill_attention, reference

FILE, SHARED, MLU = "triton/prefill_attention.py", "triton/flash.py", "mlu/kernels/prefill_attention.mlu"
MUTANTS = [
    Mutant(FILE, "seen = key[None, :] <= position[:, None]", "seen = key[None, :] < position[:, None] + 2"),
    Mutant(FILE, "tl.maximum(prefix + first - window + 1, 0)", "tl.maximum(prefix + first - window + 2, 0)"),
    Mutant(FILE, "tl.maximum(first - window + 1, 0)", "tl.maximum(first - window + 2, 0)"),
    Mutant(FILE, "kv_head, masked, prefix, prefix + position,", "kv_head, masked, prefix, position,"),
    Mutant(FILE, "masked = prefix // BLOCK_N * BLOCK_N", "masked = prefix // BLOCK_N"),
    Mutant(FILE, "key % BLOCK_SIZE", "keys % BLOCK_SIZE"),
    Mutant(FILE, "kv_head = head // (NUM_HEADS // NUM_KV_HEADS)", "kv_head = head % NUM_KV_HEADS"),
    Mutant(FILE, "tl.minimum(first + BLOCK_M, length), 0)", "tl.minimum(first + BLOCK_M, length), length)"),
    Mutant(FILE, "masked = tl.minimum(first, end)", "masked = tl.minimum(first + 1, end)"),
    SharedMutant(SHARED, "greatest = tl.maximum(top, tl.max(scores, 1) * scale)", "greatest = tl.max(scores, 1) * scale",
                 kernel="prefill_attention"),
    Mutant(MLU, "MAX(prefix + first - window + 1, 0)", "MAX(prefix + first - window + 2, 0)"),
    Mutant(MLU, "prefix_lens && is_sequence ? prefixes[i] : 0", "prefix_lens && is_sequence ? prefixes[0] : 0"),
    Mutant(MLU, "is_sequence ? first + num : 0, tile", "first + num, tile"),
    Mutant(MLU, "is_sequence ? first + num : 0, tile", "is_sequence ? first + 1 : 0, tile"),
    Mutant(MLU, "next_shift = at - first - (is_cached ? prefix : 0)", "next_shift = at - first"),
    Mutant(MLU, "next_shift = at - first - (is_cached ? prefix : 0)", "next_shift = at - (is_cached ? prefix : 0)"),
    Mutant(MLU, "attend(tile, from, till, shift, window, scale)", "attend(tile, from, till, shift, 0, scale)"),
    Mutant(MLU, "attend(tile, from, till, shift, window, scale)", "attend(tile, from, till, shift - 1, window, scale)"),
    Mutant(MLU, "num_cached = seen < prefix ? (prefix + KEYS - 1) / KEYS", "num_cached = seen < prefix ? prefix / KEYS"),
    Mutant(MLU, "head = kv_head * (heads / kv_heads) + part * group", "head = kv_head + part * group"),
    Mutant("mlu/kernels/attention.h", "MIN(cache.block_size - offset, end - at)", "MIN(cache.block_size, end - at)"),
    Mutant("mlu/kernels/attention.h", "block * cache.kv_heads + cache.kv_head)", "block * cache.kv_heads)"),
    Mutant("mlu/kernels/attention.h", "first[r] = MAX(shift + r, 0)", "first[r] = MAX(shift + r - 1, 0)"),
    Mutant("mlu/kernels/attention.h", "MIN(shift + r + window, t.num)", "MIN(shift + r + window - 1, t.num)"),
    Mutant("mlu/kernels/attention.h", "if (from[r] > 0) __bang_write_value(scores, from[r], NO_SCORE);", ""),
    Mutant("mlu/kernels/attention.h", "round % 2 ? taskDim - 1 - taskId : taskId", "round % 2 ? taskId + 1 : taskId"),
    Mutant("mlu/kernels/attention.h", "load_rows(rows + g * t.padded, q + g * t.dim,", "load_rows(rows + g * t.padded, q,"),
]  # fmt: skip
FEW = settings(max_examples=8)
EACH_KERNEL = pytest.mark.parametrize("kernel", kernels_of(OP))
# Around the tiles of 16 and 32 (float32) and of 32 and 64 (16 bits), and several of them; short ones too, so that a case is cheap.
LENGTHS = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 31, 33, 65]))
PREFIXES = st.sampled_from([0, 1, 5, 16, 33, 65, 130])
WINDOWS = st.sampled_from([0, 0, 1, 5, 33, 1000])


class Case(NamedTuple):
    """The arguments of the op, in order."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    k_cache: Tensor | None
    v_cache: Tensor | None
    block_table: Tensor | None
    prefix_lens: Tensor | None
    scale: float
    window: int


@st.composite
def prefixes(
    draw: st.DrawFn, lengths: list[int], window: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Caches, table and lengths of prefixes: blocks lie anywhere, some are shared, and what no token attends to holds NaN or,
    in the table, no block."""
    block_size, seed = draw(st.sampled_from([1, 3, 16, 40])), draw(SEEDS)
    counts = [-(-n // block_size) for n in lengths]
    num_blocks, width = sum(counts) + draw(st.integers(1, 3)), max(counts, default=0) + draw(st.integers(0, 2))
    table = torch.full((len(lengths), width + 1), draw(st.sampled_from([-1, num_blocks, 10**8])), dtype=torch.int32)
    free = iter(torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist())
    is_shared = draw(st.booleans())
    caches = [torch.full((num_blocks, kv_heads, block_size, head_dim), torch.nan, dtype=dtype) for _ in range(2)]
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        first = max(length - window + 1, 0) if window else 0
        for column in range(first // block_size, count):
            is_copy = is_shared and i > 0 and column < min(counts[0], counts[i]) // 2 and not window
            table[i, column] = table[0, column] if is_copy else next(free)
            slots = slice(max(first - column * block_size, 0), min(length - column * block_size, block_size))
            for at, cache in enumerate(caches):
                numbers = normal(seed + 2 * int(table[i, column]) + at, kv_heads, block_size, head_dim)
                cache[table[i, column], :, slots] = numbers[:, slots].to(dtype)
    return caches[0], caches[1], table[:, :-1], int32(lengths)


@st.composite
def cases(draw: st.DrawFn, has_prefix: bool | None = None) -> Case:
    """No sequences and empty ones, tiles missed by one, every group, prefixes and windows, padding, sharp and flat softmaxes."""
    lengths = draw(st.lists(LENGTHS, min_size=draw(st.sampled_from([1, 0, 2])), max_size=3))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (1, 3)]))
    head_dim, dtype, window = draw(HEAD_DIMS), draw(DTYPES), draw(WINDOWS)
    counts = [kv_heads * group, kv_heads, kv_heads]
    q, k, v = draw(heads(sum(lengths), draw(st.sampled_from([0, 0, 1, 40])), counts, head_dim, dtype))
    q = q * draw(st.sampled_from([0.0, 4.0])) if draw(st.booleans()) else q
    cached: tuple[Any, ...] = (None,) * 4
    if draw(st.booleans()) if has_prefix is None else has_prefix:
        cached = draw(prefixes([draw(PREFIXES) for _ in lengths], window, kv_heads, head_dim, dtype))
    scale = draw(st.sampled_from([head_dim**-0.5, 0.05]))
    return Case._make((q, k, v, starts_of(lengths), *cached, scale, window))


def check(kernel: Kernel, case: tuple[Any, ...]) -> None:
    """The kernel gives what the reference gives."""
    assert_equal(OP, kernel(*case), reference(*case))


MLU_BYTES = 1.5  # a core's memory holds 68 tokens of 7 heads, so keys are read again: 1.44, with arithmetic 37 times what copies take


def mlu_case() -> tuple[tuple[Any, ...], dict[str, int]]:
    """512 tokens of Qwen2-VL-7B, and what the kernel's count by hand names."""
    q, k, v = (normal(i, 512, heads, 128, dtype=torch.float16) for i, heads in enumerate((28, 4, 4)))
    case = Case(q, k, v, int32([0, 512]), None, None, None, None, 128**-0.5, 0)
    return case, {"pairs": 512 * 513 // 2, "heads": 28, "dim": 128}


@settings(max_examples=30)
@EACH_KERNEL
@given(case=cases())
def test_kernel_equals_reference(kernel, case):
    check(kernel, case)


def mates(case: Case) -> list[slice]:
    """The rows of each sequence."""
    return [slice(a, b) for a, b in pairwise(case.cu_seqlens.tolist())]


@FEW
@EACH_KERNEL
@given(case=cases())
def test_batch_mates_never_show(kernel, case):
    together = kernel(*case)
    for i, rows in enumerate(mates(case)):
        alone = case._replace(
            q=case.q[rows], k=case.k[rows], v=case.v[rows], cu_seqlens=int32([0, rows.stop - rows.start])
        )
        if case.k_cache is not None:
            alone = alone._replace(block_table=case.block_table[i : i + 1], prefix_lens=case.prefix_lens[i : i + 1])
        if rows.start < rows.stop:
            assert_same(OP, kernel, kernel(*alone), together[rows])


@FEW
@EACH_KERNEL
@given(case=cases(), pad=st.sampled_from([1, 40]), empty=st.integers(0, 2))
def test_padding_and_empty_sequences_are_zero_and_never_show(kernel, case, pad, empty):
    q, k, v = (torch.cat((t, t.new_full((pad, *t.shape[1:]), torch.nan))) for t in case[:3])
    starts = torch.cat((case.cu_seqlens, case.cu_seqlens[-1:].expand(empty)))
    padded = case._replace(q=q, k=k, v=v, cu_seqlens=starts)
    if case.block_table is not None:
        table = torch.cat((case.block_table, case.block_table.new_full((empty, case.block_table.shape[1]), -1)))
        padded = padded._replace(block_table=table, prefix_lens=torch.cat((case.prefix_lens, int32([0] * empty))))
    out = kernel(*padded)
    assert (out[case.cu_seqlens[-1] :] == 0).all()
    assert_same(OP, kernel, out[: len(case.q)], kernel(*case))


def in_cache(k: Tensor, v: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Caches that hold k and v from the second block on, blocks last first, NaN beside; and the table."""
    num_blocks = -(-len(k) // block_size)
    caches = []
    for tensor in (k, v):
        cache = tensor.new_full((num_blocks + 1, tensor.shape[1], block_size, tensor.shape[2]), torch.nan)
        for i, rows in enumerate(tensor.split(block_size)):
            cache[num_blocks - i, :, : len(rows)] = rows.transpose(0, 1)
        caches.append(cache)
    return caches[0], caches[1], torch.arange(num_blocks, 0, -1, dtype=torch.int32)[None]


@FEW
@EACH_KERNEL
@given(
    length=st.sampled_from([2, 17, 40, 70]), cut=st.floats(0, 1), window=WINDOWS, dtype=DTYPES, seed=SEEDS,
    block_size=st.sampled_from([1, 16]),
)  # fmt: skip
def test_the_cut_into_chunks_never_shows(kernel, length, cut, window, dtype, seed, block_size):
    q = normal(seed, length, 4, 24, dtype=dtype)
    k, v = (normal(seed + i, length, 2, 24, dtype=dtype) for i in (1, 2))
    whole = kernel(q, k, v, int32([0, length]), None, None, None, None, 0.2, window)
    at = round(cut * (length - 1))
    cached = in_cache(k[:at], v[:at], block_size)
    chunk = kernel(q[at:], k[at:], v[at:], int32([0, length - at]), *cached, int32([at]), 0.2, window)
    assert_equal(OP, chunk, whole[at:])


@FEW
@EACH_KERNEL
@given(case=cases(has_prefix=True), seed=SEEDS)
def test_the_place_of_blocks_never_shows(kernel, case, seed):
    num_blocks = len(case.k_cache)
    to = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).int()
    is_block = (case.block_table >= 0) & (case.block_table < num_blocks)
    table = torch.where(is_block, to[case.block_table.clamp(0, num_blocks - 1).long()], case.block_table)
    k_cache, v_cache = (cache[to.argsort()] for cache in (case.k_cache, case.v_cache))
    moved = case._replace(k_cache=k_cache, v_cache=v_cache, block_table=table)
    assert_same(OP, kernel, kernel(*moved), kernel(*case))


@FEW
@EACH_KERNEL
@given(case=cases(), seed=SEEDS)
def test_later_tokens_never_show(kernel, case, seed):
    rows = max(mates(case), key=lambda r: r.stop - r.start, default=slice(0, 0))
    middle = (rows.start + rows.stop) // 2
    k, v = case.k.clone(), case.v.clone()
    for i, tensor in enumerate((k, v)):
        tensor[middle : rows.stop] = normal(seed + i, rows.stop - middle, *tensor.shape[1:])
    out, expected = kernel(*case._replace(k=k, v=v)), kernel(*case)
    assert_same(OP, kernel, out[:middle], expected[:middle])
    assert_same(OP, kernel, out[rows.stop :], expected[rows.stop :])


@FEW
@EACH_KERNEL
@given(case=cases())
def test_a_wide_window_is_none(kernel, case):
    case = case._replace(window=0)
    if case.k_cache is not None:
        case = case._replace(k_cache=case.k_cache.nan_to_num(1.0), v_cache=case.v_cache.nan_to_num(1.0))
        case = case._replace(block_table=case.block_table.clamp(0, len(case.k_cache) - 1))
    assert_equal(OP, kernel(*case._replace(window=1000)), kernel(*case))


@FEW
@EACH_KERNEL
@given(case=cases())
def test_heads_of_a_group_read_one_kv_head(kernel, case):
    group = case.q.shape[1] // case.k.shape[1]
    alike = case._replace(k=case.k.repeat_interleave(group, 1), v=case.v.repeat_interleave(group, 1))
    if case.k_cache is not None:
        k_cache, v_cache = (cache.repeat_interleave(group, 1) for cache in (case.k_cache, case.v_cache))
        alike = alike._replace(k_cache=k_cache, v_cache=v_cache)
    assert_same(OP, kernel, kernel(*alike), kernel(*case))


@FEW
@EACH_KERNEL
@given(case=cases(), seed=SEEDS)
def test_what_is_added_to_every_key_never_shows(kernel, case, seed):
    case = case._replace(**{n: getattr(case, n).float() for n in ("q", "k", "v")})
    shift = normal(seed, *case.k.shape[1:]) / 4
    moved = case._replace(k=case.k + shift)
    if case.k_cache is not None:
        case = case._replace(k_cache=case.k_cache.float(), v_cache=case.v_cache.float())
        moved = moved._replace(k_cache=case.k_cache + shift[:, None], v_cache=case.v_cache)
    torch.testing.assert_close(kernel(*moved), kernel(*case), rtol=1e-4, atol=1e-4)


@FEW
@EACH_KERNEL
@given(case=cases(has_prefix=False), seed=SEEDS)
def test_weights_sum_to_one(kernel, case, seed):
    value = normal(seed, *case.v.shape[1:], dtype=case.v.dtype)
    out = kernel(*case._replace(v=value.expand(case.v.shape)))
    expected = value.repeat_interleave(case.q.shape[1] // len(value), 0)
    live = out[: case.cu_seqlens[-1]]
    assert_equal(OP, live, expected.expand(live.shape))


@FEW
@EACH_KERNEL
@given(case=cases(), seed=SEEDS)
def test_huge_scores(kernel, case, seed):
    """Whole numbers, so that scores are exact: the best keys share the weight, and no other has any."""
    q, k = ((normal(seed + i, *t.shape) * 2).round().to(t.dtype) for i, t in enumerate(case[:2]))
    huge = case._replace(q=q * 512, k=k, scale=1.0)
    if case.k_cache is not None:
        huge = huge._replace(k_cache=(case.k_cache * 2).round())
    out = kernel(*huge)
    assert out.isfinite().all()
    assert_equal(OP, out, reference(*huge))


@FEW
@EACH_KERNEL
@given(case=cases())
def test_tiny_values(kernel, case):
    """Scores are next to 0, and the mean of what is tiny is exact by its own size."""
    scale = tiny(case.q.dtype)
    case = case._replace(
        **{n: x * scale for n in ("q", "k", "v", "k_cache", "v_cache") if (x := getattr(case, n)) is not None}
    )
    assert_equal(OP, kernel(*case) / scale, reference(*case) / scale)


@EACH_KERNEL
@pytest.mark.parametrize("window", [0, 5])
def test_blocks_beyond_2_to_31_elements_are_found(kernel, window):
    k_cache, v_cache = vast_caches(block_size=16, head_dim=128)
    q, k, v = (normal(i, 2, heads, 128, dtype=k_cache.dtype) for i, heads in enumerate((2, 1, 1)))
    cached = k_cache, v_cache, int32([[len(k_cache) - 1]]), int32([13])
    check(kernel, (q, k, v, int32([0, 2]), *cached, 0.1, window))


@EACH_KERNEL
@pytest.mark.parametrize("block", [-1, 4, 10**8])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.skipif(not IS_INTERPRETED, reason="an assertion that fails on a GPU ends the process")
def test_a_block_beyond_the_cache_is_an_error(kernel, block, window):
    q, cache, table = torch.ones(1, 2, 16), torch.ones(4, 2, 16, 16), int32([[3, block]])
    with device_asserts():
        kernel(q, q, q, int32([0, 1]), cache, cache, table, int32([16]), 1.0, window)
    with pytest.raises((AssertionError, IndexError, ValueError)), device_asserts():
        kernel(q, q, q, int32([0, 1]), cache, cache, table, int32([17]), 1.0, window)


@EACH_KERNEL
@pytest.mark.skipif(not IS_INTERPRETED, reason="an assertion that fails on a GPU ends the process")
def test_a_prefix_longer_than_its_blocks_is_an_error(kernel):
    q, cache = torch.ones(1, 2, 16), torch.ones(4, 2, 16, 16)
    with pytest.raises((AssertionError, IndexError, RuntimeError, ValueError)), device_asserts():
        kernel(q, q, q, int32([0, 1]), cache, cache, int32([[3, 2]]), int32([33]), 1.0, 0)


def test_wrong_inputs_are_named():
    q, k, starts, cache = torch.ones(4, 4, 8), torch.ones(4, 2, 8), int32([0, 3]), torch.ones(3, 2, 16, 8)
    arguments = {"q": q, "k": k, "v": k, "cu_seqlens": starts, "k_cache": cache, "v_cache": cache,
                 "block_table": int32([[0]]), "prefix_lens": int32([2]), "scale": 1.0}  # fmt: skip
    assert prefill_attention(**arguments).shape == q.shape  # type: ignore[arg-type]
    for wrong, message in (
        ({"q": torch.ones(4, 32)}, r"q has shape \(4, 32\) but needs shape \(tokens, heads, D\)"),
        ({"q": torch.ones(4, 3, 8)}, r"k has shape \(4, 2, 8\) but needs shape \(tokens, a divisor of 3, 8\)"),
        ({"k": k[:3], "v": k[:3]}, r"k has shape \(3, 2, 8\) but needs shape \(4, 2, 8\), as many tokens as q"),
        ({"v": k[:3]}, r"v has shape \(3, 2, 8\) but needs shape \(4, 2, 8\)"),
        ({"k": k.half()}, r"k has torch.float16 but needs torch.float32"),
        ({"cu_seqlens": starts.long()}, r"cu_seqlens has torch.int64 but needs torch.int32"),
        ({"k_cache": None}, r"v_cache has no k_cache beside it but needs all of k_cache, v_cache, block_table"),
        ({"v_cache": None, "prefix_lens": None}, r"k_cache has no v_cache, prefix_lens beside it but needs all"),
        ({"v_cache": cache[:2]}, r"v_cache has shape \(2, 2, 16, 8\) but needs shape \(3, 2, 16, 8\)"),
        ({"k_cache": cache.half(), "v_cache": cache.half()}, r"k_cache has torch.float16 but needs torch.float32"),
        ({"k_cache": cache[:, :1].contiguous(), "v_cache": cache[:, :1].contiguous()}, r"k_cache has shape \(3, 1, 16, 8\)"),
        ({"k_cache": cache.mT.contiguous().mT}, r"k_cache has strides .* contiguous memory"),
        ({"block_table": int32([[0], [1]])}, r"block_table has shape \(2, 1\) but needs shape \(1, max_blocks\)"),
        ({"block_table": torch.zeros(1, 1)}, r"block_table has torch.float32 but needs torch.int32"),
        ({"prefix_lens": int32([1, 2])}, r"prefix_lens has shape \(2,\) but needs shape \(1,\)"),
        ({"prefix_lens": torch.zeros(1)}, r"prefix_lens has torch.float32 but needs torch.int32"),
        ({"scale": -1.0}, r"scale has -1.0 but needs a positive number"),
        ({"window": -1}, r"window has -1 but needs 0 for none, or more"),
    ):  # fmt: skip
        with pytest.raises(ShapeError, match=message):
            prefill_attention(**{**arguments, **wrong})  # type: ignore[arg-type]
