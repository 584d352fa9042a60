"""vision_attention: kernels equal the reference; order, batch mates and padding never show."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.kernels import Kernel, Mutant, assert_equal, kernels_of
from tests.ops.packed_cases import HEAD_DIMS, assert_same, heads, int32, starts_of, tiny
from tests.ops.shared_mutants import SharedMutant
from tests.strategies import DTYPES, SEEDS, normal
from vlmfx.errors import ShapeError
from vlmfx.ops.vision_attention import OP, reference, vision_attention

FILE, SHARED, MLU = "triton/vision_attention.py", "triton/flash.py", "mlu/kernels/vision_attention.mlu"
MUTANTS = [
    Mutant(FILE, "seen = n + keys < num_keys", "seen = n + keys <= num_keys"),
    Mutant(FILE, "full = num_keys // BLOCK_N * BLOCK_N", "full = num_keys // BLOCK_N * BLOCK_N // 2"),
    Mutant(FILE, "begin_k.to(tl.int64) * V_ROW + head * V_HEAD", "begin_k.to(tl.int64) * V_ROW"),
    Mutant(FILE, "(begin + first).to(tl.int64)", "begin.to(tl.int64)"),
    Mutant(FILE, "scale * LOG2_E", "scale"),
    SharedMutant(SHARED, "tile - begin // BLOCK_M - segment", "tile - begin // BLOCK_M", kernel="vision_attention"),
    SharedMutant(SHARED, "num_segments + 1, STARTS", "STARTS, STARTS", kernel="vision_attention"),
    SharedMutant(SHARED, "scores = dot(q[1], tl.trans(k[1]), scores)", "pass", kernel="vision_attention"),
    SharedMutant(SHARED, "total = total * fade", "total = total", kernel="vision_attention"),
    SharedMutant(SHARED, "low * fade[:, None]", "low", kernel="vision_attention"),
    SharedMutant(SHARED, "high * fade[:, None]", "high", kernel="vision_attention"),
    SharedMutant(SHARED, "tl.where(total == 0.0, 1.0, total)", "total", kernel="vision_attention"),
    Mutant(MLU, "attend(tile, 0, MIN(KEYS, num_keys - step * KEYS)", "attend(tile, 0, MIN(KEYS, num_keys)"),
    Mutant(MLU, "head = item % heads", "head = item % tile_queries"),
    Mutant(MLU, "is_segment ? starts_k[i + 1] - begin_k : 0", "is_segment ? starts_k[i + 1] - begin_k : KEYS"),
    Mutant(MLU, "is_segment ? starts_q[i + 1] : q_tokens", "is_segment ? starts_q[i + 1] : begin"),
    Mutant(MLU, "begin_k * stride + head * dim, *v_rows", "begin * stride + head * dim, *v_rows"),
    Mutant(MLU, "v + (int64_t)begin_k * stride + head * dim", "v + (int64_t)begin_k * stride"),
    Mutant(MLU, "in = (step + 1) % 2 * half_of", "in = step % 2 * half_of"),
    Mutant(MLU, "    before += items;", "    before += items / heads;"),
    Mutant(MLU, "scale * LOG2_E", "scale"),
    Mutant("mlu/kernels/attention.h", "  __bang_mul(t.total, t.total, t.fade, lanes);\n", ""),
    Mutant("mlu/kernels/attention.h", "__bang_cycle_mul(t.sums, t.sums, t.fade, t.dim * lanes, lanes);", ""),
    Mutant(
        "mlu/kernels/attention.h",
        "__bang_eq_scalar(t.fade, t.total, 0.f, t.lanes);",
        "__bang_write_value(t.fade, t.lanes, 0.f);",
    ),
    Mutant("mlu/kernels/attention.h", "  __bang_mul_scalar(t.top, t.greatest, 1.f, lanes);\n", ""),
]
FEW = settings(max_examples=8)
EACH_KERNEL = pytest.mark.parametrize("kernel", kernels_of(OP))
# Around the tiles of 16 and 32 (float32) and of 32 and 64 (16 bits), and several of them; short ones too, so that a case is cheap.
LENGTHS = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 31, 33, 65]))
STARTS = 256  # segments that the CUDA kernel looks through at a time


class Case(NamedTuple):
    """The arguments of the op, in order."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    scale: float


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """No segments, empty ones and many, tiles missed by one, queries apart from keys, padding, sharp and flat softmaxes."""
    lengths_q = draw(st.lists(LENGTHS, min_size=draw(st.sampled_from([1, 0, 2])), max_size=3))
    lengths_k = [draw(LENGTHS) for _ in lengths_q]
    num_heads, head_dim, dtype = draw(st.sampled_from([1, 1, 2])), draw(HEAD_DIMS), draw(DTYPES)
    if draw(st.integers(0, 12)) == 5:
        num_heads, lengths_q, lengths_k = 1, [0] * (STARTS - 1) + lengths_q, [0] * (STARTS - 1) + lengths_k
    factor, scale = draw(st.sampled_from([0.0, 1.0, 4.0])), draw(st.sampled_from([head_dim**-0.5, 0.05]))
    pads = st.sampled_from([0, 0, 1, 40])
    if draw(st.booleans()):
        q, k, v = draw(heads(sum(lengths_q), draw(pads), [num_heads] * 3, head_dim, dtype))
        starts = starts_of(lengths_q)
        return Case(q * factor if draw(st.booleans()) else q, k, v, starts, starts, scale)
    (q,) = draw(heads(sum(lengths_q), draw(pads), [num_heads], head_dim, dtype))
    k, v = draw(heads(sum(lengths_k), draw(pads), [num_heads] * 2, head_dim, dtype))
    return Case(q * factor, k, v, starts_of(lengths_q), starts_of(lengths_k), scale)


