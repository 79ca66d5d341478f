"""A no-op step, from claim to commit, in a pristine and in a resident kernel, beside papermill's own engine in the same run.

The worker is a process of its own on a real Redis (AOF), PostgreSQL and a local store, with its heartbeat and cancel
listener running; it notes the time before `claim_step` and after `commit_step`. Each round runs papermill once, then steps
one after another: pristine ones with a pause in which the worker can fork a spare kernel, resident ones without. Last come
what a worker does when many steps wait, and what a spare kernel weighs.
"""
import itertools
import json
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

import psutil

from myspinbot.graph.catalogue import Catalogue
from myspinbot.api.client import Client, migrate_journal
from myspinbot.core import Settings
from myspinbot.embedded import Embedded
from myspinbot.graph.plan import input_hash
from myspinbot.schema import Graph, StepMessage, StepRow
from table import Row, main

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "ok_three_cells.ipynb"
ROUNDS, STEPS, WAITING, PAUSE_S = 7, 40, 150, 0.1

KINDS = ("pristine", "resident")


def worker(out: str) -> None:
    "A worker that writes a line for each step: key and milliseconds from claim to commit."
    from myspinbot.store.journal import Journal
    from myspinbot.jobs.worker import Worker
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
        Worker(Timed(c.cfg.postgres_url.get_secret_value()), c.bridge, c.events, c.store, c.catalogue, "bench:0", c.cfg).run(stop)


@contextmanager
def installation(**settings: Any) -> Iterator[tuple[Client, dict[str, str], Path]]:
    "Servers of its own in a temporary folder, with one step notebook; client, environment and folder."
    with tempfile.TemporaryDirectory(prefix="spinb", ignore_cleanup_errors=True) as name:
        home = Path(name)
        steps = home / "pipelines" / "steps"
        steps.mkdir(parents=True)
        for kind in KINDS:
            nb = json.loads(NOTEBOOK.read_text())
            nb["metadata"]["myspinbot"] = dict(nb["metadata"]["myspinbot"], id=f"toy.{kind}", kernel=kind)
            (steps / f"toy_{kind}.ipynb").write_text(json.dumps(nb))
        servers = Embedded(home)
        urls = servers.start()
        settings |= dict(redis_url=urls.redis_url, postgres_url=urls.postgres_url, pipelines_dir=str(steps.parent))
        env = os.environ | dict(SPIN_HOME=name) | {f"SPIN_{k.upper()}": str(v) for k, v in settings.items()}
        try:
            migrate_journal(cfg := Settings(home=home, **settings))
            with Client(cfg, Catalogue(steps.parent)) as c: yield c, env, home
        finally: servers.stop()


class Sender:
    "Queues no-op steps of one job, as a conductor does, and waits for them."
    def __init__(self, client: Client):
        self.client, self.keys = client, itertools.count()
        client.journal.submit(Graph(name="bench"), {})
        [self.job] = client.journal.lease_jobs("bench", 600, 1)
        self.codes = {k: client.catalogue.code(f"toy.{k}") for k in KINDS}
        client.journal.keep_codes(dict(self.codes.values()))
        self.done, self.stop = set(), threading.Event()
        self.changed = threading.Condition()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        for hint in self.client.bridge.follow_done(self.stop):
            with self.changed:
                self.done.add(hint["key"])
                self.changed.notify_all()

    def send(self, count: int, kind: str = "pristine") -> list[str]:
        spec = self.client.catalogue.step(f"toy.{kind}")
        keys, j, code = [f"n{next(self.keys)}" for _ in range(count)], self.client.journal, self.codes[kind][0]
        made = dict(step=spec.id, source_hash=spec.source_hash, code=code, input_hash=input_hash(spec, {}, code))
        for k in keys: j.queue_step(self.job.id, self.job.epoch, StepRow(job=self.job.id, key=k, node=k, **made))
        ids = self.client.bridge.publish_many([("cpu", "normal", StepMessage(job=self.job.id, key=k)) for k in keys])
        j.mark_published([(self.job.id, k, id) for k, id in zip(keys, ids, strict=True)])
        return keys

    def wait(self, keys: list[str], timeout_s: float = 60.0) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.done.issuperset(keys), timeout_s):
                raise TimeoutError(f"not done in {timeout_s:g} s: {sorted(set(keys) - self.done)[:3]}")

    def run(self, count: int, kind: str = "pristine", pause_s: float = 0.0) -> list[str]:
        "One after another."
        keys = []
        for _ in range(count):
            keys += self.send(1, kind)
            self.wait(keys[-1:])
            time.sleep(pause_s)
        return keys


def papermill(folder: Path) -> float:
    "Milliseconds of papermill with its own engine."
    from papermill import execute_notebook
    began = time.perf_counter()
    execute_notebook(str(NOTEBOOK), str(folder / "theirs.ipynb"), progress_bar=False)
    return 1000 * (time.perf_counter() - began)


def times(out: Path) -> dict[str, float]: return {k: float(ms) for k, ms in map(str.split, out.read_text().splitlines())}


def weights(worker: int) -> tuple[list[float], list[float]]:
    "MB of each waiting kernel, and of the processes that they were forked from, all shared pages divided."
    def pss(p: psutil.Process) -> float: return p.memory_full_info().pss / 2**20
    [launcher] = psutil.Process(worker).children()
    parents = launcher.children()
    guards = [g for p in parents for g in p.children()]
    return [pss(k) for g in guards for k in g.children()], [pss(p) for p in (launcher, *parents)] + [sum(map(pss, guards))]


def rows() -> list[Row]:
    "Measure."
    with installation(slots=2) as (client, env, home):
        out = home / "times"
        out.touch()
        p = subprocess.Popen([sys.executable, __file__, "--worker", str(out)], env=env, stderr=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL)
        try:
            sender, theirs, keys = Sender(client), [], {k: [] for k in KINDS}
            for kind in KINDS: sender.run(20, kind)
            papermill(home)
            for _ in range(ROUNDS):
                theirs.append(papermill(home))
                keys["pristine"].append(sender.run(STEPS, pause_s=PAUSE_S))
                keys["resident"].append(sender.run(STEPS, "resident"))
            rates = []
            for _ in range(3):
                began = time.perf_counter()
                sender.wait(sender.send(WAITING))
                rates.append(WAITING / (time.perf_counter() - began))
            time.sleep(2)
            waiting, above = weights(p.pid)
            ms = times(out)
        finally:
            sender.stop.set()
            p.terminate()
            p.wait(30)
    found = []
    for kind, reach in zip(KINDS, (25, 12), strict=True):
        each = sorted(ms[k] for ks in keys[kind] for k in ks)
        note = f"p95 {each[int(0.95 * len(each))]:.1f} ms of {len(each)} steps"
        found.append(Row(f"three-cell no-op step, {kind} kernel, claim to commit: p50 of a round",
                         [statistics.median(ms[k] for k in ks) for ks in keys[kind]], "ms", reach, note=note))
    over = [[a / b for a, b in zip(theirs, r.samples, strict=True)] for r in found]
    return [*found, Row("the same notebook, papermill's own engine", theirs, "ms"),
            *(Row(f"papermill's time over a {kind} kernel's", o, "x", more=True) for kind, o in zip(KINDS, over, strict=True)),
            Row("pristine no-op steps through one worker of 2 slots, many waiting", rates, "steps/s", 15, more=True),
            Row("a waiting spare or resident kernel, shared pages divided", waiting, "MB", 15,
                note=f"launcher, parents and all guards: {', '.join(f'{o:.0f}' for o in above)} MB")]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]: worker(sys.argv[2])
    else: main(rows)
