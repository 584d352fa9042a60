"""rotary turns pairs of dimensions by the position's angle: kernels equal the reference, lengths stay, and scores see relative
positions only, whatever the table's kind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.kernels import Kernel, Mutant, assert_equal, kernels_of
from tests.ops.rotary_tables import Config, heads_of, rotary_tables, table_dtypes
from tests.strategies import DTYPES, SEEDS, assert_near, normal
from vlmfx.errors import ShapeError
from vlmfx.models import decoder, rope
from vlmfx.ops.rotary import OP, RotaryTable, inverse_frequencies, reference, rotary, rotary_table

MUTANTS = [
    Mutant("triton/rotary.py", "(cols < HALF)\n", "(cols < HALF - 1)\n"),
    Mutant("triton/rotary.py", "token * TOKEN_STRIDE", "token * (NUM_HEADS * 2 * HALF)"),
    Mutant("triton/rotary.py", "tl.fma(a, c, -(b * s))", "tl.fma(a, c, b * s)"),
    Mutant("triton/rotary.py", "tl.program_id(1) * HEADS + tl.arange(0, HEADS)", "tl.arange(0, HEADS)"),
    Mutant("triton/rotary.py", "at = token * (2 * HALF) + HALF + cols", "at = token * (2 * HALF) + cols"),
    Mutant("mlu/kernels/rotary.mlu", "__bang_write_value(halves, 2 * plane, (T)0);", ""),
    Mutant("mlu/kernels/rotary.mlu", "part(halves, input + now * tile, 0, rows,", "part(halves, input + now * tile, 0, rows - 1,"),
    Mutant("mlu/kernels/rotary.mlu", "widen_table(sin_row, sin_half, sin_in", "widen_table(sin_row, sin_half, cos_in"),
    Mutant("mlu/kernels/rotary.mlu", "step < mine + 2; ++step", "step < mine + 1; ++step"),
    Mutant("mlu/kernels/rotary.mlu", "x + ((int64_t)t.token * heads + t.head)", "x + ((int64_t)t.token * heads)"),
    Mutant("mlu/kernels/rotary.mlu", "    __sync();\n", ""),
    Mutant("mlu/kernels/rotary.h", "tile.tokens = MIN(tile_tokens, tokens - tile.token);", "tile.tokens = tile_tokens;"),
    Mutant("mlu/kernels/rotary.h", "index % parts * tile_heads, 0, 0", "0, 0, 0"),
    Mutant("mlu/kernels/rotary.h", "table + half_dim, size", "table, size"),
    Mutant("mlu/kernels/rotary.h", "__bang_sub(first, first, second_sin, count)", "__bang_add(first, first, second_sin, count)"),
    Mutant("mlu/kernels/rotary.h", "*sin_of = sin_row + token * pitch", "*sin_of = sin_row"),
]  # fmt: skip
HALVES = st.one_of(
    st.integers(1, 40), st.sampled_from([63, 64, 65, 1023])
)  # 1023: more pairs than a program takes of 3 heads


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, ...]:
    """No tokens, one program's heads and one more, halves that are no power of two, tables of every kind, heads of a fused projection."""
    tokens, half, seed, dtype = draw(st.integers(0, 4)), draw(HALVES), draw(SEEDS), draw(DTYPES)
    heads = draw(st.integers(1, 5) if half > 60 else st.one_of(st.integers(1, 5), st.sampled_from([31, 33])))
    before, after = draw(st.sampled_from([(0, 0), (0, 3), (2, 1)]))
    fused = normal(seed, tokens, before + heads + after, 2 * half, dtype=dtype)
    table = draw(rotary_tables(tokens, 2 * half, draw(table_dtypes(dtype))))
    return heads_of(fused, before, heads), *table


def check(kernel: Kernel, case: tuple[Any, ...]) -> None:
    """The kernel gives what the reference gives."""
    assert_equal(OP, kernel(*case), reference(*case))


