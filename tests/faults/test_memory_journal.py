"""The simulation's journal answers as the real one does: both are driven by the same random calls and compared whole.

PostgreSQL's clock is a table here: `clock_timestamp()` of a schema that stands before `pg_catalog` in the search path. So leases
run out and rows grow old in both journals at the same moments, and times are compared, too.
"""
import random
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import psycopg
import pytest
from memory_journal import START, MemoryJournal, moment

from myspinbot.store.steps import Place, step_params
from myspinbot.core import SpinError
from myspinbot.store.journal import Journal, end_params
from myspinbot.schema import Artifact, Graph, Job, Node, ParamRef, Port, StepRow, dump_value

GRAPHS = [Graph(name=name, params=[Port(name="text", type="str", required=True)],
                nodes=[Node(id="say", step="speech.piper", inputs={"text": ParamRef(name="text")})]) for name in ("one", "two")]
ART = Artifact(sha256="a" * 64, size=3, media_type="audio/wav", name="voice.wav")
FAKE = """CREATE SCHEMA sim; CREATE TABLE sim.clock (at timestamptz); INSERT INTO sim.clock VALUES ('2030-01-01Z');
    CREATE FUNCTION sim.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS 'SELECT at FROM sim.clock'"""
JOBS, KEYS, IDS, WORKERS = ("job_a", "job_b", "job_c"), ("say", "say[0]", "mix"), ("1-0", "2-0"), ("w1", "w2")
ERRORS = ({"message": "boom"}, {"message": "a NUL \0", "type": "StepFailed"})


class Both:
    "The real journal and the one in memory, on one clock."
    def __init__(self, url: str):
        with psycopg.connect(url, autocommit=True) as c: c.execute(FAKE)
        self.real = Journal(psycopg.conninfo.make_conninfo(url, options="-c search_path=sim,pg_catalog -c synchronous_commit=off"))
        self.real.migrate()
        self.clock = psycopg.connect(url, autocommit=True, options="-c synchronous_commit=off")
        self.start()

    def start(self) -> None:
        self.clock.execute("TRUNCATE sim.job, sim.step, sim.approval, sim.event, sim.graph, sim.code, sim.learned")
        self.now = 0.0
        self.memory = MemoryJournal(lambda: self.now)

    def call(self, name: str, *args: Any, **kw: Any) -> tuple[Any, Any]:
        "One call on both, a little later; gives both answers."
        step = random.choice((0.001, 0.001, 0.5, 4.0)) if random.random() < 0.99 else random.choice((-86400.0, -60.0, 3600.0))
        self.now = round(self.now + step, 3)  # somebody sets the clock now and then
        self.clock.execute("UPDATE sim.clock SET at = %s", [moment(self.now)])
        return tuple(answer(getattr(j, name), *args, **kw) for j in (self.real, self.memory))

    def rows(self) -> tuple[Any, Any]:
        "All that stands in both."
        sql = self.clock.execute
        jobs = sql("SELECT id, owner, epoch, lease_until FROM sim.job ORDER BY id").fetchall()
        steps = sql("SELECT job, key, attempt, lost, lease_until FROM sim.step ORDER BY job, key").fetchall()
        m = self.memory
        real = [jobs, steps, *([plain(f(id)) for id in JOBS] for f in (self.real.steps, lambda id: self.told(self.real, id)))]
        twin = [sorted((j["id"], j["owner"], j["epoch"], moment(j["lease_until"])) for j in m.job_rows.values()),
                sorted((s["job"], s["key"], s["attempt"], s["lost"], moment(s["lease_until"])) for s in m.step_rows.values()),
                *([plain(f(id)) for id in JOBS] for f in (m.steps, lambda id: self.told(m, id)))]
        return real, twin

    def told(self, journal: Any, job: str) -> dict[str, list]:
        "The events of a job, by step; a statement that changes several steps tells them in no given order."
        found: dict[str, list] = {}
        for e in journal.events(job): found.setdefault(e.key, []).append((e.kind, e.body, e.at))
        return found


def answer(fn: Any, *args: Any, **kw: Any) -> Any:
    "What a call gives, or the kind of error that it raises."
    try: return plain(fn(*args, **kw))
    except SpinError as e: return type(e).__name__


def plain(v: Any) -> Any:
    "Rows as data; lists of rows that have an order in the contract keep it."
    if isinstance(v, Place): return asdict(v) | dict(n=0)  # it says only which came first
    if isinstance(v, Exception): return type(v).__name__
    if isinstance(v, Job | StepRow):
        return v.model_dump(mode="json", exclude={"graph"}) | dict(graph=getattr(v, "graph", None) and v.graph.name)
    if isinstance(v, list | tuple): return [plain(o) for o in v]
    return {k: plain(o) for k, o in v.items()} if isinstance(v, dict) else dump_value(v)


