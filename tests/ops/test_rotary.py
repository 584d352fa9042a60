"""rotary turns pairs of dimensions by the position's angle: lengths stay, and scores see relative positions only."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import DTYPES, SEEDS, assert_near, normal
from vlmfx.models import decoder, rope
from vlmfx.ops.rotary import inverse_frequencies, rotary, rotary_table


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
def test_lengths_are_kept(tokens, half, seed):
    x = normal(seed, tokens, 3, 2 * half)
    out = rotary(x, table_of(torch.arange(tokens) * 777, 2 * half))
    assert_near(out.norm(dim=-1), x.double().norm(dim=-1))


@settings(deadline=None)
@given(m=st.integers(0, 2000), n=st.integers(0, 2000), shift=st.integers(0, 2000), seed=SEEDS)
def test_scores_depend_on_the_distance_alone(m, n, shift, seed):
    q, k = normal(seed, 1, 1, 32), normal(seed + 1, 1, 1, 32)

    def score(a: int, b: int) -> torch.Tensor:
        turned = [rotary(x, table_of(torch.tensor([p]), 32)) for x, p in ((q, a), (k, b))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(m, n), score(m + shift, n + shift), atol=2e-2, rtol=1e-3)


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
