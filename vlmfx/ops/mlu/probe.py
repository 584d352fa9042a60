"""What the kernels take for granted of an MLU370, one intrinsic at a time: `python -m vlmfx.ops.mlu.probe` on a card, the first thing to
run there. Cambricon's manuals were not at hand; the emulator behaves as expected here, and whether a card does is what this tells."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfx.device import resolve_device
from vlmfx.errors import VlmfxError

SIZE, SIDE, CORES = 1024, 32, 16
WRITERS = 4  # tasks of the step TASKS that write: as many cores as any card has
ODD = 64  # bytes
Numbers = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """claim: what the kernels rely on. numbers: "normal", or which of `inputs` else. expected: of a and b, float32, or the words that stand
    for it. tolerance: relative, to 1 at least where `is_sum`; where a card is further off, ops' tolerances tell whether that matters."""

    claim: str
    numbers: str
    expected: Numbers
    tolerance: float = 0.0
    is_sum: bool = False


def inputs(kind: str) -> tuple[Tensor, Tensor]:
    """a and b, (1024,) float32: normal numbers; exponents of 2 that softmax meets, down to -inf; positive numbers of every size;
    with special ones among them; multiples of 1/16, whose sums are exact; what float16 rounds; small integers as words; or zeros
    first."""
    a, b = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(0))
    if kind == "exponents":
        a = torch.linspace(-126, 0, SIZE)
        a[:4] = torch.tensor([-torch.inf, -1e30, -200.0, 0.0])
    elif kind == "positive":
        a = torch.logspace(-30, 30, SIZE)
    elif kind == "special":
        b = torch.where(torch.arange(SIZE) % 3 == 0, a, b)
        a[:6] = torch.tensor([torch.nan, 0.0, -0.0, torch.inf, -torch.inf, 1.0])
        b[:6] = torch.tensor([0.0, -0.0, 0.0, torch.inf, torch.inf, torch.nan])
    elif kind == "exact":
        a, b = (a * 16).round() / 16, (b * 16).round() / 16
        a[100] = a[300] = 99.0
    elif kind == "halves":
        a = a * 100
        a[:4] = torch.tensor([2049.0, 2051.0, 1e-7, 65503.0])  # ties to even, a subnormal, the largest
    elif kind == "words":
        a, b = ((t * 4).int().view(torch.float32) for t in (a, b))
    elif kind == "zeros":
        a, b = (torch.where(t.abs() < 1, 0.0, t) for t in (a, b))
        a[:3] = 0.0
    return a, b