def new_row(r: random.Random, job: str) -> StepRow:
    key = r.choice(KEYS)
    status = r.choice(("running", "running", "waiting", "succeeded", "failed", "skipped", "cached"))
    return StepRow(job=job, key=key, node=key.partition("[")[0], step="speech.piper", status=status,
                   input_hash=r.choice(("", "h1", "h2")), code=r.choice(("", "c1")),
                   attempt=r.choice((0, 1)), worker=r.choice((None, "c1")), inputs=r.choice(({}, {"a": ART, "l": [ART, 1]})),
                   outputs=r.choice(({}, {"v": 1})), error=r.choice((None, *ERRORS)), notebook=r.choice((None, ART)),
                   origin=r.choice((None, "job_x/say")), record={"python": "3\0"}, retries=r.choice((0, 1)),
                   priority=r.choice(("high", "normal")), queue=r.choice(("cpu", "gpu")))


def calls(r: random.Random, m: MemoryJournal) -> Iterator[tuple[str, tuple, dict]]:
    "Endless random calls; most of them aim at what is there: the latest epoch or attempt, or the one before."
    def job() -> str: return r.choice(JOBS[:2] if r.random() < 0.85 else JOBS)
    def epoch(id: str) -> int: return m.job_rows.get(id, {}).get("epoch", 0) - (r.random() < 0.15)
    def attempt(id: str, key: str) -> int: return m.step_rows.get((id, key), {}).get("attempt", 1) - (r.random() < 0.25)
    def lease() -> float: return r.choice((0.1, 2.0, 60.0))
    def many(status: str = "failed") -> dict:  # of different steps
        found = next(o for o in iter(lambda: new_row(r, job()), None) if (o.job, o.key) not in used)
        used.add((found.job, found.key))
        return step_params(found, epoch(found.job)) | dict(status=status)
    while True:
        used: set[tuple[str, str]] = set()
        id, key = job(), r.choice(KEYS)
        e, a, out = epoch(id), attempt(id, key), r.choice(({}, {"v": 1}, {"v": ART}, {"v": "\0"}))
        pairs = [(j, k, m.step_rows.get((j, k), {}).get("entry_id") or r.choice(IDS))
                 for j, k in ((job(), k) for k in r.sample(KEYS, 2))]
        yield r.choice(
            [  # weights by repetition
                (
                    "submit",
                    (r.choice(GRAPHS), {"text": r.choice("xy")}),
                    dict(
                        id=id,
                        priority=r.choice(("high", "normal", "low", "odd")),
                        parent=r.choice((None, "job_a")),
                        no_cache=r.choice(((), ("say",))),
                    ),
                ),
                ("submit", (GRAPHS[0], {"text": "x"}), dict(id="job_c", idempotency_key="k")),
                ("job", (id,), {}),
                (
                    "jobs",
                    (r.choice((None, "running", "failed")), r.choice((None, "one"))),
                    dict(limit=2, before=r.choice((None, job())), parent=r.choice((None, None, "job_a"))),
                ),
                *[
                    (
                        "lease_jobs",
                        (r.choice("cd"), lease(), r.choice((1, 5))),
                        dict(job_id=r.choice((None, id)), expired=r.random() < 0.8, token=r.choice((None, "t1", "t2"))),
                    )
                ]
                * 2,
                ("now", (), {}),
                ("orphan_jobs", (), {}),
                ("renew_jobs", (r.choice("cd"), {i: epoch(i) for i in {id, job(), "job_no"}}, lease()), {}),
                ("release_job", (id, e), {}),
                ("set_waiting", (id, e, r.random() < 0.5), {}),
                *(
                    [
                        (
                            "finish_job",
                            (id, e, r.choice(("succeeded", "failed", "failed"))),
                            dict(outputs=out, error=r.choice((None, *ERRORS))),
                        ),
                        (
                            "finish_jobs",
                            (
                                [
                                    end_params(i, epoch(i), "failed", {"v": 1}, r.choice(ERRORS))
                                    for i in r.sample(JOBS, 2)
                                ],
                            ),
                            {},
                        ),
                        ("cancel_job", (id,), {}),
                        ("delete_job", (id,), {}),
                    ]
                    if r.random() < 0.25
                    else []
                ),
                *[("retry_job", (id,), {})] * 2,
                ("ask", (id, key, "ok? \0", r.choice((None, ART))), {})
                if id in m.job_rows
                else ("orphan_jobs", (), {}),
                ("approval", (id, key), {}),
                ("decide", (id, key, r.random() < 0.7, "me"), {}),
                ("step", (id, key), {}),
                ("queue_steps", ([many("queued") for _ in "ab"],), {}),
                ("record_steps", ([many() for _ in "ab"],), {}),
                ("find_cached_many", (["h1", "", "h2"],), {}),
                ("waiting_results", ([(job(), k) for k in r.sample(KEYS, 2)],), {}),
                ("find_cached", (r.choice(("", "h1", "h2")),), {}),
                *[("queue_step", (id, e, new_row(r, id)), {})] * 4,
                *[("record_step", (id, e, new_row(r, id)), {})] * 2,
                *[("claim_step", (id, key, r.choice(WORKERS), lease()), dict(token=r.choice((None, "t1", "t2"))))] * 6,
                ("renew_steps", ([(id, k, attempt(id, k)) for k in KEYS] + [(id, "no", 1)], lease()), {}),
                *[
                    (
                        "commit_step",
                        (id, key, a, out, r.choice((None, ART)), {"s": 1}),
                        r.choice(({}, {"input_hash": "h2", "code": "c2"})),
                    )
                ]
                * 2,
                ("keep_codes", ({r.choice(("c1", "c2")): {"a": r.random()}},), {}),
                ("code", (r.choice(("c1", "c2")),), {}),
                ("learn", (r.choice("st"), {"modules": [r.choice("ab")]}), {}),
                ("learned", (["s", "t"],), {}),
                *[
                    (
                        "fail_step",
                        (id, key, a, r.choice(ERRORS)),
                        dict(retry=r.random() < 0.6, notebook=r.choice((None, ART))),
                    )
                ]
                * 2,
                *[("release_step", (id, key, a), {})] * 3,
                *[("mark_published", (pairs,), {}), ("unpublish", (pairs,), {})] * 2,
                ("unpublished", (r.choice((0.0005, 1.0)),), {}),
                ("queued_steps", (), {}),
                ("expired_steps", (), {}),
                ("requeue_expired", (r.choice((1, 100)),), {}),
                ("poisoned", (r.choice((1, 1, 2)),), {}),
                ("fail_queued", (id, key, r.choice(ERRORS)), {}),
            ]
        )


