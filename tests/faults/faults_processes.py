"""Processes of ours that die, freeze, are told to stop, run beside each other, or have another version."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from run import fault
from victim import POINTS
from world import HERE, World, wait_for

from myspinbot.api.client import Client
from myspinbot.bridge.keys import BODY
from myspinbot.store.tables import parse_graph

SLACK_S = 3.0  # on top of lease and scan: the machine is shared, and the witness' line comes from a notebook's first cell


def takeovers(w: World, since: float) -> list[float]:
    "Seconds from a moment to each takeover after it: a job's next conductor, a step's next claim."
    found = []
    for j in w.accepted:
        seen: dict[str, int] = {}
        for e in w.client.journal.events(j):
            n = e.body.get("epoch" if e.kind == "job" else "attempt", 0)
            if e.body["status"] == "running" and n > seen.get(e.key, n) and e.at > since: found.append(e.at - since)
            if e.body["status"] == "running": seen[e.key] = n
    return found


def within_a_lease(w: World, since: float) -> None:
    "Record the recovery, and hold it to the promise: one lease, one scan."
    took = takeovers(w, since)
    w.report.recovery_s += took
    due = w.lease_s + w.scan_s
    if took and max(took) > due + SLACK_S: w.violate(f"recovered after {max(took):.1f} s; a lease and a scan are {due:.1f} s")


def committed(w: World) -> dict[tuple[str, str], Any]:
    "When the steps with a committed result were started; they must never start again."
    return {(j, r.key): r.started_at for j in w.accepted for r in w.client.steps(j) if r.status == "succeeded"}


def not_again(w: World, before: dict[tuple[str, str], Any]) -> None:
    for (j, key), at in before.items():
        if w.row(j, key).started_at != at: w.violate(f"step {key} of {j} ran again after its commit")


def until_dead(w: World, name: str, limit_s: float = 60.0) -> float:
    "Submit until the victim has met its point; when it died."
    end = time.monotonic() + limit_s
    while w.procs[name].poll() is None and time.monotonic() < end:
        w.submit(w.chain(2))
        wait_for("a job or the victim ends", lambda: w.procs[name].poll() is not None
                 or w.client.job(w.accepted[-1]).status in ("succeeded", "failed"), 30)
    return w.died(name)


def killed_at(point: str) -> None:
    role = point.split(maxsplit=1)[0]

    @fault(f"SIGKILL: {point}", short=point in ("worker after claim", "worker after commit", "conductor after publish"))
    def scenario(w: World, rng: random.Random) -> None:
        w.start(*(["control", "w2"] if role == "worker" else ["w1"]))
        w.start_victim("w1" if role == "worker" else "control", point, rng.randint(1, 3))
        if role != "worker": w.start("control2")
        at = until_dead(w, "w1" if role == "worker" else "control")
        before = committed(w)
        w.quiet()
        within_a_lease(w, at)
        not_again(w, before)


for _point in POINTS:
    if _point.split()[0] in ("worker", "conductor"): killed_at(_point)


def reconciler_killed_at(point: str) -> None:
    @fault(f"SIGKILL: {point}", short=point == "reconciler after publish")
    def scenario(w: World, rng: random.Random) -> None:
        "Work that only a reconciler brings back: a dead worker's step, then what a FLUSHALL took."
        w.start_victim("control", point)
        w.start("w1")
        gate = w.home / "gate"
        job = w.submit(w.chain(1, gate=str(gate)))
        w.at_work(job, "s0")
        w.kill("w1")
        for _ in range(3): w.submit(w.chain(1))
        w.redis.flushall()
        at = w.died("control")
        gate.touch()
        w.start("control2", "w2")
        w.quiet()
        w.report.recovery_s += takeovers(w, at)


for _point in POINTS:
    if _point.startswith("reconciler"): reconciler_killed_at(_point)


@fault("SIGKILL: client before and after its commit", short=True)
def client_killed(w: World, rng: random.Random) -> None:
    "The user does not know whether it was accepted, and asks again under the same key: one job."
    w.start("control", "w1")
    for point, there in (("client before commit", 0), ("client after commit", 1)):
        key = f"known-{next(w.names)}"
        args = ["submit", "chain", "-p", f"name=c{key}", "--key", key]
        done = subprocess.run([sys.executable, str(HERE / "victim.py"), point, "1", *args], env=w.farm.env, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
        w.report.kills += 1
        rows = w.client.journal.rows("SELECT id FROM job WHERE idempotency_key = %(key)s", key=key)
        if len(rows) != there: w.violate(f"{point}: {len(rows)} jobs in the journal")
        again = subprocess.run([sys.executable, "-m", "myspinbot", *args], env=w.farm.env, capture_output=True, text=True)
        w.accepted.append(again.stdout.strip())
        if there and again.stdout.strip() != rows[0]["id"]: w.violate(f"{point}: a second job for the same key")


@fault("SIGKILL: worker in mid-cell", short=True)
def worker_in_mid_cell(w: World, rng: random.Random) -> None:
    w.start("control", "w1", "w2")
    gate = w.home / "gate"
    job = w.submit(w.fan(4, gate=str(gate)))
    for k in range(4): w.at_work(job, f"marks[{k}]")
    time.sleep(rng.uniform(0, w.lease_s))
    at = w.kill("w1")
    taken = lambda: [k for k in range(4) if w.row(job, f"marks[{k}]").attempt > 1 or w.row(job, f"marks[{k}]").status == "queued"]
    wait_for("the dead worker's steps are taken back", lambda: len(taken()) == 2, w.lease_s + 30)
    gate.touch()
    w.quiet()
    within_a_lease(w, at)


@fault("SIGKILL: kernel in mid-cell", short=True)
def kernel_in_mid_cell(w: World, rng: random.Random) -> None:
    w.start("control", "w1")
    gate = w.home / "gate"
    job = w.submit(w.chain(2, gate=str(gate)))
    line = w.at_work(job, "s0")
    time.sleep(rng.uniform(0, 0.5))
    os.kill(line["pid"], signal.SIGKILL)
    at, w.report.kills = time.time(), w.report.kills + 1
    gate.touch()
    w.recovered(at, job, "s0", 2)


def above(w: World, kernel: int) -> list[psutil.Process]:
    "What a kernel was forked from: its guard, the parent with its imports, the launcher."
    guard, parent, launcher, worker = psutil.Process(kernel).parents()[:4]
    assert worker.pid == w.procs["w1"].pid
    return [guard, parent, launcher]


def one_above_in_mid_cell(w: World, which: int) -> None:
    w.start("control", "w1")
    gate = w.home / "gate"
    job = w.submit(w.chain(2, gate=str(gate)))
    kernel = w.at_work(job, "s0")["pid"]
    above(w, kernel)[which].kill()
    at, w.report.kills = time.time(), w.report.kills + 1
    wait_for("the kernel ends with it", lambda: not psutil.pid_exists(kernel))
    gate.touch()
    w.recovered(at, job, "s0", 2)


@fault("SIGKILL: kernel launcher in mid-cell")
def launcher_in_mid_cell(w: World, rng: random.Random) -> None: one_above_in_mid_cell(w, 2)


@fault("SIGKILL: parent of kernels in mid-cell")
def parent_in_mid_cell(w: World, rng: random.Random) -> None: one_above_in_mid_cell(w, 1)


@fault("SIGKILL: guard of a kernel in mid-cell")
def guard_in_mid_cell(w: World, rng: random.Random) -> None: one_above_in_mid_cell(w, 0)


@fault("heartbeat of a worker fails for good")
def heartbeat_fails(w: World, rng: random.Random) -> None:
    "It goes on working, but its lease runs out: another one takes over, and its result is refused."
    w.start_victim("w1", "raise: heartbeat", rng.randint(1, 2))
    w.start("control")
    gate = w.home / "gate"
    job = w.submit(w.chain(1, gate=str(gate)))
    at = time.time() if w.at_work(job, "s0") else 0.0
    w.start("w2")
    w.recovered(at, job, "s0", 2)
    gate.touch()
    w.quiet()
    wait_for("the first worker's result is refused", lambda: "status=refused" in w.farm.log("w1"), 30)


@fault("leases of a conductor fail for good")
def leases_fail(w: World, rng: random.Random) -> None:
    w.start_victim("control", "raise: leases")
    w.start("w1", "control2")
    gate = w.home / "gate"
    for _ in range(6): w.submit(w.chain(2, gate=str(gate)))
    time.sleep(2 * w.lease_s)
    gate.touch()


@fault("loop of a worker hangs")
def loop_hangs(w: World, rng: random.Random) -> None:
    "Its heartbeat says it lives, but it takes no work: it ends by itself, and its supervisor would start another one."
    w.start_victim("w1", "hang: read", rng.randint(2, 4))
    w.start("control")
    at = time.time()
    wait_for("the worker that reads no more ends", lambda: w.procs["w1"].poll() is not None, 60)
    code = w.procs.pop("w1").returncode
    if code != 70: w.violate(f"it ended with {code}")
    w.report.recovery_s.append(time.time() - at)
    w.start("w1")
    w.submit(w.chain(1))


@fault("SIGSTOP: worker for three leases, then SIGCONT", short=True)
def worker_frozen(w: World, rng: random.Random) -> None:
    "Its kernel goes on and finishes; what it made is refused, and its artifact stays invisible."
    w.start("control", "w1")
    job = w.submit(w.chain(2, seconds=rng.uniform(0.5, 2.0)))
    w.at_work(job, "s0")
    w.kill("w1", signal.SIGSTOP)
    at = time.time()
    w.start("w2")
    w.recovered(at, job, "s0", 2)
    time.sleep(max(0.0, at + 3 * w.lease_s - time.time()))
    w.kill("w1", signal.SIGCONT)
    w.quiet()
    told = lambda: any(o in w.farm.log("w1") for o in ("status=refused", "step stopped"))
    wait_for("the frozen worker hears that it has a successor", told, 30)
    if w.row(job, "s0").worker != "w2": w.violate(f"the frozen worker's result stands: {w.row(job, 's0')}")


@fault("SIGSTOP: conductor for three leases, then SIGCONT")
def conductor_frozen(w: World, rng: random.Random) -> None:
    w.start("control", "w1")
    gate = w.home / "gate"
    jobs = [w.submit(w.chain(3, gate=str(gate))) for _ in range(3)]
    for j in jobs[:2]: w.at_work(j, "s0")
    w.kill("control", signal.SIGSTOP)
    at = time.time()
    w.start("control2")
    gate.touch()
    time.sleep(max(0.0, at + 3 * w.lease_s - time.time()))
    w.kill("control", signal.SIGCONT)
    w.quiet()
    w.report.recovery_s += takeovers(w, at)


def rolling(times: int) -> Any:
    def scenario(w: World, rng: random.Random) -> None:
        "Each worker is told to stop while it works, and another one comes; nothing fails, nothing waits for a lease."
        w.start("control", "w0")
        for k in range(times):
            jobs = [w.submit(w.chain(2, seconds=rng.uniform(0.05, 0.5))) for _ in range(2)]
            w.at_work(jobs[0], "s0")
            time.sleep(rng.uniform(0.0, 0.5))
            at = time.time()
            old = w.procs.pop(f"w{k}")
            old.terminate()
            w.report.kills += 1
            w.start(f"w{k + 1}")
            assert (code := old.wait(60)) == 0, f"w{k} ended with {code}"
            w.quiet()
            w.report.recovery_s += takeovers(w, at)
        lost = w.client.journal.row("SELECT sum(lost) AS n FROM step")["n"]
        if lost: w.violate(f"{lost} steps waited for a lease although their worker was told to stop")
    return scenario


fault("SIGTERM: workers rolling under load, 3 times", short=True, lease_s=30.0)(rolling(3))
fault("SIGTERM: workers rolling under load, 20 times", lease_s=30.0)(rolling(20))


@fault("all killed inside a 20-way map after k are done", short=True)
def killed_inside_a_map(w: World, rng: random.Random) -> None:
    "Exactly 20 - k run again: what is committed is not lost, and nothing else counts as done."
    w.start("control", "w1")
    gate, k = w.home / "gate", rng.randint(3, 15)
    job = w.submit(w.fan(20, seconds=0.05))
    count = lambda: sum(r.status == "succeeded" for r in w.client.steps(job))
    wait_for("k are done", lambda: count() >= k)
    w.kill("w1")
    w.kill("control")
    done, began = count(), time.time()
    gate.touch()
    w.start("control2", "w2")
    w.quiet()
    ran = [o for o in w.marks() if o["word"] == "start" and o["at"] > began]
    if len(ran) != 20 - done: w.violate(f"{done} were done, so {20 - done} had to run again; {len(ran)} did")


@fault("two conductors and two workers at once", short=True)
def two_of_each(w: World, rng: random.Random) -> None:
    w.start("control", "control2", "w1", "w2")
    for _ in range(15): w.submit(w.chain(2) if rng.random() < 0.5 else w.fan(3))
    w.quiet()
    starts = [o for o in w.marks() if o["word"] == "start"]
    rows = [r for j in w.accepted for r in w.client.steps(j)]
    if len(starts) != len(rows): w.violate(f"{len(rows)} steps, {len(starts)} executions although nothing broke")


@fault("a slow and a fast worker", short=True)
def slow_and_fast(w: World, rng: random.Random) -> None:
    "The fast one is never idle while work waits: nothing is reserved for the slow one."
    w.start("control")
    w.farm.env["SPIN_SLOW_S"] = "3.0"
    w.start("slow")
    del w.farm.env["SPIN_SLOW_S"]
    w.start("fast")
    job = w.submit(w.fan(24, seconds=0.3))
    w.quiet()
    rows = sorted(w.client.steps(job), key=lambda r: r.started_at)
    fast = [r for r in rows if r.worker == "fast"]
    last_start = max(r.started_at for r in rows).timestamp()
    free = sorted(r.ended_at.timestamp() for r in fast)
    for at in free:  # a slot came free while work waited: the next start comes soon
        if at >= last_start: continue
        nxt = min((r.started_at.timestamp() for r in fast if r.started_at.timestamp() >= at), default=None)
        idle = (nxt or last_start) - at
        if idle > 1.0: w.violate(f"the fast worker was idle for {idle:.1f} s while work waited")
    if len(fast) <= 16: w.violate(f"the fast worker ran {len(fast)} of 24 steps")


@fault("a message of a newer version meets an older worker", short=True)
def newer_message(w: World, rng: random.Random) -> None:
    "A clean refusal: a dead letter, a failed step that says why; no loop. And an older message is simply read."
    w.start("control")
    job = w.submit(w.chain(1))
    wait_for("the step is queued", lambda: (r := w.row(job, "s0")) and r.status == "queued" and r.entry_id)
    stream, id = w.stream(), w.row(job, "s0").entry_id
    body = w.redis.xrange(stream, id, id)[0][1][BODY]
    newer = body.replace(b'"schema_version":1', b'"schema_version":2')
    assert newer != body
    w.redis.xdel(stream, id)
    entry = w.redis.xadd(stream, {BODY: newer}).decode()
    w.client.journal.mark_published([(job, "s0", entry)])
    w.may_fail.add(job)
    older = w.submit(w.chain(1))
    w.start("w1")
    w.quiet()
    error = w.client.job(job).error["message"]
    if "newer than" not in error: w.violate(f"the reason is not told: {error}")
    if w.dead_letters() != 1: w.violate(f"{w.dead_letters()} dead letters for one message")
    if w.client.job(older).status != "succeeded": w.violate("the other job did not go on")


@fault("a graph of a newer version meets an older conductor", short=True)
def newer_graph(w: World, rng: random.Random) -> None:
    "The job ends with the reason, lists show it and all others; after an update the graph runs."
    mine = w.chain(1)
    job, other, j = w.submit(mine), w.submit(w.chain(1)), w.client.journal
    w.may_fail.add(job)
    [graph] = j.rows("SELECT hash, body::text FROM graph JOIN job ON job.graph = hash WHERE job.id = %(id)s", id=job)
    def write(body: str) -> None:
        j.rows("UPDATE graph SET body = %(body)s WHERE hash = %(hash)s RETURNING hash", hash=graph["hash"], body=body)
    write(json.dumps(json.loads(graph["body"]) | dict(schema_version=2, loops=[])))
    w.start("control", "w1")
    with Client(w.client.cfg, w.client.catalogue) as c:  # has not seen the graph before
        parse_graph.cache_clear()
        ended = wait_for("the job has ended", lambda: (o := c.job(job)).status == "failed" and o)
        if "schema_version 2" not in ended.error["message"]: w.violate(f"the reason is not told: {ended.error}")
        if {o.id for o in c.jobs()} != {job, other}: w.violate("the list is not whole")
    write(graph["body"])
    parse_graph.cache_clear()
    w.stop("control")
    w.start("control")
    again = w.submit(mine)
    w.quiet()
    if w.client.job(again).status != "succeeded": w.violate("it did not run after the update")


@fault("a worker with another checkout meets a job", short=True)
def other_checkout(w: World, rng: random.Random) -> None:
    "The step's notebook differs, or is not there: a clean failure with that reason, and the worker goes on."
    import shutil
    mine = Path(w.farm.env["SPIN_PIPELINES_DIR"])
    changed, lacking = w.home / "changed", w.home / "lacking"
    for d in (changed, lacking): shutil.copytree(mine, d)
    nb = changed / "steps" / "witness_mark.ipynb"
    nb.write_text(nb.read_text().replace("maker = dict(", "changed, maker = True, dict("))
    (lacking / "steps" / "witness_mark.ipynb").unlink()
    w.start("control")
    for name, folder in (("changed", changed), ("lacking", lacking)):
        w.farm.env["SPIN_PIPELINES_DIR"] = str(folder)
        w.start(name)
        job = w.submit(w.chain(1))
        w.may_fail.add(job)
        w.quiet()
        error = w.client.job(job).error or dict(message="no error", hint="")
        if not error["hint"] or "witness.mark" not in error["message"]: w.violate(f"the reason is not told: {error}")
        w.stop(name)
    w.farm.env["SPIN_PIPELINES_DIR"] = str(mine)


def clock(name: str, jump_s: float) -> None:
    "The wall clock of one process jumps while it works; nothing is reclaimed, nothing expires early."
    told = f"{'+' if jump_s > 0 else '-'}1 {'hour' if abs(jump_s) == HOUR else 'day'}"

    @fault(f"clock of {name} jumps by {told}", short=(name, jump_s) in (("PostgreSQL", DAY), ("Redis", HOUR)))
    def scenario(w: World, rng: random.Random) -> None:
        set_clock = w.clock(name)
        w.start(*[o for o in ("control", "w1") if o not in w.procs])
        gate = w.home / "gate"
        jobs = [w.submit(w.chain(2, gate=str(gate))) for _ in range(2)]
        for j in jobs: w.at_work(j, "s0")
        time.sleep(rng.uniform(0, w.lease_s))
        set_clock(jump_s)
        if name in ("Redis", "PostgreSQL"): assert abs(w.server_time(name) - time.time() - jump_s) < 5, "the clock did not jump"
        w.start("w2", "control2")
        time.sleep(2.5 * w.lease_s)
        gate.touch()
        w.quiet()
        starts = [o for o in w.marks() if o["word"] == "start"]
        if len(starts) != 4: w.violate(f"{len(starts)} executions of 4 steps: {starts}")


HOUR, DAY = 3600.0, 86_400.0
for _name in ("the worker", "the conductor", "Redis", "PostgreSQL"):
    for _jump in (HOUR, DAY, -HOUR, -DAY): clock(_name, _jump)
