"""`make faults`: every fault with a list of seeds, then one table; a seed that fails is replayed with the line it prints.

    python tests/faults/run.py                         # all faults, the default seeds
    python tests/faults/run.py --seeds 7 --only "worker after claim"
    python tests/faults/run.py --short                 # what `make test` runs
    python tests/faults/run.py --server redis --only Redis    # on the old Redis in place of Valkey
"""
import argparse
import json
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from world import SERVERS, Report, World

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Fault:
    "One row of the table."
    name: str
    scenario: Callable[[World, random.Random], Any]
    short: bool               # part of `make test`?
    options: dict[str, Any]   # for `World`
    world: Callable[..., Any] = World  # what makes it


FAULTS: dict[str, Fault] = {}


def fault(name: str, short: bool = False, world: Callable[..., Any] = World, **options: Any) -> Callable:
    "Register a scenario: a function of a world and a seeded random generator."
    def add(fn: Callable) -> Callable:
        if name in FAULTS: raise ValueError(f"two faults are named {name!r}")
        FAULTS[name] = Fault(name, fn, short, options, world)
        return fn
    return add


def load() -> dict[str, Fault]:
    "All faults: those of each `faults_*.py` here."
    sys.modules["run"] = sys.modules[__name__]  # the scenarios register with this module, also when it is `__main__`
    for p in sorted(HERE.glob("faults_*.py")): import_module(p.stem)
    return FAULTS


def run_one(f: Fault, seed: int, server: str = "valkey") -> Report:
    "One world, one scenario, the invariants; never raises."
    report, began = Report(f.name, seed), time.monotonic()
    try:
        with f.world(seed, report=report, server=server, **f.options) as w:
            f.scenario(w, w.rng)
            w.settle()
    except Exception as e:
        traceback.print_exc()
        report.violations.append(f"{type(e).__name__}: {str(e)[:3000]}")
    report.seconds = time.monotonic() - began
    return report


def run_named(name: str, seed: int, server: str) -> Report: return run_one(load()[name], seed, server)


def show(reports: list[Report]) -> None:
    "The table: fault, runs, kills, lost, duplicate effects, recovery."
    from rich.console import Console
    from rich.table import Table
    title = f"{len(reports)} runs, {sum(r.seconds for r in reports):.0f} s, load {os.getloadavg()[0]:.1f}"
    t = Table(title=title, title_justify="left")
    for head in ("fault", "runs", "kills", "lost", "duplicate effects", "recovery p50", "max", "violations"):
        t.add_column(head, justify="left" if head == "fault" else "right")
    for name in dict.fromkeys(r.fault for r in reports):
        mine = [r for r in reports if r.fault == name]
        took = [s for r in mine for s in r.recovery_s]
        t.add_row(name, str(len(mine)), str(sum(r.kills for r in mine)), str(sum(r.lost for r in mine)),
                  str(sum(r.duplicates for r in mine)), f"{statistics.median(took):.1f} s" if took else "",
                  f"{max(took):.1f} s" if took else "", str(sum(bool(r.violations) for r in mine) or ""))
    Console(width=None if sys.stdout.isatty() else 160).print(t)


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    ap.add_argument("--only", default="", help="faults whose name holds this text")
    ap.add_argument("--short", action="store_true")
    ap.add_argument("--server", default="valkey", choices=SERVERS)
    ap.add_argument("--json", type=Path, help="also write the reports there")
    ap.add_argument("--at-once", type=int, default=3, help="worlds at once; most of a scenario is waiting")
    a = ap.parse_args()
    chosen = [f for f in load().values() if a.only in f.name and (f.short or not a.short)]
    if not chosen:
        print(f"No fault is named like {a.only!r}. There are: {', '.join(FAULTS)}.")
        return 2
    runs = [(f.name, seed, a.server) for f in chosen for seed in map(int, a.seeds.split(","))]
    reports = []
    with ProcessPoolExecutor(a.at_once, mp_context=get_context("spawn")) as pool:
        for r in pool.map(run_named, *zip(*runs, strict=True)):
            reports.append(r)
            print(f"{'FAILED' if r.violations else 'ok':6} {r.fault}, seed {r.seed}, {r.seconds:.0f} s", flush=True)
            for v in r.violations: print(f"       {v}")
            if r.violations:
                again = f'--server {a.server} --only "{r.fault}" --seeds {r.seed}'
                print(f"       replay: python tests/faults/run.py {again}", flush=True)
    show(reports)
    if a.json: a.json.write_text(json.dumps([asdict(r) for r in reports], indent=1))
    return int(any(r.violations for r in reports))


if __name__ == "__main__": sys.exit(main())