UNORDERED = {
    "waiting_results",
    "requeue_expired",
    "poisoned",
    "expired_steps",
}  # one moment for several rows: any order among them
OLDEST_FIRST = {"unpublished", "queued_steps"}


def compare(both: Both, seed: int, n: int) -> dict[str, int]:
    "Drive both; gives how often each call changed or found something."
    r = random.Random(seed)
    random.seed(seed)
    both.start()
    some: dict[str, int] = {}
    for i, (name, args, kw) in zip(range(n), calls(r, both.memory)):
        real, twin = both.call(name, *args, **kw)
        if name in OLDEST_FIRST: assert [s["at"] for s in real] == [s["at"] for s in twin]
        if name in UNORDERED | OLDEST_FIRST: real, twin = (sorted(o, key=lambda s: (s["job"], s["key"])) for o in (real, twin))
        assert real == twin, f"seed {seed}, call {i}: {name}{args}{kw}"
        some[name] = some.get(name, 0) + (real is None if name == "delete_job" else bool(real) and not isinstance(real, str))
        if i % 20 == 19 or i == n - 1:
            real, twin = both.rows()
            assert real == twin, f"seed {seed}, after call {i}: {name}{args}{kw}"
    return some


@pytest.fixture
def both(postgres_url: str) -> Iterator[Both]:
    b = Both(postgres_url)
    yield b
    b.real.close()
    b.clock.close()


def test_twin_answers_as_postgresql_does(both):
    total: dict[str, int] = {}
    for seed in range(50):
        for name, k in compare(both, seed, 300).items(): total[name] = total.get(name, 0) + k
    assert START == moment(0.0) and min(total.values()) >= 5, sorted(total.items(), key=lambda o: o[1])[:9]


@pytest.mark.parametrize("name", ["commit_step", "claim_step", "retry_job", "requeue_expired", "finish_jobs"])
def test_a_twin_that_is_wrong_in_one_call_is_found(both, monkeypatch, name):
    def wrong(self: MemoryJournal, *args: Any, **kw: Any) -> Any:
        if name == "commit_step": args = (*args[:2], self.step_rows.get(args[:2], {}).get("attempt", 0), *args[3:])  # no fence
        if name == "claim_step": kw["max_lost"] = 1
        found = right(self, *args, **kw)
        if name == "retry_job": self.step_rows[(args[0], "say")]["lost"] = 1
        if name == "requeue_expired" and found: self.step_rows[found[0].job, found[0].key]["lost"] -= 1
        if name == "finish_jobs" and found[0]: self.job_rows[args[0][0]["job"]]["owner"] = "c"
        return found
    right = getattr(MemoryJournal, name)
    monkeypatch.setattr(MemoryJournal, name, wrong)
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(40): compare(both, seed, 300)
