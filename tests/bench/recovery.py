"""Seconds from SIGKILL of a worker or a conductor to the takeover of what it held, with the default lease and scan.

Two of each run; the one that holds a job or a step is killed at a random moment of its renewals. The database's clock tells
when the other one claimed.
"""
import random
import sys
import time
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


def worker(seed: int) -> float:
    with World(seed, lease_s=CFG.lease_s, scan_s=CFG.scan_s) as w:
        w.start("control", "w1", "w2")
        gate = w.home / "gate"
        job = w.submit(w.chain(1, gate=str(gate)))
        w.at_work(job, "s0")
        time.sleep(random.Random(seed).uniform(0, CFG.lease_s / 3))
        took = taken_over(w, job, "s0", w.kill(w.row(job, "s0").worker))
        gate.touch()
        w.quiet()
        return took


def conductor(seed: int) -> float:
    with World(seed, lease_s=CFG.lease_s, scan_s=CFG.scan_s) as w:
        w.start("control", "control2", "w1")
        gate = w.home / "gate"
        job = w.submit(w.chain(2, gate=str(gate)))
        w.at_work(job, "s0")
        time.sleep(random.Random(seed).uniform(0, CFG.lease_s / 3))
        pid = w.client.job(job).owner.rpartition(":")[2]
        took = taken_over(w, job, "", w.kill(next(n for n, p in w.procs.items() if str(p.pid) == pid)))
        gate.touch()
        w.quiet()
        return took


def rows() -> list[Row]:
    note = f"lease {CFG.lease_s:g} s, scan {CFG.scan_s:g} s, two of each running"
    measure = lambda fn: [fn(seed) for seed in range(ROUNDS)]
    return [Row(f"recovery after SIGKILL of a {fn.__name__}", measure(fn), "s", CFG.lease_s + 2, note=note)
            for fn in (worker, conductor)]


if __name__ == "__main__": main(rows)
