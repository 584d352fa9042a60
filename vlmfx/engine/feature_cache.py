"""FeatureCache: the feature rows of encoded images and videos by content, so that many questions about one encode it once."""

from __future__ import annotations

from collections import Counter

from torch import Tensor


class FeatureCache:
    """Rows by key, at most max_bytes of them beside those that are pinned; what was used longest ago goes first.

    An item is pinned by each sequence that has yet to read it, from before it is encoded on."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._rows: dict[bytes, Tensor] = {}  # the one used last is the last
        self._pins: Counter[bytes] = Counter()

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_pinned(self) -> int:
        return len(self._pins)

    def pin(self, key: bytes) -> None:
        self._pins[key] += 1

    def unpin(self, key: bytes) -> None:
        self._pins[key] -= 1
        assert self._pins[key] >= 0, "an item was unpinned that was not pinned"
        if not self._pins[key]:
            del self._pins[key]
            self._shrink()

    def put(self, key: bytes, rows: Tensor) -> None:
        """Keep the rows of a pinned item; they must have memory of their own."""
        if key not in self._rows:
            self.num_bytes += rows.nbytes
        self._rows[key] = rows
        self._shrink()

    def get(self, key: bytes) -> Tensor:
        """The rows (n, width) of an item that is there."""
        rows = self._rows[key] = self._rows.pop(key)
        return rows

    def clear(self) -> None:
        """Forget all that is not pinned."""
        self._drop([key for key in self._rows if key not in self._pins])

    def _shrink(self) -> None:
        excess = self.num_bytes - self.max_bytes
        gone = []
        for key, rows in self._rows.items():
            if excess <= 0:
                break
            if key not in self._pins:
                gone.append(key)
                excess -= rows.nbytes
        self._drop(gone)

    def _drop(self, keys: list[bytes]) -> None:
        for key in keys:
            self.num_bytes -= self._rows.pop(key).nbytes
