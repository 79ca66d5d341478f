"""A small installation that faults happen to: servers, conductors and workers of its own, a witness, and the promise as checks.

A scenario gets a `World` and a seeded random generator; it submits jobs, breaks things, and leaves. `World.settle` then heals
what is broken, waits until it is quiet, and `check` holds the invariants:

I1 every accepted job is in one terminal state
I2 exactly one committed result and one visible artifact for each (job, step)
I3 nothing is left over: no lease, pending entry, consumer, kernel, process, temporary file
I4 every extra execution that the witness saw has its recovery event
I5 the recorded events replay to the state shown
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import redis

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import SERVERS
from farm import Farm, wait_for

from myspinbot.core import SpinError
from myspinbot.embedded import Embedded, end_process, own_by, server_user
from myspinbot.graph.builder import Pipeline
from myspinbot.bridge.keys import DEAD, GROUP, JOBS, JOBS_GROUP, work_stream
from myspinbot.schema import JOB_END, Artifact, Graph

HERE = Path(__file__).parent
PIPELINES = HERE / "pipelines"


@lru_cache(maxsize=1)
def template() -> Path:
    "A PostgreSQL data folder that was initialised once; worlds start from a copy, which takes a tenth of the time."
    import atexit
    folder = Path(tempfile.mkdtemp(prefix="spintmpl"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    e = Embedded(folder)
    e.start()
    e.stop()
    return e.pgdata


@dataclass
class Report:
    "What one run of a scenario did and what became of it."
    fault: str
    seed: int
    kills: int = 0
    recovery_s: list[float] = field(default_factory=list)
    lost: int = 0          # accepted jobs without a terminal state
    duplicates: int = 0    # effects that appear more than once
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0


class World:
    "One installation in a folder of its own; everything in it ends with `close`."
    def __init__(self, seed: int = 0, lease_s: float = 2.0, scan_s: float = 0.5, pipelines: Path = PIPELINES,
                 report: Report | None = None, store_url: str = "", server: str = "valkey", **env: str):
        self.rng, self.lease_s, self.scan_s = random.Random(seed), lease_s, scan_s
        self.report = report or Report("", seed)
        self.home = Path(tempfile.mkdtemp(prefix="spinw"))
        self.tmp = self.home / "tmp"
        self.tmp.mkdir()
        self.servers = Embedded(self.home)
        self.program = SERVERS[server]
        choice = mock.patch("myspinbot.embedded.find_redis", lambda: self.program)  # the old Redis would be refused
        choice.start()
        self.ends: list[Callable[[], Any]] = [choice.stop]  # what goes with the world, such as a proxy; called last
        if not self.servers.pgdata.exists():
            self.servers.folder.mkdir(parents=True)
            self.servers.folder.chmod(0o711)
            shutil.copytree(template(), self.servers.pgdata, ignore=shutil.ignore_patterns("postmaster.pid"))
            if user := server_user(): own_by(self.servers.pgdata, user)
        urls = self.servers.start()
        self.farm = Farm(self.home / "farm", urls.redis_url, urls.postgres_url, pipelines, lease_s=lease_s, store_url=store_url)
        self.farm.env |= dict(SPIN_SCAN_S=str(scan_s), TMPDIR=str(self.tmp), **env)
        self.farm.witness = self.home / "witness.jsonl"
        self.farm.env["SPIN_WITNESS"] = str(self.farm.witness)
        self.client = self.farm.client
        self.redis = redis.Redis.from_url(urls.redis_url)
        self.accepted: list[str] = []   # ids of the jobs that the client was told to be accepted
        self.cancelled: set[str] = set()
        self.may_fail: set[str] = set() # jobs that a scenario makes fail on purpose
        self.retried: set[str] = set()  # jobs that a scenario retried after they had ended
        self.names = iter(range(10**9))
        self.heals: list[Callable[[], Any]] = []  # what undoes a fault; called by `settle`, newest first

    # processes ---------------------------------------------------------------------------------------------------
    @property
    def procs(self) -> dict[str, subprocess.Popen]: return self.farm.procs

    def start(self, *names: str, **env: str) -> None:
        "Start `control...` and workers by name, and wait until they are ready."
        for n in names: self.farm.start(n, **env)

    def start_victim(self, name: str, point: str, nth: int = 1) -> subprocess.Popen:
        "Start a process that ends by SIGKILL at a named point (see victim.py)."
        return self.farm.start(name, [sys.executable, str(HERE / "victim.py"), point, str(nth)])

    def kill(self, name: str, sig: int = signal.SIGKILL) -> float:
        "Kill a process of ours; when it was."
        p = self.procs[name]
        p.send_signal(sig)
        at = time.time()
        if sig == signal.SIGKILL:
            self.farm.procs.pop(name).wait()
            self.report.kills += 1
        return at

    def died(self, name: str, timeout_s: float = 60.0) -> float:
        "Wait until a victim has died at its point; when that was."
        wait_for(f"{name} dies at its point", lambda: self.procs[name].poll() is not None, timeout_s)
        assert self.procs[name].returncode == -signal.SIGKILL, f"{name} ended with {self.procs[name].returncode}"
        self.procs.pop(name)
        self.report.kills += 1
        return time.time()

    def stop(self, *names: str, timeout_s: float = 60.0) -> None:
        "SIGTERM and wait; a worker drains."
        for n in names: self.procs[n].terminate()
        for n in names:
            code = self.procs.pop(n).wait(timeout_s)
            assert code == 0, f"{n} ended with {code}:\n{self.farm.log(n)[-2000:]}"

    def clock(self, name: str) -> Callable[[float], None]:
        """Start `the worker` (w1), `the conductor` (control), `Redis` or `PostgreSQL` anew on a wall clock that can be set.

        Gives a function that makes the clock jump by so many seconds. The monotonic clock stays true, as on a real machine.
        """
        stamp = self.home / "clock"
        def jump(seconds: float) -> None:
            (new := stamp.with_suffix(".new")).write_text(f"{seconds:+.0f}")
            new.chmod(0o644)
            new.replace(stamp)
        jump(0)
        if name in ("the worker", "the conductor"):
            program = [sys.executable, str(HERE / "skewed.py"), str(stamp)]
            self.farm.start("w1" if name == "the worker" else "control", program)
            return jump
        import libfaketime
        lib = self.home / "libfaketime.so.1"  # PostgreSQL runs as another user, which may pass through this folder
        shutil.copy(Path(libfaketime.__file__).parent / "vendor/libfaketime/src/libfaketime.so.1", lib)
        lib.chmod(0o644)
        fake = dict(LD_PRELOAD=str(lib), FAKETIME_TIMESTAMP_FILE=str(stamp), FAKETIME_NO_CACHE="1", DONT_FAKE_MONOTONIC="1")
        server = self.servers.redis_process() if name == "Redis" else self.servers.postgres_process()
        end_process(server, ((signal.SIGINT, 10.0), (signal.SIGKILL, 5.0)))
        with mock.patch.dict(os.environ, fake): self.servers.start()
        return jump

    def server_time(self, name: str) -> float:
        "What a server thinks the time is."
        return float(self.redis.time()[0]) if name == "Redis" else self.client.journal.now()

    # jobs --------------------------------------------------------------------------------------------------------
    def chain(self, n: int = 3, seconds: float = 0.0, gate: str = "") -> Graph:
        "n steps, one after the other, with inputs that no other job has."
        p, value = Pipeline("chain", catalogue=self.client.catalogue), f"j{next(self.names)}"
        for k in range(n):
            value = p.step("witness.mark", id=f"s{k}", name=value, seconds=seconds, gate=gate).value
        p.output(value=value)
        return p.to_graph()

    def fan(self, n: int = 4, seconds: float = 0.0, gate: str = "") -> Graph:
        "n steps side by side in one map."
        p, id = Pipeline("fan", catalogue=self.client.catalogue), next(self.names)
        names = p.param("names", list, default=[f"j{id}_{k}" for k in range(n)])
        marks = p.map("witness.mark", over={"name": names}, id="marks", seconds=seconds, gate=gate)
        p.output(values=marks.value)
        return p.to_graph()

    def submit(self, graph: Graph, tries: int = 1, key: str | None = None) -> str:
        "Submit through the client under a key that is known before; repeated while services are away."
        key = key or f"known-{next(self.names)}"
        for left in range(tries - 1, -1, -1):
            try: job = self.client.submit(graph, {}, idempotency_key=key)
            except SpinError as e:
                if not left or not e.retryable: raise
                time.sleep(0.2)
            else: break
        if job.id not in self.accepted: self.accepted.append(job.id)
        return job.id

    def row(self, job: str, key: str) -> Any: return self.farm.step(job, key)

    def at_work(self, job: str, key: str, attempt: int = 1, timeout_s: float = 60.0) -> dict[str, Any]:
        "Wait until the witness saw an attempt of a step begin; its line."
        wanted = (job, key, attempt, "start")
        def seen() -> Any:
            return next((o for o in self.marks() if (o["job"], o["key"], o["attempt"], o["word"]) == wanted), None)
        return wait_for(f"attempt {attempt} of {key} at work", seen, timeout_s)

    def marks(self) -> list[dict[str, Any]]:
        "What the witness saw, complete lines only."
        if not self.farm.witness.exists(): return []
        whole = self.farm.witness.read_bytes()
        return [json.loads(o) for o in whole[:whole.rfind(b"\n") + 1].splitlines()]

    def recovered(self, since: float, job: str, key: str, attempt: int, timeout_s: float = 60.0) -> float:
        "Wait for the next attempt of a step; the seconds from the fault to its claim, which go into the report."
        line = self.at_work(job, key, attempt, timeout_s)
        self.report.recovery_s.append(max(0.0, line["at"] - since))
        return self.report.recovery_s[-1]

    # after the fault -----------------------------------------------------------------------------------------------
    def settle(self, timeout_s: float = 120.0) -> None:
        "Heal, wait for quiet, check; then stop everything in good order and look at what is left."
        for undo in reversed(self.heals): undo()
        self.heals.clear()
        self.servers.start()
        for n, p in list(self.procs.items()):
            p.send_signal(signal.SIGCONT)
            if p.poll() is not None: self.procs.pop(n)
        if not any(n.startswith("control") for n in self.procs): self.start("control")
        if not any(not n.startswith("control") for n in self.procs): self.start("w1")
        self.quiet(timeout_s)
        self.check()
        self.stop(*[n for n in self.procs if not n.startswith("control")])
        self.stop(*list(self.procs))
        self.check_stopped()

    def quiet(self, timeout_s: float = 120.0) -> None:
        "Wait until every accepted job has ended (I1) and no step and no entry is under way."
        end = time.monotonic() + timeout_s
        def open_jobs() -> list[str]: return [j for j in self.accepted if self.client.job(j).status not in JOB_END]
        while (left := open_jobs()) and time.monotonic() < end: time.sleep(0.1)
        self.report.lost += len(left)
        for j in left:
            states = {r.key: (r.status, r.attempt, r.lost, r.worker) for r in self.client.steps(j)}
            self.violate(f"I1 job {j} is still {self.client.job(j).status}: {states}")
        if left:
            logs = "\n".join(f"--- {n}\n{self.farm.log(n)[-3000:]}" for n in [*self.procs])
            print(logs, file=sys.stderr)
        wait_end = time.monotonic() + 6 * self.lease_s + 10
        while self.leftovers() and time.monotonic() < wait_end: time.sleep(0.1)
        for o in self.leftovers(): self.violate(f"I3 {o}")

    def violate(self, text: str) -> None: self.report.violations.append(text)

    def leftovers(self) -> list[str]:
        "What Redis and the journal still hold although every job has ended."
        found, j = [], self.client.journal
        for r in j.rows("SELECT id, status, owner FROM job WHERE lease_until IS NOT NULL OR owner IS NOT NULL"):
            found.append(f"job {r['id']} ({r['status']}) is still leased by {r['owner']}")
        for r in j.rows("""SELECT job, key, status, worker FROM step WHERE lease_until IS NOT NULL
                OR status IN ('queued', 'running', 'pending', 'waiting')"""):
            found.append(f"step {r['key']} of {r['job']} is {r['status']} ({r['worker']})")
        names = [o.decode() for o in self.redis.scan_iter("spin:q:*")]
        live = {n for n in self.procs if not n.startswith("control")}
        for s in names:
            if n := self.redis.xlen(s): found.append(f"{n} entries on {s}")
            for g in self.redis.xinfo_groups(s):
                if g["pending"]: found.append(f"{g['pending']} pending entries on {s}")
            for c in self.redis.xinfo_consumers(s, GROUP) if self.redis.xinfo_groups(s) else ():
                if c["name"].decode() not in live: found.append(f"consumer {c['name'].decode()} on {s}")
        if n := self.redis.xlen(JOBS): found.append(f"{n} hints on {JOBS}")
        pids = {str(p.pid) for p in self.procs.values()}
        for c in self.redis.xinfo_consumers(JOBS, JOBS_GROUP) if self.redis.exists(JOBS) else ():
            if c["name"].decode().rpartition(":")[2] not in pids: found.append(f"consumer {c['name'].decode()} on {JOBS}")
        return found

    # invariants ----------------------------------------------------------------------------------------------------
    def check(self) -> None:
        "I1, I2, I4, I5 over all accepted jobs; and no job beyond them."
        ids = {r["id"] for r in self.client.journal.rows("SELECT id FROM job")}
        for j in ids - set(self.accepted): self.violate(f"I1 job {j} was never accepted")
        marks = self.marks()
        for j in self.accepted:
            job = self.client.job(j)
            wanted = {"cancelled"} if j in self.cancelled else {"failed"} if j in self.may_fail else {"succeeded"}
            if job.status not in wanted | ({"succeeded"} if j in self.cancelled else set()):
                self.violate(f"I1 job {j} ended as {job.status}: {job.error and job.error['message']}")
            rows, events = self.client.steps(j), self.client.journal.events(j)
            self.check_results(j, rows)
            self.check_extra(j, events, [o for o in marks if o["job"] == j and o["word"] == "start"])
            self.check_replay(job, rows, events)

    def check_results(self, job: str, rows: Iterable[Any]) -> None:
        "I2: one committed result a step, made by the attempt that is shown, and its artifact is there, whole."
        keys = Counter(r.key for r in rows)
        for k, n in keys.items():
            if n > 1: self.duplicate(f"I2 {n} rows for step {k} of {job}")
        for r in rows:
            if r.status != "succeeded" or r.step not in ("witness.mark", "witness.large"): continue
            made: Artifact = r.outputs["made"]
            told = json.loads(self.client.store.open(made).read())
            if (told["job"], told["key"], told["attempt"]) != (job, r.key, r.attempt):
                self.duplicate(f"I2 step {r.key} of {job} shows attempt {r.attempt}, its artifact is of {told}")

    def duplicate(self, text: str) -> None:
        self.report.duplicates += 1
        self.violate(text)

    def check_extra(self, job: str, events: list[Any], starts: list[dict[str, Any]]) -> None:
        "I4: each attempt began at most once, was claimed, and follows an event that gave up the one before."
        for (key, attempt), n in Counter((o["key"], o["attempt"]) for o in starts).items():
            if n > 1: self.duplicate(f"I4 attempt {attempt} of {key} of {job} began {n} times")
            story = [e.body for e in events if e.kind == "step" and e.key == key]
            claims = [i for i, b in enumerate(story) if b["status"] == "running" and b.get("attempt") == attempt]
            claim = claims[0] if claims else None
            if claim is None: self.violate(f"I4 attempt {attempt} of {key} of {job} ran without a claim: {story}")
            elif attempt > 1:
                before, now = story[claim - 1], story[claim]
                gave_up = before["status"] == "queued" or now.get("lost", 0) > before.get("lost", 0)
                if not gave_up: self.violate(f"I4 attempt {attempt} of {key} of {job} has no recovery event: {story}")

    def check_replay(self, job: Any, rows: Iterable[Any], events: list[Any]) -> None:
        "I5: the last event of the job and of each step says what the rows say."
        last = [e.body["status"] for e in events if e.kind == "job"]
        if last[-1:] != [job.status]: self.violate(f"I5 events of {job.id} end with {last[-1:]}, it is {job.status}")
        if sum(s in JOB_END for s in last) > 1 and job.id not in self.may_fail | self.cancelled | self.retried:
            self.violate(f"I1 job {job.id} ended more than once: {last}")
        for r in rows:
            story = [e.body for e in events if e.kind == "step" and e.key == r.key]
            shown = (story[-1]["status"], story[-1].get("attempt", 0)) if story else None
            now = (r.status, r.attempt)
            if shown != now: self.violate(f"I5 events of {r.key} of {job.id} end with {shown}, the row says {now}")

    def check_stopped(self) -> None:
        "I3 after a stop in good order: no process, no temporary file, no consumer."
        def left() -> list[str]:
            procs = [f"process {p.pid} {' '.join(p.cmdline())[:120]}" for p in self.processes()]
            files = [str(f) for f in self.temporary()]
            return procs + files + [o for o in self.leftovers()]
        end = time.monotonic() + 15
        while left() and time.monotonic() < end: time.sleep(0.1)
        for o in left(): self.violate(f"I3 after the stop: {o}")

    def processes(self) -> Iterator[psutil.Process]:
        "Processes of this world, by the environment they inherited; servers and we ourselves excepted."
        for p in psutil.process_iter():
            try:
                if p.pid == os.getpid() or p.status() == psutil.STATUS_ZOMBIE: continue
                if p.environ().get("SPIN_HOME") == str(self.farm.home): yield p
            except psutil.Error: continue

    def temporary(self) -> Iterator[Path]:
        "Files that should have gone with what made them."
        home = self.farm.home
        yield from (o for o in self.tmp.iterdir())
        yield from (o for o in home.rglob("*") if o.name.endswith((".part", ".tmp")) and o.is_file())
        for d in ("scratch", "store/tmp"):
            yield from (o for o in (home / d).rglob("*") if o.is_file())

    def dead_letters(self) -> int: return self.redis.xlen(DEAD)
    def stream(self, queue: str = "cpu", priority: str = "normal") -> str: return work_stream(queue, priority)

    def close(self) -> None:
        "End all, whatever state it is in."
        for undo in reversed(self.heals):
            try: undo()
            except Exception as e: print(f"heal: {e!r}", file=sys.stderr)
        for p in self.procs.values():
            if p.poll() is None:
                p.send_signal(signal.SIGCONT)
                p.kill()
                p.wait()
        for p in self.processes():
            try: p.kill()
            except psutil.NoSuchProcess: continue
        self.procs.clear()
        self.farm.close()
        self.redis.close()
        for end in reversed(self.ends):
            try: end()
            except Exception as e: print(f"end: {e!r}", file=sys.stderr)
        try: self.servers.stop()
        finally: shutil.rmtree(self.home, ignore_errors=True)

    def __enter__(self) -> "World": return self
    def __exit__(self, *_: Any) -> None: self.close()


__all__ = ["JOB_END", "PIPELINES", "Report", "World", "wait_for"]
