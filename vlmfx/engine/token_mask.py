"""Sets of tokens as bits: token i is bit i % 32 of word i // 32, words are int32; llguidance and `vlmfx.ops.adjust_logits` read them so.

A mask has ceil(vocab / 32) words; bits beyond the vocabulary are 0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Mask: TypeAlias = NDArray[np.int32]


def num_words(vocab_size: int) -> int:
    return (vocab_size + 31) // 32


def every_token(vocab_size: int) -> Mask:
    """The mask of all tokens."""
    mask = np.full(num_words(vocab_size), -1, np.int32)
    if vocab_size % 32:
        mask.view(np.uint32)[-1] = (1 << vocab_size % 32) - 1
    return mask


def mask_of(ids: Iterable[int], vocab_size: int) -> Mask:
    """The mask of these ids; ids beyond the vocabulary are left out."""
    bits = np.zeros(num_words(vocab_size) * 32, bool)
    bits[[i for i in ids if i < vocab_size]] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def forbid(mask: Mask, ids: Iterable[int]) -> None:
    """Take these ids out of the mask, in place; an id twice is as once, ids beyond the words change nothing."""
    words = mask.view(np.uint32)
    for i in ids:
        if i // 32 < len(words):
            words[i // 32] &= np.uint32(~(1 << i % 32) & 0xFFFFFFFF)