def mlu_case() -> tuple[tuple[Any, ...], dict[str, int]]:
    """The heads of q and k of a prefill of 512 tokens of Qwen2-VL-7B, and what the kernel's count by hand names."""
    x, angles = normal(0, 512, 32, 128, dtype=torch.float16), torch.arange(512)[:, None] * torch.ones(64)
    return (x, *rotary_table(angles, torch.float16)), {"tokens": 512, "heads": 32, "dim": 128}


@pytest.mark.parametrize("kernel", kernels_of(OP))
@given(case=cases())
def test_kernel_equals_reference(kernel, case):
    check(kernel, case)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=50)
@given(case=cases(), pad=st.integers(1, 5))
def test_padding_never_shows(kernel, case, pad):
    padded = [torch.cat([a, a.new_full((pad, *a.shape[1:]), torch.nan)]) for a in case]
    assert torch.equal(kernel(*padded)[: len(case[0])], kernel(*case))


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=50)
@given(case=cases(), log2=st.integers(-6, 6))
def test_twice_the_heads_is_twice_the_result(kernel, case, log2):
    """To the bit, in the types that have room: the turn is linear, and a power of two rounds nothing."""
    x, cos, sin = case
    x, cos, sin = x.float(), cos.float(), sin.float()
    assert torch.equal(kernel(x * 2.0**log2, cos, sin), kernel(x, cos, sin) * 2.0**log2)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=50)
@given(case=cases())
def test_lengths_are_kept(kernel, case):
    x, cos, sin = case
    if cos.dtype == torch.float32:
        pairs = x.float().unflatten(-1, (2, -1)).norm(dim=-2)
        turned = kernel(x.float(), cos, sin).unflatten(-1, (2, -1)).norm(dim=-2)
        torch.testing.assert_close(turned, pairs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=50)
@given(case=cases())
def test_tokens_and_heads_do_not_see_each_other(kernel, case):
    """A token alone, and a head alone, gives the same bits."""
    x, cos, sin = case
    together = kernel(*case)
    for t in range(len(x)):
        assert torch.equal(kernel(x[t : t + 1], cos[t : t + 1], sin[t : t + 1])[0], together[t])
    assert torch.equal(kernel(x[:, -1:].contiguous(), cos, sin)[:, 0], together[:, -1])


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=50)
@given(
    seed=SEEDS, place=st.tuples(*[st.integers(0, 60)] * 3), shift=st.tuples(*[st.integers(0, 60)] * 3), data=st.data()
)
def test_scores_depend_on_the_distance_alone(kernel, seed, place, shift, data):
    """q·k of two places, both moved by the same shift (along time, height and width), stays."""
    section = data.draw(st.sampled_from([(), (8, 4, 4)]))
    cfg = Config(32, 10000.0, section, data.draw(st.booleans()) and bool(section))
    axes = 3 if section else 1
    other = torch.tensor(data.draw(st.tuples(*[st.integers(0, 60)] * axes)))
    at = torch.stack([torch.tensor(place[:axes]), other], 1)  # (axes, 2 tokens)
    moved = at + torch.tensor(shift[:axes])[:, None]
    qk = normal(seed, 2, 1, 32)

    def score(positions: torch.Tensor) -> torch.Tensor:
        q, k = kernel(qk, *rope.rope(cfg, positions if section else positions[0], torch.float32))
        return (q * k).sum()

    torch.testing.assert_close(score(at), score(moved), atol=1e-3, rtol=1e-3)


