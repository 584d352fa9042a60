"""Steps that the attention kernels share; no kernel is launched from here.

A head of D numbers is worked on as two parts whose widths are powers of two, as Triton's tensors are: LO, the largest that fits D,
and HI, the smallest that holds the rest (0: no rest). So 72 and 80 are 64 + 16 wide, not 128. What has two parts is a pair; where HI is
0 its second is the first again, and not used."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

# The interpreter multiplies with numpy, which has no bfloat16; on a device a float32 operand would miss the tensor cores.
IS_INTERPRETED = tl.constexpr(knobs.runtime.interpret)
LOG2_E = 1.4426950408889634
SHORT = 64  # queries of a segment, as a window of Qwen2.5-VL's vision tower has
FEW_ROWS = 128 * 128  # of all heads; in tiles of 128 no more would be a tile for each SM
STARTS = tl.constexpr(256)
# Below any score, and finite: of two of it the difference is 0, not NaN.
LOWEST = tl.constexpr(-3e38)


def parts(head_dim: int) -> tuple[int, int]:
    """LO and HI of a head; a product is at least 16 wide."""
    low = max(16, 1 << (head_dim.bit_length() - 1))
    return low, max(16, triton.next_power_of_2(head_dim - low)) if head_dim > low else 0


class Config(NamedTuple):
    """Rows and keys of a tile, and how a program is run; block_n divides block_m."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# What is worth trying beside what `config` chooses.
CANDIDATES = [Config(m, n, w, s) for m in (64, 128) for n in (32, 64, 128) for w in (4, 8) for s in (2, 3) if n <= m]


def config(q: Tensor, num_segments: int) -> Config:
    """For queries q (rows, heads, D) in num_segments segments, by what a launch may know: no lengths.

    Where segments are short, tiles are; and where tiles of 128 would be too few for a GPU. On Hopper a product's operands come out
    of shared memory and leave registers for 128 keys; up to 80 wide, tiles of 64 keys let two programs fit an SM, and one multiplies
    while the other exponentiates. Elsewhere operands take registers, and tiles are what these hold; nothing spills."""
    rows, heads, head_dim = q.shape
    is_short = rows <= SHORT * max(num_segments, 1) or rows * heads <= FEW_ROWS
    if q.dtype == torch.float32:
        return Config(32, 16, 8 if is_hopper() else 4, 2)
    if head_dim > 128:
        return Config(64, 32, 8, 2)
    if is_hopper():
        if is_short:
            return Config(64, 64, 4, 3)
        return Config(128, 64, 8, 3) if head_dim <= 80 else Config(128, 128, 8, 3)
    if is_short:
        return Config(64, 64, 4, 4) if head_dim <= 80 else Config(64, 32, 4, 3)
    return Config(128, 64, 8, 2) if head_dim <= 80 else Config(128, 32, 8, 3)


def is_hopper() -> bool:
    """Whether the kernels are compiled for sm_90."""
    return not knobs.runtime.interpret and driver.active.get_current_target().arch == 90


def tail_stages(num_stages: int, dtype: torch.dtype) -> int:
    """Stages of the loops beside a kernel's longest. On Hopper a second pipelined loop with products makes ptxas let those of both wait
    for each other (its warning C7515), so there the others have one stage; elsewhere, and in float32, more take fewer registers."""
    return 1 if is_hopper() and dtype != torch.float32 else num_stages


