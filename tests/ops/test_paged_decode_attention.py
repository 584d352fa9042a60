"""paged_decode_attention: kernels equal the reference; how contexts are cut, where blocks lie and who else is in the batch never show."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.caches import vast_caches
from tests.ops.device_asserts import device_asserts
from tests.ops.kernels import IS_INTERPRETED, Kernel, Mutant, assert_equal, kernels_of
from tests.ops.packed_cases import tiny
from tests.ops.shared_mutants import SharedMutant
from tests.strategies import DTYPES, SEEDS, normal, strided
from vlmfx.errors import ShapeError
from vlmfx.ops.paged_decode_attention import OP, decode_work, num_items_for, paged_decode_attention, reference

FILE, SHARED = "triton/paged_decode_attention.py", "triton/flash.py"
MLU = "mlu/kernels/paged_decode_attention.mlu"
MUTANTS = [
    Mutant(FILE, "known = key < end", "known = key <= end"),
    Mutant(FILE, "+ key % BLOCK_SIZE", "+ keys % BLOCK_SIZE"),
    Mutant(FILE, "(key + TILE) // BLOCK_SIZE", "key // BLOCK_SIZE"),
    Mutant(FILE, "context_lens + sequence) - window", "context_lens + sequence) - window + 1"),
    Mutant(FILE, "head = kv_head * GROUP + rows", "head = kv_head + rows"),
    Mutant(FILE, "if end - begin == 1:", "if end - begin <= 1:"),
    Mutant(FILE, "totals = totals * fade + weights", "totals = totals + weights"),
    Mutant(FILE, "state[3] + tl.log2(tl.where(state[2] == 0.0, 1.0, state[2]))", "state[3]"),
    Mutant(FILE, "sums = sums * fade + weights", "sums = sums + weights"),
    Mutant(FILE, "inside = (item < end)[:, None]", "inside = (item <= end)[:, None]"),
    Mutant(FILE, "tl.load(lse + row, mask=item < end", "tl.load(lse + row, mask=item <= end"),
    SharedMutant(SHARED, "total = total * fade", "total = total", kernel="paged_decode_attention"),
    SharedMutant(SHARED, "low * fade[:, None]", "low", kernel="paged_decode_attention"),
    SharedMutant(SHARED, "high * fade[:, None]", "high", kernel="paged_decode_attention"),
    SharedMutant(SHARED, "scores = dot(q[1], tl.trans(k[1]), scores)", "pass", kernel="paged_decode_attention"),
    SharedMutant(
        SHARED, "mask=known & (rest < HEAD_DIM)", "mask=known & (rest < HEAD_DIM - 1)", kernel="paged_decode_attention"
    ),
    SharedMutant(SHARED, "tl.where(total == 0.0, 1.0, total)", "total", kernel="paged_decode_attention"),
    Mutant(MLU, "begin = MAX(begin, numbers[0] - window)", "begin = MAX(begin, numbers[0] - window + 1)"),
    Mutant(MLU, "is_only = numbers[1] - numbers[0] == 1", "is_only = numbers[1] - numbers[0] <= 2"),
    Mutant(MLU, "if (end - begin == 1) continue;", "if (end - begin <= 1) continue;"),
    Mutant(MLU, "      if (sequence < 0) continue;", ""),
    Mutant(MLU, "      __bang_mul(total, total, fade, num * FLOATS);", ""),
    Mutant(MLU, "if (fade[g * FLOATS] != 1.f)", "if (fade[g * FLOATS] > 1.f)"),
    Mutant(
        MLU, "__bang_ge_scalar(mask, iota, (float)count, width)", "__bang_gt_scalar(mask, iota, (float)count, width)"
    ),
    Mutant(MLU, "__bang_mul_scalar(sums, sums, fade[0], padded)", "__bang_mul_scalar(sums, sums, 1.f, padded)"),
    Mutant(MLU, "__bang_mul(weight, weight, top, FLOATS)", "__bang_mul_scalar(weight, weight, 1.f, FLOATS)"),
    Mutant(MLU, "begin + at, begin + at + count", "at, at + count"),
    Mutant(MLU, "by = queries[g * padded + d]", "by = queries[d]"),
    Mutant("mlu/kernels/attention.h", "cache.table ? cache.piece[column - cache.first]", "false ? 0"),
    Mutant("mlu/kernels/attention.h", "offset) * cache.dim;", "0) * cache.dim;"),
]
FEW = settings(max_examples=10)
EACH_KERNEL = pytest.mark.parametrize("kernel", kernels_of(OP))
# Around the tiles of 32 (float32), 64 and 128 keys, and several of them; short ones too, so that batches are cheap.
LENGTHS = st.one_of(st.integers(0, 9), st.sampled_from([31, 32, 33, 63, 64, 65, 129]))

LONG = st.sampled_from([[150, 70], [300, 70]])  # several tiles of 64 keys, and of what MLU370 takes of wide heads
MANY = 24  # items of one sequence, more than the kernels add up in a step


class Case(NamedTuple):
    """The arguments of the op, in order."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor | None
    context_lens: Tensor
    items: Tensor | None
    item_offsets: Tensor | None
    scale: float
    window: int


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def paged(draw: st.DrawFn, lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Caches and a table: blocks lie anywhere, some are shared, slots that no context reaches hold NaN, and so do blocks of nobody."""
    block_size, seed = draw(st.sampled_from([1, 3, 16, 16, 64])), draw(SEEDS)
    counts = [-(-n // block_size) for n in lengths]
    spare, wide = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    order = (
        draw(st.permutations(range(sum(counts) + spare))) if sum(counts) < 40 else [*range(spare, sum(counts) + spare)]
    )
    # Entries beyond a sequence's blocks may be anything.
    table = torch.full((len(lengths), max(counts, default=0) + wide + 1), draw(st.sampled_from([-1, 10**8, -(10**8)])))
    free, longest = iter(order), max(range(len(lengths)), key=lengths.__getitem__, default=0)
    for i, count in enumerate(counts):
        table[i, :count] = torch.tensor([next(free) for _ in range(count)], dtype=torch.int64)
    if draw(st.booleans()):
        for i, count in enumerate(counts):
            table[i, : count // 2] = table[longest, : count // 2]
    caches = []
    for at in (1, 2):
        cache = torch.full((sum(counts) + spare, kv_heads, block_size, head_dim), torch.nan).to(dtype)
        for i, n in enumerate(lengths):
            for p in range(0, n, block_size):
                end = min(block_size, n - p)
                block = int(table[i, p // block_size])
                cache[block, :, :end] = normal(seed + at + 2 * block, kv_heads, block_size, head_dim)[:, :end].to(dtype)
        caches.append(cache)
    return caches[0], caches[1], table.int()[:, :-1]


@st.composite
def unpaged(draw: st.DrawFn, lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Caches in which sequence i owns block i; the rest is NaN or, as the CPU kernel can do with more at once, zero."""
    shape = (
        len(lengths) + draw(st.integers(0, 2)),
        kv_heads,
        max(lengths, default=0) + draw(st.integers(0, 3)),
        head_dim,
    )
    seed, hole = draw(SEEDS), draw(st.sampled_from([0.0, torch.nan]))
    caches = [normal(seed + at, *shape, dtype=dtype) for at in (1, 2)]
    for cache in caches:
        cache[len(lengths) :] = torch.nan
        for i, n in enumerate(lengths):
            cache[i, :, n:] = hole
    return caches[0], caches[1], None


@st.composite
def cuts(draw: st.DrawFn, lengths: list[int], window: int) -> tuple[Tensor | None, Tensor | None]:
    """None, the work of `decode_work`, or any other: pieces of any length, empty ones too, from before the window on."""
    kind = draw(st.sampled_from(["none", "decode_work", "any", "any", "any"]))
    if kind == "none":
        return None, None
    if kind == "decode_work":
        num_items, tile = len(lengths) + draw(st.integers(0, 4)), draw(st.sampled_from([1, 8, 32, 64]))
        return decode_work(lengths, num_items, tile=tile, window=window)
    rows, offsets = [], [0]
    for i, n in enumerate(lengths):
        first = draw(st.integers(0, max(n - window, 0))) if window else 0
        inner = draw(st.lists(st.integers(first, n), max_size=3)) if n else []
        ends = [*sorted(inner), n] if n or draw(st.booleans()) else []
        for end in ends:
            rows.append([i, first, end])
            first = end
        offsets.append(len(rows))
    rows += [[-1, -1, -1]] * draw(st.integers(0, 2))
    return int32(rows).view(-1, 3), int32(offsets)


@st.composite
def cases(draw: st.DrawFn, only_paged: bool = False, kind: str = "") -> Case:
    """No sequences and empty ones, tiles missed by one, every group, widths that are no power of two, sharp and flat softmaxes.

    kind "long": several tiles an item, and heads of two parts; "many items": more than are added up in a step."""
    is_long, has_many_items = kind == "long", kind == "many items" or (not kind and draw(st.integers(0, 7)) == 0)
    many = st.sampled_from([[2 * MANY], [0, 2 * MANY]])
    lengths = draw(LONG) if is_long else draw(many if has_many_items else st.lists(LENGTHS, max_size=3))
    if lengths and not has_many_items and draw(st.integers(0, 3)) == 0:
        lengths = [lengths[0]] * len(lengths)
    groups = [(1, 1), (1, 2)] if has_many_items else [(1, 1), (1, 2), (1, 7), (2, 1), (2, 2), (2, 3), (1, 16), (1, 20)]
    kv_heads, group = draw(st.sampled_from(groups))
    head_dim, dtype = draw(st.sampled_from([24, 80, 256] if is_long else [8, 16, 24, 64, 80, 96, 128])), draw(DTYPES)
    heads, seed = kv_heads * group, draw(SEEDS)
    before, after = draw(st.sampled_from([(0, 0), (0, 2), (1, 1)]))
    qkv = normal(seed, len(lengths), before + heads + after, head_dim) * draw(st.sampled_from([0.0, 1.0, 4.0]))
    q = draw(strided(qkv, dtype))[:, before : before + heads]
    caches: Any = paged if only_paged or draw(st.booleans()) else unpaged
    k_cache, v_cache, table = draw(caches(lengths, kv_heads, head_dim, dtype))
    window = draw(st.sampled_from([0, 0, 1, 5, 33, 200]))
    work = decode_work(lengths, MANY, tile=1, window=window) if has_many_items else draw(cuts(lengths, window))
    scale = draw(st.sampled_from([head_dim**-0.5, 0.02]))
    return Case(q, k_cache, v_cache, table, int32(lengths), *work, scale, window)


def telling_cases() -> st.SearchStrategy[Case]:
    """Most cases have a tile or two and few items: what goes on from one to the next shows where there are more."""
    return st.sampled_from(["long", "many items", ""]).flatmap(lambda kind: cases(kind=kind))


def check(kernel: Kernel, case: tuple[Any, ...]) -> None:
    """The kernel gives what the reference gives."""
    assert_equal(OP, kernel(*case), reference(*case))


def mlu_case() -> tuple[tuple[Any, ...], dict[str, int]]:
    """Two sequences of Qwen2-VL-7B with 1,024 tokens each, cut into eight items, and what the kernel's count by hand names."""
    k_cache, v_cache = (normal(i, 130, 4, 16, 128, dtype=torch.float16) for i in (1, 2))
    q, table = normal(0, 2, 28, 128, dtype=torch.float16), torch.randperm(128).int().view(2, 64)
    case = Case(q, k_cache, v_cache, table, int32([1024] * 2), *decode_work([1024] * 2, 8, tile=64), 128**-0.5, 0)
    return case, {"positions": 2048, "heads": 28, "kv_heads": 4, "dim": 128}


@settings(max_examples=30)
@EACH_KERNEL
@given(case=cases())
def test_kernel_equals_reference(kernel, case):
    check(kernel, case)


@FEW
@EACH_KERNEL
@given(case=cases(kind="long"))
def test_several_tiles(kernel, case):
    check(kernel, case)


def assert_same(kernel: Kernel, got: Tensor, expected: Tensor) -> None:
    """To the bit, but for the CPU kernel, which adds up in another order where it takes several sequences at once."""
    if kernel.name == "cpu":
        assert_equal(OP, got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def alone(case: Case, i: int) -> Case:
    """Sequence i of the batch, cut as it is there."""
    own = slice(i, i + 1)
    items = offsets = None
    if case.items is not None and case.item_offsets is not None:
        items = case.items[case.item_offsets[i] : case.item_offsets[i + 1]].clone()
        items[:, 0] = 0
        offsets = int32([0, len(items)])
    k_cache, v_cache, table = case.k_cache, case.v_cache, case.block_table
    if table is None:
        k_cache, v_cache = k_cache[own], v_cache[own]
    else:
        table = table[own]
    return case._replace(
        q=case.q[own], k_cache=k_cache, v_cache=v_cache, block_table=table, context_lens=case.context_lens[own],
        items=items, item_offsets=offsets,
    )  # fmt: skip


@FEW
@EACH_KERNEL
@given(data=st.data())
def test_the_cut_changes_no_more_than_rounding(kernel, data):
    case = data.draw(cases())
    items, offsets = data.draw(cuts(case.context_lens.tolist(), case.window))
    assert_equal(OP, kernel(*case._replace(items=items, item_offsets=offsets)), kernel(*case))


@FEW
@EACH_KERNEL
@given(case=cases())
def test_batch_mates_never_show(kernel, case):
    together = kernel(*case)
    for i in range(len(case.q)):
        assert_same(kernel, kernel(*alone(case, i)), together[i : i + 1])


@FEW
@EACH_KERNEL
@given(case=cases(), pad=st.integers(1, 3))
def test_padding_is_zero_and_never_shows(kernel, case, pad):
    def longer(x: Tensor, fill: float) -> Tensor:
        return torch.cat((x, x.new_full((pad, *x.shape[1:]), fill)))

    k_cache, v_cache, table, items, offsets = case[1:4] + case[5:7]
    if table is None:
        k_cache, v_cache = (longer(cache, torch.nan) for cache in (k_cache, v_cache))
    else:
        table = longer(table, 10**8)
    if items is not None and offsets is not None:
        items, offsets = longer(items, -1), torch.cat((offsets, offsets[-1:].expand(pad)))
    padded = Case(
        longer(case.q, torch.nan), k_cache, v_cache, table, longer(case.context_lens, 0), items, offsets, *case[7:]
    )
    out = kernel(*padded)
    assert (out[len(case.q) :] == 0).all()
    assert_same(kernel, out[: len(case.q)], kernel(*case))


@FEW
@EACH_KERNEL
@given(case=cases(only_paged=True), seed=SEEDS)
def test_the_place_of_blocks_never_shows(kernel, case, seed):
    num_blocks = len(case.k_cache)
    to = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
    is_block = (case.block_table >= 0) & (case.block_table < num_blocks)
    table = torch.where(is_block, to[case.block_table.clamp(0, num_blocks - 1).long()].int(), case.block_table)
    k_cache, v_cache = (cache[to.argsort()] for cache in (case.k_cache, case.v_cache))
    moved = case._replace(k_cache=k_cache, v_cache=v_cache, block_table=table)
    assert_same(kernel, kernel(*moved), kernel(*case))


@FEW
@EACH_KERNEL
@given(
    length=st.sampled_from([1, 33, 70, 130]), window=st.integers(1, 140), tile=st.sampled_from([1, 16, 64]), seed=SEEDS
)
def test_a_window_is_a_shorter_context(kernel, length, window, tile, seed):
    q, k_cache, v_cache = normal(seed, 1, 4, 16), normal(seed + 1, 1, 2, length, 16), normal(seed + 2, 1, 2, length, 16)
    first = max(length - window, 0)
    k, v = (cache[:, :, first:].contiguous() for cache in (k_cache, v_cache))
    cut = kernel(q, k, v, None, int32([length - first]), None, None, 0.25, 0)
    k_cache[:, :, :first] = torch.nan
    v_cache[:, :, :first] = torch.nan
    whole = decode_work([length], 3, tile=tile)
    for work in ((None, None), whole, decode_work([length], 3, tile=tile, window=window)):
        out = kernel(q, k_cache, v_cache, None, int32([length]), *work, 0.25, window)
        assert_equal(OP, out, cut)


@FEW
@EACH_KERNEL
@given(case=cases(), seed=SEEDS)
def test_what_is_added_to_every_key_never_shows(kernel, case, seed):
    shift = normal(seed, case.k_cache.shape[1], 1, case.k_cache.shape[3]) / 4
    case = case._replace(
        q=case.q.float(), k_cache=case.k_cache.float(), v_cache=case.v_cache.float(), scale=min(case.scale, 0.1)
    )
    out = kernel(*case._replace(k_cache=case.k_cache + shift))
    torch.testing.assert_close(out, kernel(*case), rtol=1e-4, atol=1e-4)


@FEW
@EACH_KERNEL
@given(data=st.data(), seed=SEEDS)
def test_huge_scores(kernel, data, seed):
    """Whole numbers, so that scores are exact: the best keys share the weight, and no other has any."""
    case = data.draw(cases())
    q, k_cache = ((normal(seed + i, *x.shape) * 2).round().to(x.dtype) for i, x in enumerate((case.q, case.k_cache)))
    case = case._replace(q=q * 512, k_cache=k_cache, scale=1.0)
    out = kernel(*case)
    assert out.isfinite().all()
    assert_equal(OP, out, reference(*case))


@FEW
@EACH_KERNEL
@given(case=cases())
def test_tiny_values(kernel, case):
    """Scores are next to 0, and the mean of what is tiny is exact by its own size."""
    scale = tiny(case.q.dtype)
    case = case._replace(**{n: getattr(case, n) * scale for n in ("q", "k_cache", "v_cache")})
    assert_equal(OP, kernel(*case) / scale, reference(*case) / scale)


@EACH_KERNEL
def test_blocks_beyond_2_to_31_elements_are_found(kernel):
    k_cache, v_cache = vast_caches(block_size=16, head_dim=128)
    q, table = normal(1, 1, 2, 128, dtype=k_cache.dtype), int32([[len(k_cache) - 1]])
    check(kernel, (q, k_cache, v_cache, table, int32([13]), None, None, 0.1, 0))


@EACH_KERNEL
def test_positions_beyond_2_to_31_elements_are_found(kernel):
    """In a cache of one block, of which a window reads the end."""
    k_cache, v_cache = (cache.view(1, 1, -1, 128) for cache in vast_caches(block_size=16, head_dim=128))
    q, length = normal(1, 1, 2, 128, dtype=k_cache.dtype), k_cache.shape[2] - 3
    check(kernel, (q, k_cache, v_cache, None, int32([length]), None, None, 0.1, 13))


@EACH_KERNEL
@pytest.mark.parametrize("block", [-1, 4, 10**8])
@pytest.mark.skipif(not IS_INTERPRETED, reason="an assertion that fails on a GPU ends the process")
def test_a_block_beyond_the_cache_is_an_error(kernel, block):
    q, cache = torch.ones(1, 2, 16), torch.ones(4, 1, 16, 16)
    table = int32([[3, block]])
    with device_asserts():
        kernel(q, cache, cache, table, int32([16]), None, None, 1.0, 0)
    with pytest.raises((AssertionError, IndexError, ValueError)), device_asserts():
        kernel(q, cache, cache, table, int32([17]), None, None, 1.0, 0)


@EACH_KERNEL
@pytest.mark.parametrize("table", [None, int32([[3, 2]])])
@pytest.mark.skipif(not IS_INTERPRETED, reason="an assertion that fails on a GPU ends the process")
def test_a_context_longer_than_its_slots_is_an_error(kernel, table):
    if table is None and kernel.name == "mlu-emulated":
        pytest.skip("no card says that a sequence reads the block after its own")
    q, cache = torch.ones(1, 2, 16), torch.ones(4, 1, 16, 16)
    with pytest.raises((AssertionError, ShapeError, ValueError)), device_asserts():
        kernel(q, cache, cache, table, int32([33]), None, None, 1.0, 0)


@given(
    lengths=st.lists(st.one_of(st.integers(0, 40), st.integers(0, 40_000)), max_size=40),
    spare=st.integers(0, 100),
    tile=st.sampled_from([1, 16, 64]),
    window=st.sampled_from([0, 0, 1, 100, 4096]),
)
def test_work_covers_each_position_once_and_is_balanced(lengths, spare, tile, window):
    num_items = len(lengths) + spare
    items, offsets = decode_work(lengths, num_items, tile=tile, window=window)
    assert items.shape == (num_items, 3)
    assert items.dtype == offsets.dtype == torch.int32
    assert (items[offsets[-1] :] == -1).all()
    tiles = []
    for i, length in enumerate(lengths):
        at = max(length - window, 0) if window else 0
        own = items[offsets[i] : offsets[i + 1]].tolist()
        for sequence, first, end in own:
            assert (sequence, first) == (i, at)
            assert end == length or (end - first) % tile == 0
            assert first < end
            at = end
        assert at == length
        tiles.append([-(-(end - first) // tile) for _, first, end in own])
        assert max(tiles[-1], default=0) - min(tiles[-1], default=0) <= 1
    longest, total = max(map(max, filter(None, tiles)), default=0), sum(map(sum, tiles))
    if spare:
        assert longest <= -(-total // spare)
    # One tile less in the longest piece would take more items than there are.
    assert longest <= 1 or sum(-(-sum(t) // (longest - 1)) for t in tiles) > num_items


def test_work_wants_an_item_a_sequence():
    with pytest.raises(ShapeError, match="num_items is 2 but there are 3 sequences"):
        decode_work([1, 0, 5], 2, tile=16)


@pytest.mark.parametrize(("num_seqs", "kv_heads", "expected"), [(1, 4, 99), (32, 4, 99), (1, 8, 49), (256, 2, 289)])
def test_the_number_of_items_gives_every_multiprocessor_three_programs_or_a_sequence_one(num_seqs, kv_heads, expected):
    assert num_items_for(num_seqs, kv_heads, 132) == expected


def test_wrong_inputs_are_named():
    q, cache, lens = torch.ones(2, 4, 8), torch.ones(3, 2, 16, 8), int32([1, 2])
    table, items, offsets = int32([[0], [1]]), int32([[0, 0, 1], [1, 0, 2]]), int32([0, 1, 2])
    assert paged_decode_attention(q, cache, cache, table, lens, items, offsets, 1.0).shape == q.shape
    for wrong, message in (
        ({"q": torch.ones(2, 3, 8)}, r"q has shape \(2, 3, 8\) but needs shape \(num_seqs, a multiple of 2, 8\)"),
        ({"q": torch.ones(2, 4, 7)}, r"q has shape \(2, 4, 7\)"),
        ({"q": q.half()}, r"q has torch.float16 but needs torch.float32"),
        ({"v_cache": cache[:2]}, r"v_cache has shape \(2, 2, 16, 8\) but needs shape \(3, 2, 16, 8\)"),
        ({"k_cache": cache.transpose(1, 2).contiguous().transpose(1, 2)}, r"k_cache has strides .* contiguous memory"),
        ({"k_cache": cache[:1], "v_cache": cache[:1], "block_table": None}, r"needs 2 blocks or more"),
        ({"block_table": table[:1]}, r"block_table has shape \(1, 1\) but needs shape \(2, max_blocks\)"),
        ({"block_table": table.long()}, r"block_table has torch.int64 but needs torch.int32"),
        ({"context_lens": int32([1])}, r"context_lens has shape \(1,\) but needs shape \(2,\)"),
        ({"context_lens": lens.long()}, r"context_lens has torch.int64"),
        ({"items": None}, r"item_offsets has no items but needs both"),
        ({"item_offsets": None}, r"item_offsets has no offsets but needs both"),
        ({"items": items[:, :2]}, r"items has shape \(2, 2\) but needs shape \(num_items, 3\)"),
        ({"item_offsets": offsets[:2]}, r"item_offsets has shape \(2,\) but needs shape \(3,\)"),
        ({"scale": 0.0}, r"scale has 0.0 but needs a positive number"),
        ({"window": -1}, r"window has -1 but needs 0 for none, or more"),
    ):
        arguments = {"q": q, "k_cache": cache, "v_cache": cache, "block_table": table, "context_lens": lens, "items": items,
                     "item_offsets": offsets, "scale": 1.0, "window": 0}  # fmt: skip
        with pytest.raises(ShapeError, match=message):
            paged_decode_attention(**{**arguments, **wrong})  # type: ignore[arg-type]
