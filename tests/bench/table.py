"""Rows of the benchmark table: medians with their spread, the figure to reach, and the machine's load beside them.

Every other file in this folder measures one part: it has `rows() -> list[Row]` and ends in `table.main(rows)`. Run one alone
(`python tests/bench/engine.py`), or all of them with `make bench`, which puts the rows of all parts into one table.
"""
import json
import operator
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Row:
    "One line of the table."
    what: str                                            # what was measured, and how
    samples: list[float]                                 # one value for each run
    unit: str = "ms"
    reach: float | None = None                           # the figure to reach; None: shown for comparison only
    more: bool = False                                   # is more better, as with rates?
    note: str = ""                                       # such as what was compared, in the same run
    load: list[float] = field(default_factory=lambda: [round(o, 1) for o in os.getloadavg()[:2]])

    @property
    def median(self) -> float: return statistics.median(self.samples)

    @property
    def reached(self) -> bool | None:
        if self.reach is None: return None
        return (operator.ge if self.more else operator.le)(self.median, self.reach)


def number(value: float) -> str:
    "Three significant digits, thousands kept whole."
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percentile(samples: Sequence[float], q: float) -> float:
    "The q-quantile (0..1) as the nearest sample above."
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def show(rows: Sequence[Row], title: str = "") -> None:
    "Print a table."
    from rich.console import Console
    from rich.table import Table
    t = Table(title=title or None, title_justify="left")
    for head, side in (("what", "left"), ("median", "right"), ("spread", "right"), ("runs", "right"), ("to reach", "right"),
                       ("", "left"), ("load", "right"), ("note", "left")): t.add_column(head, justify=side, overflow="fold")
    for r in rows:
        mark = {True: "yes", False: "NO", None: ""}[r.reached]
        goal = "" if r.reach is None else f"{'>=' if r.more else '<='} {number(r.reach)}"
        spread = f"{number(min(r.samples))} .. {number(max(r.samples))}" if len(r.samples) > 1 else ""
        t.add_row(r.what, f"{number(r.median)} {r.unit}", spread, str(len(r.samples)), goal, mark, number(r.load[0]), r.note)
    Console(width=None if sys.stdout.isatty() else 180).print(t)


def main(rows: Callable[[], list[Row]]) -> None:
    "Measure and print; with `--json FILE` also write the rows there."
    found = rows()
    show(found)
    if "--json" in sys.argv: Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps([asdict(r) for r in found]))
