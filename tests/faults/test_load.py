"""Ten thousand jobs in the queue, then a hundred thousand rows of history: rates, lists, memory, and nothing left over.

`make test` runs a short form; FULL=1 the whole one, which `tests/bench/load.py` also prints as rows of the benchmark.
"""
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
from farm import Farm, wait_for
from noops import add_plugin, chain, installation, memory_mb, with_plugin, write_pipelines

from myspinbot.store.steps import step_params
from myspinbot.jobs.conductor import Conductor
from myspinbot.bridge.keys import work_stream
from myspinbot.schema import StepRow

NOTEBOOK_EACH = 50  # one job in so many has a notebook step; the others have a control step
CALLS = 40          # of each list
HISTORY = """INSERT INTO job (id, pipeline, graph, params, request, status, priority, created_at, started_at, ended_at, epoch)
      SELECT 'old_' || i, CASE i %% 3 WHEN 0 THEN 'rare' ELSE 'chain' END, graph, params, request,
        CASE i %% 100 WHEN 0 THEN 'failed' ELSE 'succeeded' END, 1, at, at, at, 1
      FROM job, LATERAL (SELECT i, now() - (%(n)s - i) * interval '1 s' AS at FROM generate_series(1, %(n)s) i) o
      WHERE job.id = %(like)s;
    INSERT INTO step (job, key, node, step, version, queue, priority, status, attempt, input_hash, source_hash, inputs,
        weight, retries, timeout_s, queued_at, started_at, ended_at)
      SELECT 'old_' || i, 'n0', 'n0', step, version, queue, priority, 'succeeded', 1, md5(i::text), source_hash, inputs,
        weight, retries, timeout_s, queued_at, started_at, ended_at FROM step, generate_series(1, %(n)s) i WHERE job = %(like)s;
    INSERT INTO step (job, key, node, step, version, queue, priority, status, attempt, input_hash, source_hash, inputs,
        weight, retries, timeout_s, queued_at, started_at, ended_at)
      SELECT 'old_1', 'wide[' || i || ']', 'wide', step, version, queue, priority, 'succeeded', 1, '', source_hash, inputs,
        weight, retries, timeout_s, queued_at, started_at, ended_at FROM step, generate_series(1, 500) i WHERE job = %(like)s;
    INSERT INTO event (job, kind, key, body) SELECT 'old_' || i, 'step', 'n0', '{"status": "running"}'
      FROM generate_series(1, %(n)s) i;
    INSERT INTO event (job, kind, key, body) SELECT 'old_1', 'step', 'wide[' || i || ']', '{"status": "running"}'
      FROM generate_series(1, 2000) i"""


def timed(fn: Callable[[], Any], n: int) -> list[float]:
    "Milliseconds of each call."
    took = []
    for _ in range(n):
        began = time.perf_counter()
        fn()
        took.append(1000 * (time.perf_counter() - began))
    return took


def submit(f: Farm, n: int) -> tuple[list[str], list[float]]:
    "Jobs of one step; the ids, and what each submit took."
    control, notebook, ids, took = chain("noop.control", 1), chain("noop.notebook", 1), [], []
    for i in range(n):
        graph = control if i % NOTEBOOK_EACH else notebook
        took += timed(lambda graph=graph, i=i: ids.append(f.client.submit(graph, dict(value=i)).id), 1)
    return ids, took


def live(f: Farm) -> int:
    counts = f.client.journal.stats()["jobs"]
    return sum(counts.get(s, 0) for s in ("queued", "running", "waiting"))


def drain(f: Farm, ids: list[str]) -> float:
    "Wait for the end of jobs, all succeeded; jobs a second since the first one started."
    wait_for("all jobs ended\n" + f.log("control")[-2000:], lambda: live(f) == 0, 60 + len(ids) / 10)
    row = f.client.journal.row("""SELECT count(*) AS n, extract(epoch FROM max(ended_at) - min(started_at))::float8 AS s
        FROM job WHERE id = ANY(%(ids)s) AND status = 'succeeded'""", ids=ids)
    assert row["n"] == len(ids), f.client.journal.stats()
    return row["n"] / row["s"]


def write_history(f: Farm, like: str, n: int) -> None:
    "Ended jobs, their steps and events, straight into the tables; one job has many of both."
    def run(c: Any) -> None:
        with c.transaction():
            c.execute("SET LOCAL session_replication_role = replica")  # no triggers
            for statement in HISTORY.split(";\n"): c.execute(statement, dict(n=n, like=like))
    f.client.journal.connections.run(run)


def lists(f: Farm, last: str) -> dict[str, list[float]]:
    "What dashboards, command line and API ask for, with the history in place; milliseconds."
    c, asked = f.client, {}
    pages = dict(first={}, deep=dict(before="old_5"), failed=dict(status="failed"), running=dict(status="running"),
                 rare=dict(pipeline="rare"), both=dict(status="failed", pipeline="rare"), unknown=dict(pipeline="nothing"),
                 children=dict(parent=last), long=dict(limit=500))
    for name, given in pages.items(): asked[f"jobs, {name}"] = lambda given=given: c.jobs(**given)
    asked |= {"steps of a job": lambda: c.steps(last), "500 steps": lambda: c.steps("old_1"),
              "events of a job": lambda: c.journal.events(last), "2000 events": lambda: c.journal.events("old_1"),
              "stats": c.journal.stats}
    return {name: timed(fn, CALLS) for name, fn in asked.items()}


