"""Rungs that waste least: which sizes to compile, and how many graphs each program gets, both exact by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FAR = 2**62  # more rows than any trace runs, and int64 has room above it


def choose(sizes: Sequence[int], num_rungs: int) -> tuple[int, ...]:
    """The rungs of least padding, num_rungs of the sizes with the largest among them; all of them where they are fewer."""
    return choices(sizes, num_rungs)[-1]


def choices(sizes: Sequence[int], max_rungs: int, *, most: int = 0) -> list[tuple[int, ...]]:
    """The rungs of least padding for 1, 2, ... up to max_rungs of them, or as many as there are distinct sizes.

    sizes: of every step of a trace, 1 or more of them. most: a size that must be covered too, though no step has it. With n distinct
    sizes it takes O(n² · max_rungs): two seconds for 4096 and 48, on one core."""
    distinct, counts = np.unique(np.asarray(sizes, dtype=np.int64), return_counts=True)
    if most > distinct[-1]:
        distinct, counts = np.append(distinct, most), np.append(counts, 0)
    num_rungs, num_sizes = min(max_rungs, len(distinct)), len(distinct)
    num_steps = np.concatenate(([0], counts.cumsum()))  # num_steps[j]: of the first j sizes
    # rows[k, j]: the least that runs, padding included, for the first j sizes with k rungs, the last of them size j − 1.
    # The rung before is that of the first i sizes, i < j, so rows[k, j] = min over i of rows[k − 1, i] + the steps between · size.
    rows = np.full((num_rungs + 1, num_sizes + 1), FAR, dtype=np.int64)
    rows[0, 0] = 0
    before = np.zeros(rows.shape, dtype=np.int64)
    for j, size in enumerate(distinct, start=1):
        options = rows[:-1, :j] - num_steps[:j] * size
        before[1:, j] = options.argmin(axis=1)
        rows[1:, j] = options[np.arange(num_rungs), before[1:, j]] + num_steps[j] * size

    def rungs(k: int) -> tuple[int, ...]:
        found, j = [], num_sizes
        for left in range(k, 0, -1):
            found.append(int(distinct[j - 1]))
            j = before[left, j]
        return tuple(reversed(found))

    return [rungs(k) for k in range(1, num_rungs + 1)]


def rows_run(rungs: Sequence[int], sizes: Sequence[int]) -> int:
    """The sum of the sizes, each padded to the smallest rung that covers it; the last rung covers all."""
    return int(np.asarray(rungs, dtype=np.int64)[np.searchsorted(rungs, sizes)].sum())


def padding_share(rungs: Sequence[int], sizes: Sequence[int]) -> float:
    """The share of what runs that is padding, 0 to 1."""
    return 1 - sum(sizes) / rows_run(rungs, sizes)


def divide(costs: Sequence[Sequence[float]], num_graphs: int) -> tuple[int, ...]:
    """How many graphs each program gets, at least one each and num_graphs at most in all, so that the costs sum to the least.

    costs[p][k − 1] is the cost of program p with k graphs. Of divisions that cost the same, one of the fewest graphs. num_graphs must be
    len(costs) or more."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0, ())}  # graphs given so far → (cost, how they were divided)
    for row in costs:
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for given, (total, division) in best.items():
            for k, cost in enumerate(row[: num_graphs - given], start=1):
                option = (total + cost, (*division, k))
                longer[given + k] = min(option, longer.get(given + k, option))
        best = longer
    cheapest = min(best, key=lambda given: (best[given][0], given))
    return best[cheapest][1]


def fewest(shares: Sequence[Sequence[float]], max_share: float) -> tuple[int, ...] | None:
    """The fewest graphs of each program whose padding share is at most max_share; None where one has no such number.

    shares[p][k − 1] is the share of program p with k graphs, and falls with k."""
    found = [next((k for k, share in enumerate(row, start=1) if share <= max_share), None) for row in shares]
    enough = tuple(k for k in found if k is not None)
    return enough if len(enough) == len(shares) else None


def least_share(shares: Sequence[Sequence[float]], num_graphs: int) -> float:
    """The least max_share for which `fewest` finds num_graphs or less. num_graphs must be len(shares) or more."""
    reached = 1.0
    for share in sorted({share for row in shares for share in row}, reverse=True):
        division = fewest(shares, share)
        if division is None or sum(division) > num_graphs:
            break
        reached = share
    return reached
