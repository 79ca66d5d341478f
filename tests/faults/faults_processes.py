"""Processes of ours that die, freeze, or are told to stop."""
import random

from run import fault
from victim import POINTS
from world import World


def killed_at(point: str) -> None:
    "A worker (or its conductor) dies at a named point while it runs a job; another one takes over."
    role = point.split(maxsplit=1)[0]

    @fault(f"SIGKILL: {point}", short=point in ("worker after claim", "worker after commit", "conductor before publish"))
    def scenario(w: World, rng: random.Random) -> None:
        if role == "worker":
            w.start("control")
            w.start_victim("w1", point, rng.randint(1, 3))
        else:
            w.start_victim("control", point, rng.randint(1, 3))
            w.start("w1")
        for _ in range(3): w.submit(w.chain(2))
        at = w.died("w1" if role == "worker" else "control")
        w.start("w2" if role == "worker" else "control2")
        before = {(j, r.key): r.started_at for j in w.accepted for r in w.client.steps(j) if r.status == "succeeded"}
        w.quiet()
        ended = [e.at for j in w.accepted for e in w.client.journal.events(j)]
        w.report.recovery_s.append(max(ended) - at)
        for (j, key), started in before.items():
            if w.row(j, key).started_at != started: w.violate(f"step {key} of {j} ran again after its commit")


for _point in POINTS:
    if _point.split()[0] in ("worker", "conductor"): killed_at(_point)
