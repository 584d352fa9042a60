"""Keys of content: 128 bits that two pieces of content share only if they are the same.

A media item's key is of all that encode is given; a block's is chained to the key before it, and covers token ids, what media stand in
their place, and, at the beginning of the chain, whatever else changes keys and values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import fields

import numpy as np
from torch import Tensor

from vlmfx.models.vision_inputs import VisionInputs

SIZE = 16  # bytes of a key


def media_key(vision: VisionInputs, salt: str = "") -> bytes:
    """Of what encode is given: pixels, where the patches lie, and how they are normalised; and of the salt of those who may share it."""
    digest = hashlib.blake2b(salt.encode(), digest_size=SIZE)
    for field in fields(vision):
        value = getattr(vision, field.name)
        is_tensor = isinstance(value, Tensor)
        what = (value.dtype, tuple(value.shape)) if is_tensor else value
        digest.update(f"\0{field.name}={what}\0".encode())
        if is_tensor:
            digest.update(np.ascontiguousarray(value.numpy()).data)
    return digest.digest()


def rows_key(rows: Tensor, salt: str = "") -> bytes:
    """Of ready embeddings (rows, width)."""
    what = f"{salt}\0{rows.dtype}{tuple(rows.shape)}\0"
    digest = hashlib.blake2b(what.encode(), digest_size=SIZE)
    digest.update(rows.float().contiguous().numpy().data)
    return digest.digest()


def root_key(salt: str, what: str) -> bytes:
    """The beginning of a chain: for prompts of one salt, and of one `what` beside the tokens, such as the rope that was chosen."""
    return hashlib.blake2b(f"{salt}\0{what}".encode(), digest_size=SIZE).digest()


def block_keys(
    parent: bytes, token_ids: np.ndarray, positions: np.ndarray, media: Sequence[tuple[int, bytes]], block_size: int
) -> Iterator[bytes]:
    """The key of each whole block of the tokens that follow what `parent` is the key of.

    token_ids (n,) int32; positions (rows, n), which media may move without a trace in their pixels. media: (the first place in
    token_ids, its key) of each item, in order. A block's key covers the items that begin in it, and by the chain those before."""
    at = 0
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        end = start + block_size
        digest = hashlib.blake2b(parent, digest_size=SIZE)
        digest.update(token_ids[start:end].tobytes())
        digest.update(positions[:, start:end].tobytes())
        while at < len(media) and media[at][0] < end:
            digest.update(f"\0{media[at][0] - start}\0".encode() + media[at][1])
            at += 1
        parent = digest.digest()
        yield parent