def _sums(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(SIZE)
    out[::SIDE] = a.view(-1, SIDE).sum(1)
    return out


def _argmax(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(SIZE)
    out[:2] = torch.tensor([99.0, 100.0])
    return out


def _odd(a: Tensor, b: Tensor) -> Tensor:
    out, given = torch.zeros(SIZE * 4, dtype=torch.uint8), a.view(torch.uint8)
    out[1 : ODD + 1] = given[1 : ODD + 1]
    return out.view(torch.float32)


def _strides(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(SIDE // 2, 2, SIDE)
    out[:, 0] = a.view(SIDE, SIDE)[: SIDE // 2]
    return out.flatten()


def _scalars(a: Tensor, b: Tensor) -> Tensor:
    out = 2.0 * torch.arange(SIZE)
    out[0] = out[-1]
    return out


def _tasks(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(SIZE // SIDE, SIDE)
    out[:WRITERS] = torch.arange(float(WRITERS))[:, None]
    return out.flatten()


def _filtered(a: Tensor, b: Tensor) -> Tensor:
    kept = a[b != 0]
    return torch.cat([kept, torch.full((SIZE - len(kept),), float(len(kept)))])


def _counted(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(SIZE)
    out[:2] = torch.tensor([float(a.count_nonzero()), float(a.nonzero()[0])])
    return out


def _bits(a: Tensor) -> Tensor:
    return a.view(torch.int32)


def _words(a: Tensor) -> Tensor:
    return a.to(torch.int32).view(torch.float32)


def _rows(a: Tensor) -> Tensor:
    return a.view(SIDE, SIDE)


# In the order of the enum in kernels/entries.h.
PROBES = {
    "reduce_sum": Probe(
        claim="__bang_reduce_sum sums each 128 bytes into their first element",
        numbers="exact",
        expected=_sums,
    ),
    "argmax": Probe(
        claim="__bang_argmax gives the maximum, and as the second word the index of the first of equals",
        numbers="exact",
        expected=_argmax,
    ),
    "transpose": Probe(
        claim="__bang_transpose(d, s, rows, cols) reads [rows, cols]",
        numbers="normal",
        expected=lambda a, b: a.view(-1, 64).t().flatten(),
    ),
    "transpose_half": Probe(
        claim="the same of half",
        numbers="normal",
        expected=lambda a, b: a.half().float().view(32, -1).t().flatten(),
    ),
    "pow2": Probe(
        claim="__bang_pow2 of -inf and of -1e30 is 0, else right to 2e-6",
        numbers="exponents",
        expected=lambda a, b: torch.exp2(a),
        tolerance=2e-6,
    ),
    "log2": Probe(
        claim="__bang_log2 is right to 2e-6",
        numbers="positive",
        expected=lambda a, b: torch.log2(a),
        tolerance=2e-6,
    ),
    "recip": Probe(
        claim="__bang_recip is right to 1e-6 from 1e-30 to 1e30",
        numbers="positive",
        expected=lambda a, b: 1 / a,
        tolerance=1e-6,
    ),
    "narrow": Probe(
        claim="__bang_float2half_rn rounds to the nearest, ties to even, and keeps subnormals",
        numbers="halves",
        expected=lambda a, b: a.half().float(),
    ),
    "half_add": Probe(
        claim="__bang_add of half rounds its sums to half",
        numbers="normal",
        expected=lambda a, b: (a.half() + a.half()).float(),
    ),
    "bytes": Probe(
        claim="__bang_uchar2half takes bytes from 0 to 255",
        numbers="normal",
        expected=lambda a, b: a.view(torch.uint8)[:SIZE].float(),
    ),
    "sub": Probe(
        claim="__bang_sub rounds to the nearest",
        numbers="normal",
        expected=torch.sub,
    ),
    "mul": Probe(
        claim="__bang_mul rounds to the nearest",
        numbers="normal",
        expected=torch.mul,
    ),
    "add_scalar": Probe(
        claim="__bang_add_scalar rounds to the nearest",
        numbers="normal",
        expected=lambda a, b: a + 1.1,
    ),
    "sub_scalar": Probe(
        claim="__bang_sub_scalar rounds to the nearest",
        numbers="normal",
        expected=lambda a, b: a - 1.1,
    ),
    "mul_scalar": Probe(
        claim="__bang_mul_scalar rounds to the nearest",
        numbers="normal",
        expected=lambda a, b: a * 1.1,
    ),
    "ge_scalar": Probe(
        claim="__bang_ge_scalar gives 1 or 0, and 0 of a NaN",
        numbers="special",
        expected=lambda a, b: (a >= 0).float(),
    ),
    "gt_scalar": Probe(
        claim="__bang_gt_scalar, too",
        numbers="special",
        expected=lambda a, b: (a > 0).float(),
    ),
    "lt_scalar": Probe(
        claim="__bang_lt_scalar, too",
        numbers="special",
        expected=lambda a, b: (a < 0).float(),
    ),
    "eq_scalar": Probe(
        claim="__bang_eq_scalar takes -0 for 0, and nothing for NaN",
        numbers="special",
        expected=lambda a, b: (a == 0).float(),
    ),
    "maxequal": Probe(
        claim="__bang_maxequal is the larger",
        numbers="normal",
        expected=torch.maximum,
    ),
    "cycle_add": Probe(
        claim="__bang_cycle_add repeats its second operand",
        numbers="normal",
        expected=lambda a, b: (_rows(a) + b[:SIDE]).flatten(),
    ),
    "cycle_sub": Probe(
        claim="__bang_cycle_sub, too",
        numbers="normal",
        expected=lambda a, b: (_rows(a) - b[:SIDE]).flatten(),
    ),
    "cycle_mul": Probe(
        claim="__bang_cycle_mul, too",
        numbers="normal",
        expected=lambda a, b: (_rows(a) * b[:SIDE]).flatten(),
    ),
    "fusion": Probe(
        claim="__bang_fusion(FUSION_FMA, d, a, scalar, c, n, n) is a * scalar + c",
        numbers="normal",
        expected=lambda a, b: a * 1.1 + b,
        tolerance=1e-6,
        is_sum=True,
    ),
    "fusion_scalars": Probe(
        claim="__bang_fusion(FUSION_FMA, d, a, scalar, scalar, n) is a * scalar + scalar",
        numbers="normal",
        expected=lambda a, b: a * 1.1 + 0.3,
        tolerance=1e-6,
        is_sum=True,
    ),
    "fusion_minus": Probe(
        claim="__bang_fusion(FUSION_FMS, d, a, b, scalar, n, n) is a * b - scalar",
        numbers="normal",
        expected=lambda a, b: a * b - 0.3,
        tolerance=1e-6,
        is_sum=True,
    ),
    "fusion_cycle": Probe(
        claim="__bang_fusion(FUSION_FMA, d, a, b, c, n, m) repeats b and c, each of m",
        numbers="normal",
        expected=lambda a, b: (_rows(a) * b[:SIDE] + b[SIDE : 2 * SIDE]).flatten(),
        tolerance=1e-6,
        is_sum=True,
    ),
    "bits": Probe(
        claim="__bang_band, __bang_bor and __bang_bnot of int8_t take counts of bytes",
        numbers="words",
        expected=lambda a, b: ((_bits(a) & _bits(b)) | ~_bits(a)).view(torch.float32),
    ),
    "cycle_bits": Probe(
        claim="__bang_cycle_band repeats its second operand",
        numbers="words",
        expected=lambda a, b: (_bits(a).view(SIDE, SIDE) & _bits(b)[:SIDE]).flatten().view(torch.float32),
    ),
    "integers": Probe(
        claim="__bang_eq_scalar and __bang_mul_scalar take int32_t",
        numbers="words",
        expected=lambda a, b: _words((_bits(a) == 3) * 5),
    ),
    "truncate": Probe(
        claim="__bang_float2int32_tz rounds to 0",
        numbers="normal",
        expected=lambda a, b: _words(a),
    ),
    "count": Probe(
        claim="__bang_count counts what is not 0, __bang_findfirst1 finds the first of them, and both return it",
        numbers="zeros",
        expected=_counted,
    ),
    "filter": Probe(
        claim="__bang_filter puts side by side what the mask does not leave out, and returns how many",
        numbers="zeros",
        expected=_filtered,
    ),
    "odd_bytes": Probe(
        claim="__memcpy takes any number of bytes at any address of device memory",
        numbers="normal",
        expected=_odd,
    ),
    "strides": Probe(
        claim="the last argument of a strided __memcpy is the number of segments minus one",
        numbers="normal",
        expected=_strides,
    ),
    "scalars": Probe(
        claim="scalar stores to NRAM are seen by the vector operation after them, and its results by scalar loads",
        numbers="normal",
        expected=_scalars,
    ),
    "async": Probe(
        claim="__sync() waits for an asynchronous copy that ran beside arithmetic",
        numbers="normal",
        expected=lambda a, b: a + a + a,
    ),
    "tasks": Probe(
        claim="a launch of cnrtFuncTypeBlock over all cores runs each task once",
        numbers="normal",
        expected=_tasks,
    ),
    "neighbours": Probe(
        claim="tasks may write words of 4 bytes side by side: none is lost",
        numbers="normal",
        expected=lambda a, b: torch.arange(float(SIZE)),
    ),
}


def run(name: str, device: torch.device) -> float:
    """How far the device is from what is expected: the largest relative difference, infinite where NaN or an infinity is elsewhere."""
    probe, number = PROBES[name], [*PROBES].index(name)
    a, b = inputs(probe.numbers)
    got = torch.ops.vlmfx_mlu.probe(number, a.to(device), b.to(device)).cpu()
    expected = probe.expected(a, b)
    exact = (got == expected) | (_bits(got) == _bits(expected)) | (got.isnan() & expected.isnan())
    if bool(exact.all()):
        return 0.0
    size = expected.abs().clamp(min=1.0 if probe.is_sum else 1e-30)
    return float(((got - expected).abs() / size)[~exact].nan_to_num(torch.inf).max())


def main() -> int:
    """Print each claim and whether the card bears it out; 1 where one does not hold."""
    from vlmfx.ops import mlu

    try:
        device = resolve_device("mlu")
        mlu.load()
    except VlmfxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    failed = 0
    for name, probe in PROBES.items():
        off = run(name, device)
        holds = off <= probe.tolerance
        failed += not holds
        print(f"{'ok     ' if holds else 'DIFFERS'} {name:10} {probe.claim}" + (f" (off by {off:.1e})" if off else ""))
    print(f"{len(PROBES) - failed} of {len(PROBES)} hold")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
