"""CacheLayout: the shape of the paged KV cache that compiled programs share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfx.compile.buckets import check_size
from vlmfx.models.decoder import DecoderConfig
from vlmfx.models.layers import Cache

BLOCK_SIZE = 16  # tokens of a block


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """num_blocks of block_size tokens each; a sequence has at most max_blocks of them. Raises PlanError."""

    num_blocks: int
    max_blocks: int
    block_size: int = BLOCK_SIZE

    def __post_init__(self) -> None:
        for name in ("num_blocks", "max_blocks", "block_size"):
            check_size(f"cache: {name}", getattr(self, name))

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_blocks * self.block_size

    @classmethod
    def of(cls, num_rows: int, max_len: int) -> CacheLayout:
        """Room for num_rows sequences of max_len tokens."""
        max_blocks = -(-max_len // BLOCK_SIZE)
        return cls(num_blocks=num_rows * max_blocks, max_blocks=max_blocks)


def bytes_per_token(text: DecoderConfig, dtype: torch.dtype) -> int:
    """What keys and values of a token take, all layers together."""
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * dtype.itemsize


def empty_cache(
    text: DecoderConfig, num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device | str
) -> Cache:
    """k and v a layer, (num_blocks, num_kv_heads, block_size, head_dim), all zero."""
    shape = (num_blocks, text.num_kv_heads, block_size, text.head_dim)

    def zeros() -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return [(zeros(), zeros()) for _ in range(text.num_layers)]
