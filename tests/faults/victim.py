"""A process of ours that ends by SIGKILL at a named point: `python victim.py POINT NTH worker --name w1`.

Product code has no hooks for this: the point is a call of the product's own, and the process dies right before or right after
its n-th time with something in it. What stands between two calls is covered by the points on both sides of it. A point that
starts with `raise:` fails with an exception that nobody expects there, from the n-th time on, instead of killing; one that
starts with `hang:` never returns.
"""
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

# point -> module, class, method, when; a reconciler's points count only inside `Conductor.reconcile`, the conductor's outside it
POINTS: dict[str, tuple[str, str, str, str]] = {
    "client before commit": ("journal", "Journal", "submit", "before"),
    "client after commit": ("journal", "Journal", "submit", "after"),
    "conductor after lease": ("journal", "Journal", "lease_jobs", "after"),
    "conductor before publish": ("bridge", "Bridge", "publish_many", "before"),
    "conductor after publish": ("bridge", "Bridge", "publish_many", "after"),
    "conductor after mark": ("attempts", "Attempts", "mark_published", "after"),
    "conductor before end": ("journal", "Journal", "finish_jobs", "before"),
    "conductor after end": ("journal", "Journal", "finish_jobs", "after"),
    "reconciler after requeue": ("attempts", "Attempts", "requeue_expired", "after"),
    "reconciler before publish": ("bridge", "Bridge", "publish_many", "before"),
    "reconciler after publish": ("bridge", "Bridge", "publish_many", "after"),
    "worker after read": ("bridge", "Bridge", "read", "after"),
    "worker after claim": ("attempts", "Attempts", "claim_step", "after"),
    "worker before put": ("artifacts", "LocalStore", "put_stream", "before"),
    "worker after put": ("executor", "Executor", "run", "after"),
    "worker after commit": ("attempts", "Attempts", "commit_step", "after"),
    "worker before acknowledge": ("bridge", "Bridge", "finish", "before"),
    "worker after acknowledge": ("bridge", "Bridge", "finish", "after"),
    "hang: read": ("bridge", "Bridge", "read", "before"),
    "raise: heartbeat": ("attempts", "Attempts", "renew_steps", "before"),
    "raise: leases": ("journal", "Journal", "renew_jobs", "before"),
}
reconciling = threading.local()


def dying(method: Callable, point: str, when: str, nth: int) -> Callable:
    "The method, which takes the process with it (or raises) at its n-th call with something in it, or n-th such answer."
    left = [nth]
    def die() -> None:
        if point.startswith(("reconciler", "conductor")) and point.startswith("reconciler") != getattr(reconciling, "now", False):
            return
        left[0] -= 1
        if left[0] <= 0 and point.startswith("hang:"): threading.Event().wait()
        if left[0] <= 0 and point.startswith("raise:"): raise RuntimeError(f"a test makes the {point[7:]} fail")
        if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
    @wraps(method)
    def call(*args: Any, **kw: Any) -> Any:
        if when == "before" and (len(args) < 2 or args[1]): die()
        answer = method(*args, **kw)
        if when == "after" and answer: die()
        return answer
    return call


def arm(point: str, nth: int) -> None:
    "Make this process die at a point."
    module, owner, name, when = POINTS[point]
    cls = getattr(import_module(f"myspinbot.{module}"), owner)
    setattr(cls, name, dying(getattr(cls, name), point, when, nth))
    from myspinbot.jobs.conductor import Conductor
    inner = Conductor.reconcile
    def reconcile(self: Conductor) -> int:
        reconciling.now = True
        try: return inner(self)
        finally: reconciling.now = False
    Conductor.reconcile = reconcile


if __name__ == "__main__":
    point, nth = sys.argv[1], int(sys.argv[2])
    sys.argv = ["myspinbot", *sys.argv[3:]]
    arm(point, nth)
    from myspinbot.cli.app import main
    main()