def nothing_pending(f: Farm) -> dict[str, int]:
    "What must be gone when all jobs have ended."
    stats, j = f.client.bridge.stats(), f.client.journal
    return dict(entries=sum(s["length"] for s in stats["streams"].values()), dead=stats["dead"], hints=stats["jobs"],
                pending=sum(s["pending"] for s in stats["streams"].values()),
                leases=j.row("SELECT count(*) AS n FROM job WHERE lease_until IS NOT NULL")["n"],
                held=j.row("SELECT count(*) AS n FROM step WHERE lease_until IS NOT NULL")["n"],
                open=j.row("SELECT count(*) AS n FROM step WHERE ended_at IS NULL")["n"])


def main(n_jobs: int, n_rows: int) -> dict[str, Any]:
    "The whole story; what was measured."
    seen: dict[str, Any] = dict(memory=[])
    with installation() as f:
        ids, seen["submit_ms"] = submit(f, n_jobs)
        assert live(f) == n_jobs
        f.start("control")
        f.start("w1")
        pid, ended = f.procs["control"].pid, threading.Event()

        def sample() -> None:
            while not ended.wait(0.5): seen["memory"].append(memory_mb(pid))
        watch = threading.Thread(target=sample)
        watch.start()
        try:
            seen["jobs_per_s"] = drain(f, ids)
            seen["pending"] = nothing_pending(f)
            write_history(f, ids[1], n_rows)
            seen["lists"] = lists(f, ids[1])
            more, seen["submit_with_history_ms"] = submit(f, n_jobs // 5)
            seen["with_history_per_s"] = drain(f, more)
            seen["pending_with_history"] = nothing_pending(f)
        finally:
            ended.set()
            watch.join()
    return seen


def test_a_long_queue_drains_and_a_long_history_stays_quick() -> None:
    seen = main(10_000, 100_000) if os.environ.get("FULL") else main(500, 5_000)
    assert not any(seen["pending"].values()), seen["pending"]
    assert not any(seen["pending_with_history"].values()), seen["pending_with_history"]
    slow = {name: sorted(took)[len(took) // 2] for name, took in seen["lists"].items() if sorted(took)[len(took) // 2] > 200}
    assert not slow, slow
    early, late = max(seen["memory"][:len(seen["memory"]) // 3]), max(seen["memory"])
    assert late < early * 1.2 + 20, seen["memory"]


def test_conductor_killed_amid_200_control_steps_repeats_only_what_was_not_committed(farm: Callable, tmp_path: Path) -> None:
    plugin = add_plugin(tmp_path / "plugin")
    f = farm(write_pipelines(tmp_path / "pipelines"), lease_s=1.5)
    f.env = with_plugin(f.env, plugin)
    ids = [f.client.submit(chain("noop.effect", 40), dict(value=1000 * i)).id for i in range(5)]
    f.start("control")
    rows = lambda: [r for id in ids for r in f.client.steps(id)]
    wait_for("sixty steps done", lambda: sum(r.status == "succeeded" for r in rows()) >= 60)
    f.kill("control")
    before = {(r.job, r.key): r for r in rows() if r.status == "succeeded"}
    assert 60 <= len(before) < 200
    f.start("control2")
    for i, id in enumerate(ids): assert f.done(id).outputs == dict(value=1000 * i + 40)
    after, runs = {(r.job, r.key): r for r in rows()}, Counter((o[0], o[1]) for o in f.runs())
    assert len(after) == 200 and {r.status for r in after.values()} == {"succeeded"}
    assert all(runs[k] == 1 and after[k] == r for k, r in before.items())
    again = {k for k, n in runs.items() if n > 1}
    assert len(again) <= len(ids) and all(runs[k] == after[k].attempt == 2 for k in again)  # each job had one step under way


def test_every_queued_step_is_published_again_however_many_wait(farm: Callable, tmp_path: Path, redis_url: str) -> None:
    f, n = farm(write_pipelines(tmp_path / "pipelines")), 2500
    c = f.client
    conductor = Conductor(c.journal, c.bridge, c.events, c.store, c.catalogue, "reconciler", f.cfg)
    c.submit(chain("noop.notebook", 1))
    [job] = c.journal.lease_jobs("reconciler", 600, 1)
    row = lambda i: StepRow(job=job.id, key=f"n0[{i}]", node="n0", step="noop.notebook")
    conductor.dispatch_many([step_params(row(i), job.epoch) | dict(status="queued") for i in range(n)])
    waiting = lambda: c.bridge.stats()["streams"].get(work_stream("cpu"), {}).get("length", 0)
    old = "SELECT count(*) AS n FROM step WHERE queued_at < clock_timestamp() - interval '1.1 s'"
    wait_for("rows old enough for the reconciler", lambda: c.journal.row(old)["n"] == n)
    assert waiting() == n and conductor.reconcile() == 0
    redis.Redis.from_url(redis_url).flushall()
    assert sum(conductor.reconcile() for _ in range(2)) == n == waiting()
    r, lost = redis.Redis.from_url(redis_url), c.journal.queued_steps(limit=n)[n - 10:]  # what a promoted replica lacks
    assert r.xdel(work_stream("cpu"), *[o.entry_id for o in lost]) == 10
    assert sum(conductor.reconcile() for _ in range(4)) == 10 and waiting() == n