def check(kernel: Kernel, case: tuple[Any, ...]) -> None:
    """The kernel gives what the reference gives."""
    assert_equal(OP, kernel(*case), reference(*case))


def mlu_case() -> tuple[tuple[Any, ...], dict[str, int]]:
    """An image of 512 patches in the tower of Qwen2-VL, and what the kernel's count by hand names."""
    q, k, v = (normal(i, 512, 16, 80, dtype=torch.float16) for i in range(3))
    return (q, k, v, int32([0, 512]), int32([0, 512]), 80**-0.5), {"pairs": 512 * 512, "heads": 16, "dim": 80}


@settings(max_examples=20)
@EACH_KERNEL
@given(case=cases())
def test_kernel_equals_reference(kernel, case):
    check(kernel, case)


def segments(case: Case) -> list[tuple[slice, slice]]:
    """The rows of q, and those of k and v, of each segment."""
    q, k = case.cu_seqlens_q.tolist(), case.cu_seqlens_k.tolist()
    return [(slice(q[i], q[i + 1]), slice(k[i], k[i + 1])) for i in range(len(q) - 1)]


@FEW
@EACH_KERNEL
@given(case=cases(), seed=SEEDS)
def test_the_order_of_segments_never_shows(kernel, case, seed):
    of = segments(case)
    order = torch.randperm(len(of), generator=torch.Generator().manual_seed(seed)).tolist()
    rows_q, rows_k = ([torch.arange(1000)[of[i][at]] for i in order] for at in (0, 1))
    q = case.q[torch.cat([*rows_q, torch.arange(case.cu_seqlens_q[-1], len(case.q))])]
    k, v = (t[torch.cat([*rows_k, torch.arange(case.cu_seqlens_k[-1], len(case.k))])] for t in (case.k, case.v))
    moved = Case(q, k, v, starts_of([len(r) for r in rows_q]), starts_of([len(r) for r in rows_k]), case.scale)
    out, expected = kernel(*moved), kernel(*case)
    at = 0
    for i in order:
        own = expected[of[i][0]]
        assert_same(OP, kernel, out[at : at + len(own)], own)
        at += len(own)


@FEW
@EACH_KERNEL
@given(case=cases())
def test_batch_mates_never_show(kernel, case):
    together = kernel(*case)
    for q, k in segments(case):
        if q.start == q.stop:
            continue
        own = (case.q[q], case.k[k], case.v[k], int32([0, q.stop - q.start]), int32([0, k.stop - k.start]), case.scale)
        assert_same(OP, kernel, kernel(*own), together[q])


@FEW
@EACH_KERNEL
@given(case=cases(), pad=st.sampled_from([1, 40]), empty=st.integers(0, 2))
def test_padding_and_empty_segments_are_zero_and_never_show(kernel, case, pad, empty):
    q, k, v = (torch.cat((t, t.new_full((pad, *t.shape[1:]), torch.nan))) for t in case[:3])
    starts_q, starts_k = (torch.cat((s, s[-1:].expand(empty))) for s in case[3:5])
    out = kernel(q, k, v, starts_q, starts_k, case.scale)
    assert (out[case.cu_seqlens_q[-1] :] == 0).all()
    assert_same(OP, kernel, out[: len(case.q)], kernel(*case))