def side_by_side(x: Tensor) -> Tensor:
    """x, copied unless the elements of its last axis lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def dot(a, b, acc=None):
    """a (M, K) @ b (K, N) (+ acc) → (M, N) float32; float32 operands are not rounded to tf32."""
    if IS_INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def find_segment(tile, cu_seqlens, num_segments, num_rows, BLOCK_M: tl.constexpr):
    """The segment that owns a tile of BLOCK_M rows → its number, first row and length, and the tile's first row within it.

    Segment i owns the tiles from cu_seqlens[i] // BLOCK_M + i on, of which the last may hold no row; there are
    num_rows // BLOCK_M + num_segments + 1 tiles. The rows after the last segment are segment num_segments. Numbering as in
    vllm-project/vllm: vllm/v1/attention/ops/triton_unified_attention.py; all first tiles are compared with ours at once, as each step
    of a binary search would wait for memory."""
    segment = -1
    for base in range(0, num_segments + 1, STARTS):
        at = base + tl.arange(0, STARTS)
        is_segment = at <= num_segments
        rows = tl.load(cu_seqlens + at, mask=is_segment, other=0)
        segment += tl.sum((is_segment & (rows // BLOCK_M + at <= tile)).to(tl.int32))
    begin = tl.load(cu_seqlens + segment)
    end = tl.load(cu_seqlens + segment + 1, mask=segment < num_segments, other=num_rows)
    return segment, begin, end - begin, (tile - begin // BLOCK_M - segment) * BLOCK_M


@triton.jit
def load(at, rows, inside, HEAD_DIM: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    """The pair of rows that begin `rows` (N,) elements after pointer `at`; zeros where not inside (N,), which None says of none."""
    starts, cols = at + rows[:, None], tl.arange(0, LO)[None, :]
    if inside is None:
        low = tl.load(starts + cols) if LO <= HEAD_DIM else tl.load(starts + cols, mask=cols < HEAD_DIM, other=0.0)
    else:
        known = inside[:, None]
        low = tl.load(starts + cols, mask=known if LO <= HEAD_DIM else known & (cols < HEAD_DIM), other=0.0)
    high = low
    if HI > 0:
        rest = LO + tl.arange(0, HI)[None, :]
        if inside is not None:
            high = tl.load(starts + rest, mask=known & (rest < HEAD_DIM), other=0.0)
        elif LO + HI > HEAD_DIM:
            high = tl.load(starts + rest, mask=rest < HEAD_DIM, other=0.0)
        else:
            high = tl.load(starts + rest)
    return low, high


@triton.jit
def start(BLOCK_M: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    """The state of an online softmax before any key: the pair of sums of weighted values, sum of weights, greatest score."""
    low = tl.zeros((BLOCK_M, LO), tl.float32)
    high = low
    if HI > 0:
        high = tl.zeros((BLOCK_M, HI), tl.float32)
    return low, high, tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), LOWEST, tl.float32)


@triton.jit
def attend(state, q, k, v, seen, scale, HI: tl.constexpr):
    """The state after a tile of keys, of pairs q, k and v; scale is positive and has log2(e) in it, as powers are of 2.

    seen (rows or 1, keys) says what a row attends to, None that it is all; values of keys that no row attends to must be finite.
    Source: Milakov and Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691, algorithm 1."""
    low, high, total, top = state
    scores = dot(q[0], tl.trans(k[0]))
    if HI > 0:
        scores = dot(q[1], tl.trans(k[1]), scores)
    if seen is not None:
        scores = tl.where(seen, scores, float("-inf"))
    greatest = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - greatest[:, None])
    fade = tl.exp2(top - greatest)
    total = total * fade + tl.sum(weights, 1)
    weights = weights.to(v[0].dtype)
    low = dot(weights, v[0], low * fade[:, None])
    if HI > 0:
        high = dot(weights, v[1], high * fade[:, None])
    return low, high, total, greatest


@triton.jit
def store(state, at, rows, inside, HEAD_DIM: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    """Write the mean of values to the rows that begin `rows` elements after pointer `at`; where no key was attended to it is 0."""
    low, high, total, _top = state
    share = 1.0 / tl.where(total == 0.0, 1.0, total)[:, None]
    cols = tl.arange(0, LO)[None, :]
    tl.store(at + rows[:, None] + cols, low * share, mask=inside[:, None] & (cols < HEAD_DIM))
    if HI > 0:
        rest = LO + tl.arange(0, HI)[None, :]
        tl.store(at + rows[:, None] + rest, high * share, mask=inside[:, None] & (rest < HEAD_DIM))
