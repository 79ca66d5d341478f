"""A no-op step on a warm worker, from claim to commit, beside papermill's own engine on the same notebook in the same run.

The worker is a process of its own on a real Redis (AOF), PostgreSQL and a local store, with its heartbeat and cancel
listener running; it notes the time before `claim_step` and after `commit_step`. Each round runs papermill once, then
steps one after another, each sent when the one before is done. Last comes what a worker does when many steps wait.
"""
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from myspinbot.catalogue import Catalogue
from myspinbot.client import Client
from myspinbot.core import Settings
from myspinbot.embedded import Embedded
from myspinbot.schema import Graph, StepMessage, StepRow
from table import Row, main

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "ok_three_cells.ipynb"
ROUNDS, STEPS, WAITING = 7, 40, 100


def worker(out: str) -> None:
    "A worker that writes a line for each step: key and milliseconds from claim to commit."
    from myspinbot.journal import Journal
    from myspinbot.worker import Worker
    claimed: dict[str, float] = {}

    class Timed(Journal):
        def claim_step(self, job: str, key: str, *args: Any, **kw: Any) -> Any:
            claimed[key] = time.perf_counter()
            return super().claim_step(job, key, *args, **kw)

        def commit_step(self, job: str, key: str, *args: Any, **kw: Any) -> bool:
            done = super().commit_step(job, key, *args, **kw)
            with open(out, "a") as f: f.write(f"{key} {1000 * (time.perf_counter() - claimed.pop(key))}\n")
            return done

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with Client() as c:
        Worker(Timed(c.cfg.postgres_url), c.bridge, c.events, c.store, c.catalogue, "bench:0", c.cfg).run(stop)


@contextmanager
def installation(**settings: Any) -> Iterator[tuple[Client, dict[str, str], Path]]:
    "Servers of its own in a temporary folder, with one step notebook; client, environment and folder."
    with tempfile.TemporaryDirectory(prefix="spinb", ignore_cleanup_errors=True) as name:
        home = Path(name)
        steps = home / "pipelines" / "steps"
        steps.mkdir(parents=True)
        (steps / "toy_ok_three_cells.ipynb").write_text(NOTEBOOK.read_text())
        servers = Embedded(home)
        urls = servers.start()
        settings |= dict(redis_url=urls.redis_url, postgres_url=urls.postgres_url, pipelines_dir=str(steps.parent))
        env = os.environ | dict(SPIN_HOME=name) | {f"SPIN_{k.upper()}": str(v) for k, v in settings.items()}
        try:
            with Client(Settings(home=home, **settings), Catalogue(steps.parent)) as c: yield c, env, home
        finally: servers.stop()


class Sender:
    "Queues no-op steps of one job, as a conductor does, and waits for them."
    def __init__(self, client: Client):
        self.client, self.spec, self.keys = client, client.catalogue.step("toy.ok_three_cells"), itertools.count()
        client.journal.submit(Graph(name="bench"), {})
        [self.job] = client.journal.lease_jobs("bench", 600, 1)
        self.done, self.stop = set(), threading.Event()
        self.changed = threading.Condition()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        for hint in self.client.bridge.follow_done(self.stop):
            with self.changed:
                self.done.add(hint["key"])
                self.changed.notify_all()

    def send(self, count: int) -> list[str]:
        keys, j = [f"n{next(self.keys)}" for _ in range(count)], self.client.journal
        for k in keys:
            j.queue_step(self.job.id, self.job.epoch, StepRow(job=self.job.id, key=k, node=k, step=self.spec.id,
                                                              source_hash=self.spec.source_hash))
        ids = self.client.bridge.publish_many([("cpu", "normal", StepMessage(job=self.job.id, key=k)) for k in keys])
        j.mark_published([(self.job.id, k, id) for k, id in zip(keys, ids, strict=True)])
        return keys

    def wait(self, keys: list[str], timeout_s: float = 60.0) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.done.issuperset(keys), timeout_s):
                raise TimeoutError(f"not done in {timeout_s:g} s: {sorted(set(keys) - self.done)[:3]}")

    def run(self, count: int) -> list[str]:
        "One after another."
        keys = []
        for _ in range(count):
            keys += self.send(1)
            self.wait(keys[-1:])
        return keys


def papermill(folder: Path) -> float:
    "Milliseconds of papermill with its own engine."
    from papermill import execute_notebook
    began = time.perf_counter()
    execute_notebook(str(NOTEBOOK), str(folder / "theirs.ipynb"), progress_bar=False)
    return 1000 * (time.perf_counter() - began)


def times(out: Path) -> dict[str, float]: return {k: float(ms) for k, ms in map(str.split, out.read_text().splitlines())}


def rows() -> list[Row]:
    "Measure."
    with installation(slots=2) as (client, env, home):
        out = home / "times"
        out.touch()
        p = subprocess.Popen([sys.executable, __file__, "--worker", str(out)], env=env, stderr=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL)
        try:
            sender, theirs, rounds = Sender(client), [], []
            sender.run(20)
            papermill(home)
            for _ in range(ROUNDS):
                theirs.append(papermill(home))
                rounds.append(sender.run(STEPS))
            began = time.perf_counter()
            sender.wait(sender.send(WAITING))
            rate = WAITING / (time.perf_counter() - began)
            ms = times(out)
        finally:
            sender.stop.set()
            p.terminate()
            p.wait(30)
    ours = [statistics.median(ms[k] for k in keys) for keys in rounds]
    every = sorted(ms[k] for keys in rounds for k in keys)
    note = f"p95 {every[int(0.95 * len(every))]:.1f} ms of {len(every)} steps"
    return [Row("three-cell no-op step, warm worker, claim to commit: p50 of a round", ours, "ms", 25, note=note),
            Row("the same notebook, papermill's own engine", theirs, "ms"),
            Row("papermill's time over ours", [a / b for a, b in zip(theirs, ours, strict=True)], "x", 80, more=True),
            Row("no-op steps through one worker of 2 slots, many waiting", [rate], "steps/s", more=True)]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]: worker(sys.argv[2])
    else: main(rows)