@FEW
@EACH_KERNEL
@given(num_q=LENGTHS, num_k=LENGTHS, seed=SEEDS)
def test_the_order_of_keys_never_shows(kernel, num_q, num_k, seed):
    q, k, v = normal(seed, num_q, 2, 16), normal(seed + 1, num_k, 2, 16), normal(seed + 2, num_k, 2, 16)
    order = torch.randperm(num_k, generator=torch.Generator().manual_seed(seed))
    starts = int32([0, num_q]), int32([0, num_k])
    assert_equal(OP, kernel(q, k[order], v[order], *starts, 0.25), kernel(q, k, v, *starts, 0.25))


@FEW
@EACH_KERNEL
@given(case=cases(), seed=SEEDS)
def test_what_is_added_to_every_key_never_shows(kernel, case, seed):
    q, k, v = (t.float() for t in case[:3])
    shift = normal(seed, *k.shape[1:]) / 4
    out = kernel(q, k + shift, v, *case[3:])
    torch.testing.assert_close(out, kernel(q, k, v, *case[3:]), rtol=1e-4, atol=1e-4)


@FEW
@EACH_KERNEL
@given(case=cases(), seed=SEEDS)
def test_weights_sum_to_one(kernel, case, seed):
    value = normal(seed, *case.v.shape[1:], dtype=case.v.dtype)
    out = kernel(case.q, case.k, value.expand(case.v.shape), *case[3:])
    for q, k in segments(case):
        expected = value if k.start < k.stop else torch.zeros_like(value)
        assert_equal(OP, out[q], expected.expand(out[q].shape))


@FEW
@EACH_KERNEL
@given(case=cases(), seed=SEEDS)
def test_huge_scores(kernel, case, seed):
    """Whole numbers, so that scores are exact: the best keys share the weight, and no other has any."""
    q, k = ((normal(seed + i, *t.shape) * 2).round().to(t.dtype) for i, t in enumerate(case[:2]))
    huge = case._replace(q=q * 512, k=k, scale=1.0)
    out = kernel(*huge)
    assert out.isfinite().all()
    assert_equal(OP, out, reference(*huge))


@FEW
@EACH_KERNEL
@given(case=cases())
def test_tiny_values(kernel, case):
    """Scores are next to 0, and the mean of what is tiny is exact by its own size."""
    scale = tiny(case.q.dtype)
    case = case._replace(**{n: getattr(case, n) * scale for n in ("q", "k", "v")})
    assert_equal(OP, kernel(*case) / scale, reference(*case) / scale)


def test_wrong_inputs_are_named():
    q, starts = torch.ones(4, 2, 8), int32([0, 3])
    arguments = {"q": q, "k": q, "v": q, "cu_seqlens_q": starts, "cu_seqlens_k": starts, "scale": 1.0}
    assert vision_attention(**arguments).shape == q.shape  # type: ignore[arg-type]
    for wrong, message in (
        ({"q": torch.ones(4, 16)}, r"q has shape \(4, 16\) but needs shape \(tokens, heads, D\), D from 1 to 256"),
        ({"q": torch.ones(4, 2, 257)}, r"q has shape \(4, 2, 257\)"),
        ({"k": torch.ones(4, 2, 16)}, r"k has shape \(4, 2, 16\) but needs shape \(tokens, a divisor of 2, 8\)"),
        ({"k": q[:, :1], "v": q[:, :1]}, r"k has shape \(4, 1, 8\) but needs shape \(tokens, 2, 8\), as many heads"),
        ({"v": q[:3]}, r"v has shape \(3, 2, 8\) but needs shape \(4, 2, 8\), as k has"),
        ({"v": q.half()}, r"v has torch.float16 but needs torch.float32"),
        ({"cu_seqlens_q": starts[:0]}, r"cu_seqlens_q has shape \(0,\) but needs shape \(num_segments \+ 1,\)"),
        ({"cu_seqlens_q": starts.long()}, r"cu_seqlens_q has torch.int64 but needs torch.int32"),
        ({"cu_seqlens_k": int32([0, 1, 2])}, r"cu_seqlens_k has shape \(3,\) but needs shape \(2,\), as cu_seqlens_q"),
        ({"scale": 0.0}, r"scale has 0.0 but needs a positive number"),
    ):
        with pytest.raises(ShapeError, match=message):
            vision_attention(**{**arguments, **wrong})  # type: ignore[arg-type]
