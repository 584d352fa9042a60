"""Rotary embedding in Triton. One program turns up to PAIRS pairs of one token, all its heads where they fit.

A head is two tiles of head_dim/2 columns, so both members of a pair are in one thread, and the token's half-tables are read once
for all heads. x is read once and written once, which is what limits it. Tail: heads and columns beyond the last are masked."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS = 2048  # 16 a thread of four warps, four loads of 16 bytes in flight where an element has two


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As the contract; tokens and heads may lie apart, elements of a head may not."""
    x = by_token(x)
    tokens, heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        num_heads, cols, warps = tile_of(heads, head_dim // 2)
        _kernel[(tokens, triton.cdiv(heads, num_heads))](
            x, cos.contiguous(), sin.contiguous(), out, *x.stride()[:2], heads, head_dim // 2,
            HEADS=num_heads, COLS=cols, num_warps=warps,
        )  # fmt: skip
    return out


def by_token(x: Tensor) -> Tensor:
    """x (tokens, heads, head_dim), copied unless a token is one stretch of memory in which elements of a head lie side by side."""
    return x if x.stride(2) == 1 and x.stride(0) >= x.shape[1] * x.stride(1) else x.contiguous()


def tile_of(heads: int, half: int) -> tuple[int, int, int]:
    """Heads a program, half's width rounded up, warps."""
    cols = triton.next_power_of_2(half)
    num_heads = min(triton.next_power_of_2(heads), max(PAIRS // cols, 1))
    return num_heads, cols, min(max(num_heads * cols // 512, 1), 8)


# Strides are sizes of the model: as constants they say which loads may be wide where they are no multiples of 16.
@triton.jit
def _kernel(
    x, cos, sin, out, TOKEN_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, NUM_HEADS: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    cols = tl.arange(0, COLS)[None, :]
    inside = (heads < NUM_HEADS) & (cols < HALF)
    c, s = load_angles(cos, sin, token, cols, HALF)
    at = x + token * TOKEN_STRIDE + heads * HEAD_STRIDE + cols
    a, b = turned(at, inside, c, s, HALF)
    to = out + token * (NUM_HEADS * 2 * HALF) + heads * (2 * HALF) + cols
    tl.store(to, a, mask=inside)
    tl.store(to + HALF, b, mask=inside)


@triton.jit
def load_angles(cos, sin, token, cols, HALF: tl.constexpr):
    """cos and sin (1, cols) of a token: the halves are equal, and the second of sin has no sign to take off."""
    at = token * (2 * HALF) + HALF + cols
    c = tl.load(cos + at, mask=cols < HALF, other=0.0)
    s = tl.load(sin + at, mask=cols < HALF, other=0.0)
    return c.to(tl.float32), s.to(tl.float32)


@triton.jit
def turned(at, inside, c, s, HALF: tl.constexpr):
    """Both halves of the heads at these pointers, turned, in their own dtype."""
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + HALF, mask=inside, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    # Said which product is rounded, as compilers choose: a head's bits must not depend on how many there are.
    return tl.fma(a, c, -(b * s)).to(first.dtype), tl.fma(b, c, a * s).to(second.dtype)
