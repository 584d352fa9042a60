"""What `vlmfx plan` prints: a plan beside the default one, by program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmfx.compile.buckets import UNITS, Plan

HEAD = ("program", "requests", "graphs", "(default)", "padding", "(default)", "compile")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One program: its requests, its graphs and their compile seconds, and the share of what it runs that is padding.

    default_graphs and default_share are those of the default plan. Shares are None where the sizes of steps are not known."""

    program: str
    num_requests: int
    num_graphs: int
    default_graphs: int
    share: float | None
    default_share: float | None
    compile_s: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A plan and a row for each of its programs; as text, a table, the rungs, and what the numbers mean."""

    plan: Plan
    rows: Sequence[Row]

    def __str__(self) -> str:
        table = [HEAD, *map(_cells, self.rows), self._total()]
        lines = [f"{name:<8}" + "".join(f"{cell:>10}" for cell in cells) for name, *cells in table]
        for program in (row.program for row in self.rows):
            rungs = " ".join(map(str, self.plan.rungs(program)))
            lines.append(f"\n{program}, {UNITS[program]}: {rungs}")
        lines.append(
            "\nPadding is the share of what runs, each request in steps of its own; compile is time on one core, summed over graphs."
        )
        if self.plan.decode:
            lines.append(
                "A trace does not tell how many sequences decode together: decode has the default ladder, "
                f"up to {self.plan.decode[-1]} (--max-num-seqs)."
            )
        if not self.plan.encode:
            lines.append("No request of the trace has images, so the plan has no bucket for any; add one that has.")
        return "\n".join(lines)

    def _total(self) -> tuple[str, ...]:
        graphs, default_graphs = self.plan.num_graphs, sum(row.default_graphs for row in self.rows)
        return "all", "", str(graphs), str(default_graphs), "", "", f"{sum(row.compile_s for row in self.rows):.0f} s"


def _cells(row: Row) -> tuple[str, ...]:
    counts = map(str, (row.num_requests, row.num_graphs, row.default_graphs))
    shares = ("–" if share is None else f"{share:.1%}" for share in (row.share, row.default_share))
    return row.program, *counts, *shares, f"{row.compile_s:.0f} s"
