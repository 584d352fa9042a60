"""Ladders: sizes that grow evenly, for plans that know nothing of what will come."""

from __future__ import annotations

import math
from collections.abc import Collection

from vlmfx.compile.buckets import MAX_GRAPHS, Plan, check_program, check_size
from vlmfx.errors import PlanError

GENERATE, EMBED = ("encode", "prefill", "decode"), ("encode", "pool")
SQRT2 = 2**0.5
MAX_PATCHES = {"cpu": 4096, "cuda": 16384}  # of the images of a step, by device, where nobody says; others as CUDA
LEAST_PATCHES, LEAST_TOKENS = 64, 16
TOKEN_MULTIPLE = 16  # rows of the smallest tile of a matrix unit


def ladder(least: int, most: int, *, ratio: float = SQRT2, multiple: int = 1) -> tuple[int, ...]:
    """Sizes from the first that covers least to the first that covers most, in even steps of at most ratio, then rounded up to multiples.

    Each is below ratio times the one before plus a multiple. Raises PlanError."""
    for name, size in (("least", least), ("most", most), ("multiple", multiple)):
        check_size(f"ladder: {name}", size)
    if least > most or not ratio > 1:
        raise PlanError(f"ladder: from {least} to {most} by {ratio:g} is none; use least ≤ most and a ratio above 1.")
    # Without the slack, rounding errors put powers of two on the next multiple.
    num_steps = math.ceil(math.log(most / least) / math.log(ratio) - 1e-9)
    sizes = [least * (most / least) ** (step / max(num_steps, 1)) for step in range(num_steps + 1)]
    return tuple(dict.fromkeys(math.ceil(size / multiple * (1 - 1e-12)) * multiple for size in sizes))


def default_plan(
    *,
    max_num_seqs: int = 128,
    max_num_batched_tokens: int = 8192,
    max_patches: int = 16384,
    patch_multiple: int = 4,
    max_segments: int = 64,
    max_graphs: int = MAX_GRAPHS,
    programs: Collection[str] = GENERATE,
) -> Plan:
    """Ladders that grow by √2, or by as much more as it takes for max_graphs to hold them; () for what is not in programs.

    patch_multiple: the patches of a merged patch, or of a crop where a tower takes whole crops. Raises PlanError."""
    sizes = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens, "max_patches": max_patches}
    for name, size in (sizes | {"patch_multiple": patch_multiple, "max_graphs": max_graphs}).items():
        check_size(f"plan: {name}", size)
    for program in programs:
        check_program(program)
    ratio = SQRT2
    while True:
        tokens = _from(LEAST_TOKENS, max_num_batched_tokens, ratio, TOKEN_MULTIPLE)
        patches = _from(LEAST_PATCHES, max_patches, ratio, patch_multiple)
        ladders = {"encode": patches, "prefill": tokens, "decode": decode_ladder(max_num_seqs, ratio), "pool": tokens}
        chosen = {program: ladders[program] for program in programs}
        num_graphs = sum(map(len, chosen.values()))
        if num_graphs <= max_graphs:
            return Plan(**chosen, max_segments=max_segments, max_seqs=max_num_seqs, max_graphs=max_graphs)
        if ratio > max(sizes.values()):  # each ladder has its ends only
            raise PlanError(
                f"plan: max_graphs is {max_graphs}, but the coarsest ladders have {num_graphs} rungs; raise it to that."
            )
        ratio **= 1.1


def decode_ladder(most: int, ratio: float = SQRT2) -> tuple[int, ...]:
    """Numbers of sequences up to most: 1, 2, 4, then multiples of 8 in steps of at most ratio."""
    small = tuple(size for size in (1, 2, 4) if size < most)
    return (*small, *(ladder(8, most, ratio=ratio, multiple=8) if most > 8 else (most,)))


def _from(least: int, most: int, ratio: float, multiple: int) -> tuple[int, ...]:
    return ladder(min(least, most), most, ratio=ratio, multiple=multiple)
