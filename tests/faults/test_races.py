"""Two at once for one thing, on the real PostgreSQL and Redis: one wins, the other leaves, and nobody sees both."""
import itertools
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from farm import Farm, wait_for

from myspinbot.store.artifacts import LocalStore
from myspinbot.graph.catalogue import control_step
from myspinbot.jobs.conductor import Conductor
from myspinbot.core import Conflict, ServiceUnavailable
from myspinbot.graph.builder import Pipeline
from myspinbot.store.journal import Journal
from myspinbot.schema import JOB_END, STEP_END, Graph, Job, Node, StepMessage, StepRow
from myspinbot.jobs.worker import Worker

TOYS = Path(__file__).parents[1] / "pipelines"
ONE = Graph(name="one", nodes=[Node(id="say", step="toy.mark")])


def running(journal: Journal, n: int) -> list[tuple[Job, StepRow]]:
    "Jobs under a conductor, each with its step under a worker."
    for i in range(n): journal.submit(ONE, {"i": i})
    jobs = journal.lease_jobs("c", 600, n)
    for j in jobs: journal.queue_step(j.id, j.epoch, StepRow(job=j.id, key="say", node="say", step="toy.mark"))
    return [(j, journal.claim_step(j.id, "say", "w", 600)) for j in jobs]


def at_once(*calls: Callable[[], Any], within_s: float = 0.0) -> list[Any]:
    "All calls from one starting line, in threads, each within so long; their answers, or the errors that they raised."
    line = threading.Barrier(len(calls))

    def call(fn: Callable[[], Any]) -> Any:
        line.wait()
        if within_s: time.sleep(random.random() * within_s)  # else the line's own order can win every time
        try: return fn()
        except Conflict as e: return e
    with ThreadPoolExecutor(len(calls)) as ex: return list(ex.map(call, calls))


def ends(journal: Journal, job: str) -> list[str]:
    "The terminal states that the events of a job tell."
    return [e.body["status"] for e in journal.events(job) if e.kind == "job" and e.body["status"] in JOB_END]


def one_step(f: Farm, *names: str, **inputs: Any) -> Graph:
    "Steps one after the other; each writes its name into the witness file."
    p, last = Pipeline("race", catalogue=f.client.catalogue), None
    for n in names:
        last = p.step("toy.mark", id=n, name=f"{inputs.get('tag', '')}{n}", gate=inputs.get(n, ""), after=[last] if last else [])
    p.output(value=last.value)
    return p.to_graph()


# --- one key

SUBMIT = """
import json, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from myspinbot.graph.catalogue import Catalogue
from myspinbot.api.client import Client
from myspinbot.core import settings
client = Client(settings(), Catalogue(Path(os.environ["SPIN_PIPELINES_DIR"])))
def submit(_): return client.submit("fan", dict(names=["a"]), idempotency_key="the key").to_json()
with ThreadPoolExecutor(25) as ex:
    list(ex.map(lambda _: client.jobs(), range(25)))
    print("ready", flush=True)
    sys.stdin.readline()
    for job in ex.map(submit, range(25)): print(json.dumps(job, sort_keys=True))
"""