def test_wrong_inputs_are_named():
    x, table = torch.ones(3, 2, 8), rotary_table(torch.ones(3, 4), torch.float32)
    with pytest.raises(ShapeError, match=r"x has shape \(3, 8\) but needs shape \(tokens, heads, head_dim\)"):
        rotary(x[:, 0], table)
    with pytest.raises(ShapeError, match=r"x has shape \(3, 2, 7\) .* even"):
        rotary(x[..., :7], table)
    with pytest.raises(ShapeError, match=r"cos has shape \(3, 1, 8\) but needs shape \(3, 8\), tokens and head_dim"):
        rotary(x, RotaryTable(table.cos[:, None], table.sin))
    with pytest.raises(ShapeError, match=r"sin has shape \(2, 8\) but needs shape \(3, 8\)"):
        rotary(x, RotaryTable(table.cos, table.sin[:2]))
    with pytest.raises(ShapeError, match=r"cos has torch.float16 but needs torch.float32 or torch.bfloat16"):
        rotary(x.bfloat16(), RotaryTable(table.cos.half(), table.sin.half()))
    with pytest.raises(ShapeError, match=r"sin has torch.float32 but needs torch.bfloat16, as cos has"):
        rotary(x.bfloat16(), RotaryTable(table.cos.bfloat16(), table.sin))


def table_of(positions: torch.Tensor, dim: int, dtype: torch.dtype = torch.float32, theta: float = 10000.0):
    return rotary_table(positions[:, None].float() * inverse_frequencies(dim, theta, torch.device("cpu")), dtype)


@settings(deadline=None)
@given(tokens=st.integers(0, 6), heads=st.integers(1, 4), half=st.integers(1, 40), seed=SEEDS, dtype=DTYPES)
def test_each_pair_is_turned(tokens, heads, half, seed, dtype):
    x = normal(seed, tokens, heads, 2 * half, dtype=dtype)
    positions = torch.randint(0, 200, (tokens,), generator=torch.Generator().manual_seed(seed))
    out = rotary(x, table_of(positions, 2 * half, dtype))
    exact = torch.empty(x.shape, dtype=torch.float64)
    for t in range(tokens):
        for i in range(half):
            angle = int(positions[t]) * 10000.0 ** (-2 * i / (2 * half))
            a, b = x[t, :, i].double(), x[t, :, i + half].double()
            exact[t, :, i] = a * math.cos(angle) - b * math.sin(angle)
            exact[t, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, atol=3e-2 if dtype != torch.float32 else 2e-4, rtol=3e-2)


@settings(deadline=None)
@given(tokens=st.integers(1, 6), half=st.integers(1, 40), seed=SEEDS)
def test_lengths_are_kept_far_out(tokens, half, seed):
    x = normal(seed, tokens, 3, 2 * half)
    out = rotary(x, table_of(torch.arange(tokens) * 777, 2 * half))
    assert_near(out.norm(dim=-1), x.double().norm(dim=-1))


def test_positions_stay_apart_in_bfloat16():
    """The table is made in float32: bfloat16 would round position 257 to 256."""
    table = table_of(torch.tensor([256, 257]), 64, torch.bfloat16)
    assert not torch.equal(table.cos[0], table.cos[1])


@settings(deadline=None)
@given(sections=st.tuples(*[st.integers(1, 6)] * 3), tokens=st.integers(1, 5), seed=SEEDS)
def test_m_rope_takes_each_section_from_its_row(sections, tokens, seed):
    """Frequencies 0.. follow time, the next height, the last width; equal rows are plain rope."""
    dim = 2 * sum(sections)
    sizes = {"vocab_size": 1, "hidden_size": dim, "intermediate_size": 1, "num_layers": 1, "num_heads": 1}
    cfg = decoder.DecoderConfig(
        **sizes, num_kv_heads=1, head_dim=dim, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=99,
        mrope_section=sections,
    )  # fmt: skip
    positions = torch.randint(0, 90, (3, tokens), generator=torch.Generator().manual_seed(seed))
    mine = rope.rope(cfg, positions, torch.float32)
    row_of = [row for row, size in enumerate(sections) for _ in range(size)] * 2
    for row in range(3):
        plain = table_of(positions[row], dim, theta=1e6)
        at = [i for i, r in enumerate(row_of) if r == row]
        torch.testing.assert_close(mine.cos[..., at], plain.cos[..., at])
        torch.testing.assert_close(mine.sin[..., at], plain.sin[..., at])
