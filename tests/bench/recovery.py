"""Seconds from SIGKILL of a worker or a conductor to the takeover of what it held, with the default lease and scan.

Two of each run; the one that holds a job or a step is killed at a random moment of its renewals. The database's clock tells
when the other one claimed.
"""
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from table import Row, main

sys.path[:0] = [str(Path(__file__).parents[1] / "faults")]
from world import World, wait_for

from myspinbot.core import Settings

CFG = Settings()
ROUNDS = 3


def taken_over(w: World, job: str, key: str, since: float) -> float:
    "Seconds from a moment to the first claim after it, of a step or (with an empty key) of a job."
    def claimed() -> float | None:
        found = [e.at for e in w.client.journal.events(job) if e.key == key and e.body["status"] == "running" and e.at > since]
        return found[0] if found else None
    return wait_for("a takeover", claimed, 3 * CFG.lease_s) - since


def recovery(seed: int, names: tuple[str, ...], n: int, key: str, holder: Callable[[World, str], str]) -> float:
    "Kill who holds a job's step or (with an empty key) the job, at a moment that the seed chooses."
    with World(seed, lease_s=CFG.lease_s, scan_s=CFG.scan_s) as w:
        w.start(*names)
        gate = w.home / "gate"
        job = w.submit(w.chain(n, gate=str(gate)))
        w.at_work(job, "s0")
        time.sleep(random.Random(seed).uniform(0, CFG.lease_s / 3))
        took = taken_over(w, job, key, w.kill(holder(w, job)))
        gate.touch()
        w.quiet()
        return took


def worker(seed: int) -> float:
    return recovery(seed, ("control", "w1", "w2"), 1, "s0", lambda w, job: w.row(job, "s0").worker)


def conductor(seed: int) -> float:
    def holder(w: World, job: str) -> str:
        pid = w.client.job(job).owner.rpartition(":")[2]
        return next(n for n, p in w.procs.items() if str(p.pid) == pid)
    return recovery(seed, ("control", "control2", "w1"), 2, "", holder)


def rows() -> list[Row]:
    note = f"lease {CFG.lease_s:g} s, scan {CFG.scan_s:g} s, two of each running"
    measure = lambda fn: [fn(seed) for seed in range(ROUNDS)]
    return [Row(f"recovery after SIGKILL of a {fn.__name__}", measure(fn), "s", CFG.lease_s + 2, note=note)
            for fn in (worker, conductor)]


if __name__ == "__main__": main(rows)