def test_same_submit_a_hundred_times_at_once_from_four_processes_is_one_job(farm):
    f = farm(TOYS)
    procs = [subprocess.Popen([sys.executable, "-c", SUBMIT], env=f.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
             for _ in range(4)]
    for p in procs: assert p.stdout.readline() == "ready\n"
    for p in procs:
        p.stdin.write("go\n")
        p.stdin.flush()
    answers = [line for p in procs for line in p.communicate(timeout=120)[0].splitlines()]
    assert len(answers) == 100 and len(set(answers)) == 1
    [job] = f.client.jobs()
    assert json.loads(answers[0])["id"] == job.id and [e.body["status"] for e in f.client.journal.events(job.id)] == ["queued"]
    assert f.client.bridge.stats()["jobs"] == 100  # hints may repeat: they say only that somebody should look


# --- cancel against the end

def test_cancel_racing_completion_a_thousand_times_has_one_winner(journal):
    held, r = running(journal, 1000), random.Random(1)

    def race(o: tuple[Job, StepRow]) -> str:
        job, row = o

        def complete() -> bool:
            time.sleep(r.random() * 0.002)
            journal.commit_step(job.id, "say", row.attempt, {"value": "x"})
            return journal.finish_job(job.id, job.epoch, "succeeded", {"value": "x"})

        def cancel() -> str:
            time.sleep(r.random() * 0.006)
            return journal.cancel_job(job.id).status
        finished, told = at_once(complete, cancel)
        now = journal.job(job.id)
        assert ends(journal, job.id) == [now.status] == [told] and finished == (now.status == "succeeded")
        [step] = journal.steps(job.id)
        assert now.outputs == ({"value": "x"} if finished else {}) and now.owner is None
        assert step.status == "succeeded" if finished else step.status in ("succeeded", "cancelled")
        assert step.outputs == ({"value": "x"} if step.status == "succeeded" else {})
        assert not journal.commit_step(job.id, "say", row.attempt, {"value": "late"}) or step.status == "succeeded"
        assert journal.steps(job.id) == [step]
        return f"{now.status}, step {step.status}"
    with ThreadPoolExecutor(3) as ex: seen = Counter(ex.map(race, held))
    assert sum(seen.values()) == 1000 and len(seen) == 3 and min(seen.values()) > 10, seen


def test_retry_racing_cancel_leaves_one_of_both(journal):
    seen: Counter = Counter()
    for job, row in running(journal, 150):
        journal.fail_step(job.id, "say", row.attempt, {"message": "boom"})
        journal.finish_job(job.id, job.epoch, "failed", error={"message": "boom"})
        answers = at_once(lambda: journal.retry_job(job.id), lambda: journal.cancel_job(job.id), lambda: journal.retry_job(job.id),  # noqa: B023
                          within_s=0.004)
        now, [step] = journal.job(job.id), journal.steps(job.id)
        told = [e for e in journal.events(job.id) if e.kind == "job"]
        assert told[-1].body["status"] == now.status in ("queued", "cancelled") and told[-1].body["epoch"] == now.epoch
        assert step.status == {"queued": "pending", "cancelled": "cancelled"}[now.status]
        states = [e.body["status"] for e in told][3:]  # after queued, running, failed
        assert all((a, b) in {("queued", "cancelled"), ("cancelled", "queued")} for a, b in itertools.pairwise(states))
        assert sum(o == "queued" for o in states) == sum(isinstance(o, Job) for o in answers[::2])
        assert not journal.commit_step(job.id, "say", row.attempt, {"value": "late"})
        seen[now.status] += 1
    assert len(seen) == 2, seen


def test_cancel_racing_completion_with_real_processes(farm):
    f, r = farm(TOYS, lease_s=6.0), random.Random(2)
    f.start("control")
    f.start("w1")
    f.done(f.client.submit("fan", dict(names=["warm"])).id)
    jobs = []
    for i in range(40):
        jobs.append(f.client.submit(one_step(f, "a", "b", tag=f"{i}")).id)
        time.sleep(r.random() * 0.25)  # somewhere on its way: this is the race, not a wait
        f.client.cancel(jobs[-1])
    seen = Counter(f.done(j, 60).status for j in jobs)
    wait_for("nothing left on the streams", lambda: all(o["length"] == 0 for o in f.client.bridge.stats()["streams"].values()), 30)
    for j in jobs:
        job, steps = f.client.job(j), {s.key: s.status for s in f.client.steps(j)}
        assert ends(f.client.journal, j) == [job.status] and bool(job.outputs) == (job.status == "succeeded")
        assert set(steps.values()) <= ({"succeeded"} if job.outputs else {"succeeded", "cancelled"}), steps
    assert seen["cancelled"] > 0 and set(seen) <= {"cancelled", "succeeded"}, seen


# --- cancel in every phase

def still(f: Farm, job: str) -> tuple:
    "All that the journal says of a job."
    return f.client.job(job), f.client.steps(job), f.client.journal.events(job)


def test_cancel_in_every_phase_of_a_job(farm, tmp_path):
    f, gate = farm(TOYS), lambda name: str(tmp_path / name)
    f.env["SPIN_SLOTS"] = "1"
    after: dict[str, tuple] = {}

    def cancel(phase: str, job: str) -> None:
        assert f.client.cancel(job).status == "cancelled", phase
        after[phase] = (job, *still(f, job))
        assert {s.status for s in after[phase][2]} <= STEP_END
    cancel("queued", f.client.submit(one_step(f, "q")).id)
    f.start("control")
    job = f.client.submit(one_step(f, "p")).id
    wait_for("the step is published", lambda: (s := f.step(job, "p")) and s.entry_id)
    cancel("before the claim", job)
    f.start("w1")

    job = f.client.submit(one_step(f, "mid", mid=gate("never"))).id
    wait_for("mid-cell", lambda: any(o[0] == "mid" for o in f.runs()))
    following = f.client.submit(one_step(f, "follow")).id
    began = time.time()
    cancel("mid-cell", job)
    f.done(following)
    [free] = [float(at) for name, word, _, at in f.runs() if (name, word) == ("follow", "start")]
    assert free - began < 5.0, f"the slot was free after {free - began:.1f} s"

    job = f.client.submit(one_step(f, "first", "second", first=gate("g1"))).id
    wait_for("the first step runs", lambda: any(o[0] == "first" for o in f.runs()))
    other = f.client.submit(one_step(f, "other", other=gate("g2"))).id
    wait_for("the other job waits for the slot", lambda: (s := f.step(other, "other")) and s.entry_id)
    Path(gate("g1")).touch()
    wait_for("one step done, the next one queued", lambda: (s := f.step(job, "second")) and s.status == "queued" and s.entry_id)
    cancel("between steps", job)
    Path(gate("g2")).touch()
    assert f.done(other).status == "succeeded"

    p = Pipeline("asks", catalogue=f.client.catalogue)
    p.step("toy.mark", id="later", name="later", after=[p.approve("Go on?", id="ask")])
    job = f.client.submit(p.to_graph()).id
    wait_for("the job asks", lambda: f.client.job(job).status == "waiting")
    cancel("waiting for an approval", job)
    f.client.approve(job, "ask", True)

    job = f.done(f.client.submit(one_step(f, "end")).id)
    before = still(f, job.id)
    assert f.client.cancel(job.id) == job and still(f, job.id) == before and job.status == "succeeded"

    f.done(f.client.submit(one_step(f, "last")).id)  # whatever was under way has passed
    wait_for("nothing left on the streams", lambda: all(o["length"] == 0 for o in f.client.bridge.stats()["streams"].values()), 30)
    for phase, (id, *then) in after.items(): assert still(f, id) == tuple(then), f"written after a cancel, {phase}"
    assert {o[0] for o in f.runs() if o[1] == "start"} == {"mid", "follow", "first", "other", "end", "last"}
    assert not [o for o in f.runs() if o[:2] == ["mid", "end"]]


class Held:
    "A place where a test holds a thread, and lets it go."
    def __init__(self): self.here, self.go = threading.Event(), threading.Event()
    def stop(self) -> None:
        self.here.set()
        assert self.go.wait(60)


@contextmanager
def inside(f: Farm, journal: Journal | None = None, store: Any = None) -> Iterator[Worker]:
    "A conductor and a worker in threads of this process, with a journal or store that waits where the test says."
    c, stop = f.client, threading.Event()
    parts = (journal or c.journal, c.bridge, c.events, store or c.store, c.catalogue)
    things = [Worker(*parts, "inner", f.cfg, drain_s=1.0), Conductor(*parts, "inner", f.cfg)]
    threads = [threading.Thread(target=o.run, args=(stop,)) for o in things]
    for t in threads: t.start()
    try: yield things[0]
    finally:
        stop.set()
        for t in threads: t.join(60)


def cancelled_at(f: Farm, held: Held, worker: Worker, graph: Graph) -> None:
    "Cancel while a worker is held at a place; what it does after that shows nowhere."
    job = f.client.submit(graph).id
    assert held.here.wait(60)
    assert f.client.cancel(job).status == "cancelled"
    then, began = still(f, job), time.monotonic()
    held.go.set()
    wait_for("the slot is free", lambda: not worker.entries, 5)
    assert time.monotonic() - began < 5 and still(f, job) == then and ends(f.client.journal, job) == ["cancelled"]
    assert [(s.status, s.outputs) for s in then[1]] == [("cancelled", {})]


def test_cancel_while_a_worker_stores_its_files(farm):
    f, held = farm(TOYS), Held()

    class Slow(LocalStore):
        def put_bytes(self, *args: Any, **kw: Any) -> Any:
            held.stop()
            return super().put_bytes(*args, **kw)
    with inside(f, store=Slow(f.home / "store")) as worker: cancelled_at(f, held, worker, one_step(f, "a"))


def test_cancel_while_a_worker_commits(farm):
    f, held = farm(TOYS), Held()

    class Slow(Journal):
        def commit_step(self, *args: Any, **kw: Any) -> bool:
            held.stop()
            return super().commit_step(*args, **kw)
    slow = Slow(f.cfg.postgres_url.get_secret_value())
    with inside(f, journal=slow) as worker: cancelled_at(f, held, worker, one_step(f, "a"))
    slow.close()


def test_cancel_between_claim_and_first_cell(farm):
    f, held = farm(TOYS), Held()

    class Slow(Journal):
        def claim_step(self, *args: Any, **kw: Any) -> StepRow | None:
            row = super().claim_step(*args, **kw)
            held.stop()
            return row
    slow = Slow(f.cfg.postgres_url.get_secret_value())
    with inside(f, journal=slow) as worker: cancelled_at(f, held, worker, one_step(f, "a"))
    slow.close()


def test_claim_is_kept_when_its_answer_is_lost_and_the_server_goes_away(farm):
    f = farm(TOYS, lease_s=2.0)
    f.cfg = f.cfg.model_copy(update=dict(slots=1))  # a worker with a free slot looks at its own entries, too
    journal, until = Journal(f.cfg.postgres_url.get_secret_value()), 0.0
    run, claim = journal.connections.run, journal.claim_step

    def reached(fn: Callable, reply_s: float | None = None) -> Any:
        if time.monotonic() < until: raise ServiceUnavailable("PostgreSQL is away.")
        return run(fn, reply_s)

    def cut_off(*args: Any, **kw: Any) -> StepRow | None:
        nonlocal until
        row = claim(*args, **kw)
        if until: return row
        until = time.monotonic() + 1.55 * f.cfg.lease_s
        raise ServiceUnavailable("The connection broke before the answer came.")
    journal.connections.run, journal.claim_step = reached, cut_off
    c = f.client
    with inside(f, journal=journal) as worker:
        job = c.submit(one_step(f, "a")).id
        wait_for("the claim", lambda: until)
        second, stop = Worker(journal, c.bridge, c.events, c.store, c.catalogue, "second", f.cfg, drain_s=1.0), threading.Event()
        taken, start = [], second.start
        second.start = lambda slots, entry: (taken.append(entry), start(slots, entry))
        thread = threading.Thread(target=second.run, args=(stop,))
        thread.start()
        assert f.done(job, 60).status == "succeeded"
        wait_for("the slot is free", lambda: not worker.entries, 5)
        stop.set()
        thread.join(60)
    [step] = f.client.steps(job)
    assert (step.attempt, step.lost, step.worker) == (1, 0, "inner") and not taken
    journal.close()


PONDERING = Held()


@control_step("toy.ponder", outputs=dict(value="str"))
async def ponder(ctx: Any) -> dict[str, str]:
    "Wait until the test lets go."
    import asyncio
    PONDERING.here.set()
    while not PONDERING.go.is_set(): await asyncio.sleep(0.02)
    return dict(value="pondered")


def test_cancel_in_a_control_step(farm):
    f = farm(TOYS)
    p = Pipeline("ponders", catalogue=f.client.catalogue)
    p.step("toy.mark", id="later", name=p.step("toy.ponder", id="ponder").value)
    with inside(f) as worker:
        job = f.client.submit(p.to_graph()).id
        assert PONDERING.here.wait(60)
        assert f.client.cancel(job).status == "cancelled"
        then = still(f, job)
        PONDERING.go.set()
        assert f.done(f.client.submit(one_step(f, "next")).id, 30).status == "succeeded"
        wait_for("the slot is free", lambda: not worker.entries, 5)
        assert still(f, job) == then and [s.status for s in then[1]] == ["cancelled"]


# --- two conductors, two workers

def test_two_workers_and_two_conductors_for_one_step_many_times(journal):
    "In the journal: eight at once for each job and for each step."
    for i in range(100):
        id = journal.submit(ONE, {"i": i}).id
        got = [o for o in at_once(*[lambda n=n: journal.lease_jobs(f"c{n}", 600, 1, job_id=id) for n in range(4)]) if o]  # noqa: B023
        [[job]] = got
        journal.queue_step(id, job.epoch, StepRow(job=id, key="say", node="say", step="toy.mark"))
        [row] = [o for o in at_once(*[lambda n=n: journal.claim_step(id, "say", f"w{n}", 600) for n in range(4)]) if o]  # noqa: B023
        done = at_once(*[lambda a=a: journal.commit_step(id, "say", a, {"value": a}) for a in (row.attempt, row.attempt - 1)])  # noqa: B023
        step = journal.step(id, "say")
        assert done == [True, False] and (step.attempt, step.lost, step.outputs) == (1, 0, {"value": 1})


def test_two_conductors_and_two_workers_with_every_message_twice(farm):
    f = farm(TOYS, lease_s=8.0)
    for n in ("control1", "control2", "w1", "w2"): f.start(n)
    jobs = [f.client.submit("fan", dict(names=[f"{i}a", f"{i}b"])).id for i in range(30)]
    doubled: set[tuple[str, str]] = set()
    while any(f.client.job(j).status not in JOB_END for j in jobs):  # bounded by the test's own limit
        for s in f.client.journal.queued_steps():
            if (s.job, s.key) in doubled: continue
            f.client.bridge.publish(s.queue, s.priority, StepMessage(job=s.job, key=s.key))
            doubled.add((s.job, s.key))
        time.sleep(0.005)
    wait_for("nothing left on the streams", lambda: all(o["length"] == 0 for o in f.client.bridge.stats()["streams"].values()), 30)
    rows = [s for j in jobs for s in f.client.steps(j)]
    assert {f.client.job(j).status for j in jobs} == {"succeeded"} and {f.client.job(j).epoch for j in jobs} == {1}
    assert {(s.status, s.attempt, s.lost) for s in rows} == {("succeeded", 1, 0)}
    starts = Counter(o[0] for o in f.runs() if o[1] == "start")
    assert set(starts.values()) == {1} and len(starts) == 60 and len(doubled) > 10, (len(doubled), starts.most_common(3))
    assert len({s.worker for s in rows}) == 2
