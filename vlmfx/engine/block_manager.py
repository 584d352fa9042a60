"""BlockManager: which blocks of the paged KV cache are held, by how many sequences, and what those that are free still hold.

Plain Python, no tensors. After vllm-project/vllm: vllm/v1/core/block_pool.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice


class BlockManager:
    """num_blocks blocks, numbered from 0, each held by any number of sequences.

    A block whose content has a key (see `vlmfx.engine.prefix`) keeps it after it is free, until it is given out anew: the one that has
    been free for longest first. caches_prefixes: whether keys are kept at all."""

    def __init__(self, num_blocks: int, *, caches_prefixes: bool = True) -> None:
        self.num_blocks, self.caches_prefixes = num_blocks, caches_prefixes
        self._holders = [0] * num_blocks
        self._free = dict.fromkeys(range(num_blocks))  # in the order in which they are given out
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, those with a key among them."""
        return len(self._free)

    def holders(self, block: int) -> int:
        """How many sequences hold it."""
        return self._holders[block]

    def lookup(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest beginning of keys that are there, held or free. Nothing is taken."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def has_room(self, count: int, shared: Sequence[int] = ()) -> bool:
        """Whether `share(shared)` and then `allocate(count)` would do."""
        return count + sum(not self._holders[block] for block in shared) <= len(self._free)

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks that are found or held already once more."""
        for block in blocks:
            self._holders[block] += 1
            self._free.pop(block, None)

    def allocate(self, count: int) -> list[int]:
        """Hold `count` free blocks, of which at least as many must be there."""
        assert count <= len(self._free), "allocate without room: ask has_room first"
        blocks = list(islice(self._free, count))
        for block in blocks:
            del self._free[block]
            self._holders[block] = 1
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Say what a held block holds. Where another block has that key already, it stays the one that is found."""
        if self.caches_prefixes and block not in self._key_of and key not in self._block_of:
            self._key_of[block], self._block_of[key] = key, block

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks, in its order: its last ones are given out first, as others rarely begin like that."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            assert self._holders[block] >= 0, "a block was released that nobody held"
            if not self._holders[block]:
                self._free[block] = None

    def reset(self) -> bool:
        """Forget all keys; False, and nothing is done, while blocks are held."""
        if len(self._free) < self.num_blocks:
            return False
        self._key_of.clear()
        self._block_of.clear()
        return True
