"""In every op test torch.empty is full of NaN (of the largest integer, where it holds integers), so that what a kernel leaves
unwritten shows."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _uninitialized_memory_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
