"""Rotary tables of the decoders: plain, by sections of three positions (M-RoPE), and with long-context factors.

Sources: huggingface/transformers: src/transformers/models/{qwen2_vl,qwen3_vl,phi3}/; M-RoPE is arXiv:2409.12191."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vlmfx.ops.rotary import RotaryTable, inverse_frequencies, rotary_table


@dataclass(frozen=True, kw_only=True)
class LongRope:
    """Phi-3's "su" or "longrope": every frequency is divided by a factor of its own, from one of two lists, and cos and sin are scaled.

    A sequence takes the long list when it may become longer than original_max_position_embeddings."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    scale: float


class RopeConfig(Protocol):
    """What the table depends on; see DecoderConfig."""

    @property
    def head_dim(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def mrope_section(self) -> tuple[int, ...]: ...
    @property
    def mrope_interleaved(self) -> bool: ...
    @property
    def long_rope(self) -> LongRope | None: ...


def rope(cfg: RopeConfig, positions: Tensor, dtype: torch.dtype, factors: Tensor | None = None) -> RotaryTable:
    """The table of positions (tokens,), or (3, tokens) of time, height and width with M-RoPE.

    factors (tokens, head_dim/2) float32, with LongRope only: each token's, as `row_factors` gives them."""
    if cfg.long_rope is not None:
        assert factors is not None, "LongRope needs to know each token's factors"
        frequencies = inverse_frequencies(cfg.head_dim, cfg.rope_theta, positions.device, factors)
        table, scale = rotary_table(positions[:, None].float() * frequencies, torch.float32), cfg.long_rope.scale
        return RotaryTable((table.cos * scale).to(dtype), (table.sin * scale).to(dtype))
    angles = positions[..., None].float() * inverse_frequencies(cfg.head_dim, cfg.rope_theta, positions.device)
    if not cfg.mrope_section:
        return rotary_table(angles, dtype)
    if cfg.mrope_interleaved:
        return rotary_table(_interleave(angles, cfg.mrope_section), dtype)
    return rotary_table(torch.cat([part[i] for i, part in enumerate(angles.split(cfg.mrope_section, -1))], -1), dtype)


def _interleave(angles: Tensor, section: tuple[int, ...]) -> Tensor:
    """(3, tokens, head_dim/2) → (tokens, head_dim/2): frequencies 1, 4, 7, ... turn with height, 2, 5, 8, ... with width, as many as
    their sections say, and all others with time (Qwen3-VL)."""
    mixed = angles[0].clone()
    for axis in (1, 2):
        taken = slice(axis, 3 * section[axis], 3)
        mixed[:, taken] = angles[axis, :, taken]
    return mixed


def row_factors(long_rope: LongRope, is_long: Tensor) -> Tensor:
    """is_long (tokens,) bool, which tokens take the long list → the factors of each, (tokens, head_dim/2) float32."""
    short, long = (torch.tensor(row, dtype=torch.float32) for row in (long_rope.short_factor, long_rope.long_factor))
    return torch.where(is_long[:, None], long, short)
