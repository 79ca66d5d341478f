"""A process of ours that ends by SIGKILL at a named point: `python victim.py POINT NTH worker --name w1`.

Product code has no hooks for this: the point is a call of the product's own, and the process dies right before or right after
its n-th time with an answer that matters. What stands between two calls is covered by the points on both sides of it.
"""
import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

# point -> module, class, method, die before or after the call
POINTS: dict[str, tuple[str, str, str, str]] = {
    "client before commit": ("journal", "Journal", "submit", "before"),
    "client after commit": ("journal", "Journal", "submit", "after"),
    "conductor after lease": ("journal", "Journal", "lease_jobs", "after"),
    "conductor before publish": ("bridge", "Bridge", "publish", "before"),
    "conductor after publish": ("bridge", "Bridge", "publish", "after"),
    "conductor after mark": ("attempts", "Attempts", "mark_published", "after"),
    "conductor before end": ("journal", "Journal", "finish_job", "before"),
    "conductor after end": ("journal", "Journal", "finish_job", "after"),
    "reconciler after requeue": ("attempts", "Attempts", "requeue_expired", "after"),
    "reconciler after publish": ("bridge", "Bridge", "publish_many", "after"),
    "worker after read": ("bridge", "Bridge", "read", "after"),
    "worker after claim": ("attempts", "Attempts", "claim_step", "after"),
    "worker before put": ("artifacts", "LocalStore", "put_stream", "before"),
    "worker after put": ("executor", "Executor", "run", "after"),
    "worker after commit": ("attempts", "Attempts", "commit_step", "after"),
    "worker before acknowledge": ("bridge", "Bridge", "finish", "before"),
    "worker after acknowledge": ("bridge", "Bridge", "finish", "after"),
}


def dying(method: Callable, when: str, nth: int) -> Callable:
    "The method, which takes the process with it at its n-th call (before), or at its n-th answer that holds something."
    left = [nth]
    def die() -> None:
        left[0] -= 1
        if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
    @wraps(method)
    def call(*args: Any, **kw: Any) -> Any:
        if when == "before": die()
        answer = method(*args, **kw)
        if when == "after" and answer: die()
        return answer
    return call


def arm(point: str, nth: int) -> None:
    "Make this process die at a point."
    module, owner, name, when = POINTS[point]
    cls = getattr(import_module(f"myspinbot.{module}"), owner)
    import_module("myspinbot.journal")  # its base class is patched before it is used
    setattr(cls, name, dying(getattr(cls, name), when, nth))


if __name__ == "__main__":
    point, nth = sys.argv[1], int(sys.argv[2])
    sys.argv = ["myspinbot", *sys.argv[3:]]
    arm(point, nth)
    from myspinbot.cli import main
    main()
