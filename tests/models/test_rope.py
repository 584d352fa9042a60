"""rope: the tables of each kind equal transformers' rotary modules, and worked examples."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import SEEDS, normal
from tests.versions import transformers_from
from vlmfx.models.rope import LongRope, rope, row_factors
from vlmfx.ops.rotary import RotaryTable, rotary

POSITIONS = st.integers(0, 40_000)


@dataclass(frozen=True)
class Config:
    head_dim: int
    rope_theta: float = 10000.0
    mrope_section: tuple[int, ...] = ()
    mrope_interleaved: bool = False
    long_rope: LongRope | None = None


def angles_of(table: RotaryTable) -> tuple[Tensor, Tensor]:
    """cos and sin as transformers has them, (tokens, head_dim): the sign of rotate_half is not in sin."""
    sign = torch.ones(table.sin.shape[-1])
    sign[: len(sign) // 2] = -1
    return table.cos, table.sin * sign


def mrope_tables(family: str, cfg: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of transformers' module for positions (3, tokens)."""
    transformers_from(5, 0, "takes the settings of rope in another form")
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    prefix = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    settings = {"rope_type": "default", "mrope_section": [*cfg.mrope_section], "rope_theta": cfg.rope_theta}
    config = getattr(modeling, f"{prefix}TextConfig")(
        hidden_size=4 * cfg.head_dim, num_attention_heads=4, head_dim=cfg.head_dim, rope_parameters=settings
    )
    name = f"{prefix}TextRotaryEmbedding" if family == "qwen3_vl" else f"{prefix}RotaryEmbedding"
    cos, sin = getattr(modeling, name)(config)(torch.zeros(1), positions[:, None])
    return cos[0], sin[0]


@st.composite
def sections(draw: st.DrawFn, *, interleaved: bool) -> tuple[int, int, int]:
    height, width = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    # interleaved, the last frequency of height is 3·height − 2, of width 3·width − 1: there must be as many
    least = max(0, 2 * max(height, width) - min(height, width)) if interleaved else 0
    return draw(st.integers(max(least, 1), least + 6)), height, width


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_mrope_equals_transformers(family, data):
    interleaved = family == "qwen3_vl"
    section = data.draw(sections(interleaved=interleaved))
    theta = data.draw(st.sampled_from([10000.0, 1e6, 5e6]))
    cfg = Config(2 * sum(section), theta, section, interleaved)
    positions = torch.tensor(data.draw(st.lists(st.tuples(*[POSITIONS] * 3), min_size=1, max_size=9))).T
    expected = mrope_tables(family, cfg, positions)
    for mine, theirs in zip(angles_of(rope(cfg, positions, torch.float32)), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_sections_worked():
    """Eight frequencies, 4 of time and 2 each of height and width, a position that is not 0 on one axis at a time: which turn?"""
    turned: dict[bool, list[list[int]]] = {}
    for interleaved in (False, True):
        cfg = Config(16, 10000.0, (4, 2, 2), interleaved)
        tables = rope(cfg, torch.eye(3, dtype=torch.int64), torch.float32)
        sin = angles_of(tables)[1][:, :8]
        turned[interleaved] = [row.nonzero().flatten().tolist() for row in sin]
    assert turned[False] == [[0, 1, 2, 3], [4, 5], [6, 7]]
    assert turned[True] == [[0, 3, 6, 7], [1, 4], [2, 5]]


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, position=POSITIONS, axis_free=st.booleans())
def test_equal_positions_are_plain_rope(seed, position, axis_free):
    """Of text all three positions are equal: then sections do not matter."""
    cfg, x = Config(16), normal(seed, 1, 2, 16)
    plain = rotary(x, rope(cfg, torch.tensor([position]), torch.float32))
    for interleaved in (False, True):
        sectioned = Config(16, 10000.0, (4, 2, 2), interleaved)
        table = rope(sectioned, torch.full((3, 1), position), torch.float32)
        assert torch.equal(rotary(x, table), plain)


def test_angles_are_float32_in_bfloat16():
    """bfloat16 would round position 257 to 256."""
    cfg = Config(8)
    table = rope(cfg, torch.tensor([257]), torch.bfloat16)
    assert table.cos.dtype == torch.bfloat16
    assert float(table.cos[0, 0]) == pytest.approx(float(torch.tensor(257.0).cos()), abs=2**-8)


@settings(max_examples=50, deadline=None)
@given(positions=st.lists(POSITIONS, min_size=1, max_size=6), is_long=st.booleans())
def test_long_rope_equals_transformers(positions, is_long):
    transformers_from(5, 0, "takes the settings of rope in another form")
    modeling = importlib.import_module("transformers.models.phi3.modeling_phi3")
    short, long = [1.0, 1.1, 1.5, 2.0], [1.0, 4.0, 9.0, 33.0]
    settings_ = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long}
    config = modeling.Phi3Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=131072, pad_token_id=0,
        original_max_position_embeddings=4096,
        rope_parameters={**settings_, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 4096},
    )  # fmt: skip
    ids = torch.tensor([[*positions, 50_000 if is_long else 0]])
    if not is_long:
        ids = ids % 4096
    module = modeling.Phi3RotaryEmbedding(config)
    cos, sin = module(torch.zeros(1), ids)
    long_rope = LongRope(
        short_factor=tuple(short), long_factor=tuple(long), original_max_position_embeddings=4096,
        scale=module.attention_scaling,
    )  # fmt: skip
    assert module.attention_scaling == pytest.approx((1 + torch.tensor(32.0).log() / torch.tensor(4096.0).log()) ** 0.5)
    cfg = Config(8, 10000.0, long_rope=long_rope)
    table = rope(cfg, ids[0], torch.float32, row_factors(long_rope, torch.full_like(ids[0], is_long, dtype=torch.bool)))
    for mine, theirs in zip(angles_of(table), (cos[0], sin[0]), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)
