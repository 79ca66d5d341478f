"""The journal against a real PostgreSQL: races, fences, leases, lost connections, size."""
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from myspinbot.store.steps import step_params
from myspinbot.api.client import Client, migrate_journal
from myspinbot.core import ConfigError, Conflict, FenceLost, InputError, NotFound, ServiceUnavailable, Settings
from myspinbot.embedded import Embedded
from myspinbot.store.journal import Journal, end_params
from myspinbot.store.postgres import Connections
from myspinbot.schema import JOB_END, Artifact, Graph, Job, Node, ParamRef, Port, StepRow
from myspinbot.store.tables import MIGRATIONS, OldTables, bad_text, check_tables, mended, migrate, to_pg

GRAPH = Graph(name="hello", params=[Port(name="text", type="str", required=True)],
              nodes=[Node(id="say", step="speech.piper", inputs={"text": ParamRef(name="text")})])
ART = Artifact(sha256="a" * 64, size=3, media_type="audio/wav", name="voice.wav")
GONE = 0.0  # a lease that has run out when the call returns


@pytest.fixture
def job(journal: Journal) -> Job:
    "A leased job."
    journal.submit(GRAPH, {"text": "hello"})
    [job] = journal.lease_jobs("conductor", 60, 1)
    return job


def row(job: Job, key: str = "say", **kw: object) -> StepRow:
    return StepRow(**dict(job=job.id, key=key, node=key.partition("[")[0], step="speech.piper") | kw)


def states(journal: Journal, job: Job) -> tuple[str, dict[str, str]]:
    "The states that the events tell."
    told, steps = "", {}
    for e in journal.events(job.id):
        if e.kind == "job": told = e.body["status"]
        else: steps[e.key] = e.body["status"]
    return told, steps


@contextmanager
def cut_off(journal: Journal) -> Iterator[list[bool]]:
    "The next statement is committed, and its connection is ended by PostgreSQL before the answer; empty once that happened."
    run, cuts = journal.connections.run, [True]
    def cut(fn: Callable, reply_s: float | None = None) -> object:
        def told(c: psycopg.Connection) -> object:
            answer = fn(c)
            if cuts and cuts.pop(): c.execute("SELECT pg_terminate_backend(pg_backend_pid())")
            return answer
        return run(told, reply_s)
    journal.connections.run = cut
    try: yield cuts
    finally: journal.connections.run = run


# --- migrations

def test_many_processes_migrate_at_once(postgres_url):
    with ThreadPoolExecutor(6) as ex: done = list(ex.map(lambda _: Journal(postgres_url).migrate(), range(6)))
    assert sorted(done, key=len)[-1] == [n for n, *_ in MIGRATIONS] and sum(map(len, done)) == len(MIGRATIONS)


def test_broken_migration_leaves_nothing_and_newer_database_is_refused(postgres_url):
    c = Connections(postgres_url)
    with pytest.raises(psycopg.errors.SyntaxError):
        c.run(lambda o: migrate(o, [(1, "half", "CREATE TABLE half (i int); CREATE TABEL oops")]))
    assert c.run(lambda o: o.execute("SELECT to_regclass('half') AS t").fetchone())["t"] is None
    c.run(lambda o: migrate(o, [(1, "first", "SELECT 1"), (99, "from the future", "SELECT 1")]))
    with pytest.raises(ConfigError, match="migration 99"): Journal(postgres_url).migrate()
    with pytest.raises(ConfigError, match="migration 99"): Journal(postgres_url).check()


def test_rows_of_every_earlier_version_are_read(postgres_url: str) -> None:
    graph = Graph(name="g", params=[Port(name="text", type="str", le=9)]).to_json()
    graph["params"][0]["most"] = graph["params"][0].pop("le")  # as it was called
    known = len(MIGRATIONS)
    with psycopg.connect(postgres_url, autocommit=True, row_factory=psycopg.rows.dict_row) as c:
        for n in range(1, known + 1):
            migrate(c, MIGRATIONS[:n])
            if n == 1: c.execute("INSERT INTO graph VALUES ('h', %s)", [json.dumps(graph)])
            if n < known:
                with pytest.raises(OldTables, match=f"up to migration {n}; this MySpinBot needs {known}") as e: check_tables(c)
                assert "`myspinbot up`" in e.value.hint
            c.execute(f"""INSERT INTO job (id, pipeline, graph, params, request, {"no_cache" if n >= 5 else "fresh"})
                          VALUES (%s, 'g', 'h', '{{}}', '', '{{say}}')""", [f"job_{n}"])
        check_tables(c)
    with closing(Journal(postgres_url)) as j, pytest.warns(DeprecationWarning, match="most is called le now"):
        assert sorted((o.id, o.no_cache, o.graph.params[0].le) for o in j.jobs()) == [
            (f"job_{n}", ("say",), 9) for n in range(1, known + 1)]


def test_client_changes_no_tables_and_says_who_does(postgres_url: str, redis_url: str, tmp_path: Path) -> None:
    cfg = Settings(home=tmp_path, postgres_url=postgres_url, redis_url=redis_url)
    with pytest.raises(OldTables, match="no tables of MySpinBot yet"): Client(cfg)
    with psycopg.connect(postgres_url) as c:
        assert c.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)
    assert migrate_journal(cfg) == [n for n, *_ in MIGRATIONS] and migrate_journal(cfg) == []
    with Client(cfg) as c: assert c.jobs() == []


# --- submitting

def test_same_key_a_hundred_times_at_once_is_one_job(journal):
    def submit(i: int) -> str: return journal.submit(GRAPH, {"text": "hi"}, idempotency_key="k").id
    with ThreadPoolExecutor(12) as ex: ids = set(ex.map(submit, range(100)))
    assert len(ids) == 1 and len(journal.jobs()) == 1 and len(journal.events(ids.pop())) == 1


def test_same_key_for_another_request_is_a_conflict(journal):
    old = journal.submit(GRAPH, {"text": "hi"}, idempotency_key="k")
    for params, no_cache in (({"text": "ho"}, ()), ({"text": "hi"}, ("say",))):
        with pytest.raises(Conflict, match=old.id): journal.submit(GRAPH, params, idempotency_key="k", no_cache=no_cache)
    assert len(journal.jobs()) == 1


def test_submit_repeated_with_its_id_is_one_job(journal):
    assert journal.submit(GRAPH, {"text": "x"}, id="job_1") == journal.submit(GRAPH, {"text": "x"}, id="job_1")


@pytest.mark.parametrize(("params", "where"), [
    ({"text": "a\0b"}, "text holds"), ({"lines": ["a", {"b": "\ud800"}]}, r"lines\[1\].b holds"),
    ({"a\0": 1}, "a key at the top"), ({"x": float("nan")}, "Not a JSON"), ({"x": {1, 2}}, "Not a JSON")])
def test_what_postgres_cannot_hold_is_refused_by_name(journal, params, where):
    with pytest.raises(InputError, match=where): journal.submit(GRAPH, params)
    with pytest.raises(InputError, match="idempotency_key"): journal.submit(GRAPH, {}, idempotency_key="a\0")
    with pytest.raises(InputError, match="priority"): journal.submit(GRAPH, {}, priority="urgent")
    assert journal.jobs() == []


TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(st.none() | st.booleans() | NUMBERS | TEXTS,
                    lambda o: st.lists(o, max_size=4) | st.dictionaries(TEXTS, o, max_size=4), max_leaves=10)


@given(st.dictionaries(TEXTS.filter(lambda k: k != "kind"), JSON, max_size=4))
@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_comes_back_as_it_was_or_is_refused(journal, params):
    if "kind" in json.dumps(params): return
    if bad_text(params):
        with pytest.raises(InputError): journal.submit(GRAPH, params)
        params = mended(params)
    back = journal.job(journal.submit(GRAPH, params).id).params
    assert back == params and json.dumps(back) == json.dumps(params) and to_pg(params, mend=True) == to_pg(params)


def test_artifacts_and_references_come_back_as_models(journal, job):
    r = journal.queue_step(job.id, job.epoch, row(job, inputs={"a": ART, "l": [ART, 1]}, input_hash="h"))
    assert r.inputs == {"a": ART, "l": [ART, 1]}
    c = journal.claim_step(job.id, "say", "w", 60)
    assert journal.commit_step(job.id, "say", c.attempt, {"audio": ART, "n": 1}, ART, {"python": "3.11"})
    r = journal.step(job.id, "say")
    assert (r.outputs, r.notebook, r.record, r.seconds >= 0) == ({"audio": ART, "n": 1}, ART, {"python": "3.11"}, True)
    assert journal.find_cached("h") == r and journal.find_cached("") is None and journal.find_cached("other") is None
    assert journal.job(job.id).graph.to_json() == GRAPH.to_json()


# --- leases on jobs

def test_two_conductors_never_get_the_same_job(journal):
    for i in range(40): journal.submit(GRAPH, {"i": i})
    got: list[str] = []

    def take(name: str) -> None:
        while jobs := journal.lease_jobs(name, 60, 3): got.extend(j.id for j in jobs)
    with ThreadPoolExecutor(4) as ex: list(ex.map(take, "abcd"))
    assert len(got) == 40 == len(set(got)) and journal.orphan_jobs() == []


def test_high_priority_first_then_the_oldest(journal):
    for p in ("low", "normal", "high", "normal"): journal.submit(GRAPH, {}, priority=p)
    jobs = journal.lease_jobs("c", 60, 10)
    assert [j.priority for j in jobs] == ["high", "normal", "normal", "low"] and jobs[1].created_at < jobs[2].created_at
    assert {(j.status, j.epoch, j.owner) for j in jobs} == {("running", 1, "c")}


def test_expired_lease_gives_the_job_to_another_and_fences_the_first(journal):
    journal.submit(GRAPH, {})
    [a] = journal.lease_jobs("a", GONE, 1)
    assert journal.orphan_jobs() == [a.id]
    [b] = journal.lease_jobs("b", 60, 1)
    assert (b.id, b.epoch) == (a.id, a.epoch + 1) and journal.lease_jobs("c", 60, 1, job_id=a.id) == []
    for write in (journal.queue_step, journal.record_step):
        with pytest.raises(FenceLost, match=a.id): write(a.id, a.epoch, row(a))
    assert not journal.finish_job(a.id, a.epoch, "failed") and not journal.set_waiting(a.id, a.epoch, True)
    assert not journal.release_job(a.id, a.epoch) and journal.steps(a.id) == []
    assert journal.renew_jobs("a", {a.id: a.epoch}, 60) == {a.id: "lost"}
    assert journal.renew_jobs("b", {a.id: b.epoch, "job_x": 1}, 60) == {a.id: "ok", "job_x": "lost"}


def test_released_job_is_taken_without_waiting(journal, job):
    assert journal.release_job(job.id, job.epoch)
    [again] = journal.lease_jobs("other", 60, 1, job_id=job.id)
    assert again.epoch == job.epoch + 1 and again.started_at == job.started_at


def test_waiting_is_shown_and_survives_a_new_conductor(journal, job):
    assert journal.set_waiting(job.id, job.epoch, True) and journal.job(job.id).status == "waiting"
    journal.release_job(job.id, job.epoch)
    assert journal.lease_jobs("other", 60, 1)[0].status == "waiting"


# --- the end of a job

def test_cancel_racing_completion_has_one_winner(journal):
    for i in range(60): journal.submit(GRAPH, {"i": i})
    jobs = journal.lease_jobs("c", 60, 100)
    for j in jobs: journal.queue_step(j.id, j.epoch, row(j))
    wins: dict[str, list[str]] = {j.id: [] for j in jobs}

    def finish(j: Job) -> None:
        if journal.finish_job(j.id, j.epoch, "succeeded"): wins[j.id].append("succeeded")

    def cancel(j: Job) -> None:
        if journal.cancel_job(j.id).status == "cancelled": wins[j.id].append("cancelled")
    with ThreadPoolExecutor(8) as ex:
        list(ex.map(lambda f: f[0](f[1]), [(f, j) for j in jobs for f in (finish, cancel)]))
    for j in jobs:
        ends = [e.body["status"] for e in journal.events(j.id) if e.kind == "job" and e.body["status"] in JOB_END]
        assert ends == wins[j.id] == [journal.job(j.id).status]
        assert states(journal, j) == (journal.job(j.id).status, {"say": "cancelled"})


def test_step_that_comes_up_while_its_job_is_cancelled_does_not_stay_open(journal):
    for i in range(30): journal.submit(GRAPH, {"i": i})
    jobs = journal.lease_jobs("c", 60, 100)

    def queue(j: Job) -> None:
        for k in range(4):
            try: journal.queue_step(j.id, j.epoch, row(j, f"say[{k}]"))
            except FenceLost: return
    with ThreadPoolExecutor(8) as ex:
        list(ex.map(lambda f: f[0](f[1]), [(f, j) for j in jobs for f in (queue, lambda j: journal.cancel_job(j.id))]))
    assert {s.status for j in jobs for s in journal.steps(j.id)} <= {"cancelled"}


def test_cancel_stops_the_worker_at_its_next_heartbeat_and_refuses_its_result(journal, job):
    journal.queue_step(job.id, job.epoch, row(job))
    c = journal.claim_step(job.id, "say", "w", 60)
    assert journal.cancel_job(job.id).status == "cancelled" == journal.cancel_job(job.id).status
    assert journal.renew_steps([(job.id, "say", c.attempt)], 60) == {(job.id, "say", c.attempt): "cancelled"}
    assert not journal.commit_step(job.id, "say", c.attempt, {})
    assert journal.fail_step(job.id, "say", c.attempt, {"message": "x"}) is None
    assert journal.renew_jobs("conductor", {job.id: job.epoch}, 60) == {job.id: "cancelled"}


def test_retry_keeps_what_succeeded_and_fences_old_attempts(journal, job):
    for k in ("a", "b", "c"): journal.queue_step(job.id, job.epoch, row(job, k))
    a, b = (journal.claim_step(job.id, k, "w", 60) for k in "ab")
    journal.commit_step(job.id, "a", a.attempt, {"v": 1})
    journal.fail_step(job.id, "b", b.attempt, {"message": "boom"})
    journal.record_step(job.id, job.epoch, row(job, "d", status="skipped"))
    with pytest.raises(Conflict, match="running"): journal.retry_job(job.id)
    assert journal.finish_job(job.id, job.epoch, "failed", error={"message": "boom \0"})
    after = journal.retry_job(job.id)
    assert (after.status, after.error, after.ended_at) == ("queued", None, None)
    assert [(s.key, s.status) for s in journal.steps(job.id)] == [("a", "succeeded"), *((k, "pending") for k in "bcd")]
    [held] = journal.lease_jobs("other", 60, 1)
    assert journal.queue_step(job.id, held.epoch, row(job, "a")).status == "succeeded"
    again = journal.queue_step(job.id, held.epoch, row(job, "b", retries=1))
    assert (again.status, again.attempt, again.error) == ("queued", 1, None)
    assert again.retries == 2  # one retry in its new life, too
    assert not journal.commit_step(job.id, "b", b.attempt, {"v": "late"})
    assert journal.claim_step(job.id, "b", "w", 60).attempt == 2


def test_finish_is_true_again_after_a_lost_answer(journal, job):
    assert all(journal.finish_job(job.id, job.epoch, "succeeded", {"video": ART}) for _ in range(2))
    assert not journal.finish_job(job.id, job.epoch, "failed") and journal.job(job.id).outputs == {"video": ART}
    assert len(journal.events(job.id)) == 3


def test_only_an_ended_job_is_deleted_and_all_of_it_goes(journal, job):
    with pytest.raises(Conflict, match="running"): journal.delete_job(job.id)
    journal.queue_step(job.id, job.epoch, row(job))
    journal.ask(job.id, "say", "ok?")
    journal.cancel_job(job.id)
    journal.delete_job(job.id)
    assert (journal.steps(job.id), journal.events(job.id), journal.approval(job.id, "say")) == ([], [], None)
    for call in (journal.job, journal.cancel_job, journal.retry_job, journal.delete_job):
        with pytest.raises(NotFound, match=job.id): call(job.id)


def test_jobs_whose_lease_was_not_answered_come_again(journal):
    for i in range(3): journal.submit(GRAPH, {"i": i})
    with cut_off(journal) as cuts: jobs = journal.lease_jobs("a", 60, 2, token="t1")
    assert not cuts and [(j.epoch, j.owner, j.params["i"]) for j in jobs] == [(1, "a", 0), (1, "a", 1)]
    assert [j.params["i"] for j in journal.lease_jobs("a", 60, 2, token="t2")] == [2]   # another call of the same conductor
    assert [j.id for j in journal.lease_jobs("a", 60, 2, token="t1", expired=False)] == [j.id for j in jobs]
    assert journal.release_job(jobs[0].id, 1)                                           # who gives back holds nothing
    assert [j.epoch for j in journal.lease_jobs("b", 60, 2, token="t1", job_id=jobs[0].id)] == [2]
    assert [e.body["epoch"] for e in journal.events(jobs[1].id) if "epoch" in e.body] == [1]


# --- attempts

def test_two_workers_claim_one_step_and_one_gets_it(journal, job):
    for i in range(30): journal.queue_step(job.id, job.epoch, row(job, f"say[{i}]"))
    with ThreadPoolExecutor(8) as ex:
        got = list(ex.map(lambda n: journal.claim_step(job.id, f"say[{n % 30}]", f"w{n}", 60), range(120)))
    assert sum(o is not None for o in got) == 30 and {s.attempt for s in journal.steps(job.id)} == {1}


def test_claim_that_was_not_answered_is_found_again(journal, job):
    journal.queue_step(job.id, job.epoch, row(job))
    with cut_off(journal) as cuts: a = journal.claim_step(job.id, "say", "w", 60, token="t1")
    assert not cuts and (a.status, a.attempt, a.lost, a.worker) == ("running", 1, 0, "w")
    assert journal.claim_step(job.id, "say", "w", 60, token="t2") is None               # a second message of the same step
    assert journal.claim_step(job.id, "say", "w", 60) is None
    b = journal.claim_step(job.id, "say", "w", GONE, token="t1")
    assert (b.attempt, b.lost) == (1, 0) and [s.key for s in journal.expired_steps()] == ["say"]
    assert journal.requeue_expired()[0].lost == 1                                       # too late: this is another attempt
    c = journal.claim_step(job.id, "say", "w", 60, token="t1")
    assert (c.attempt, c.lost) == (2, 1) and journal.commit_step(job.id, "say", 2, {})
    assert journal.claim_step(job.id, "say", "w", 60, token="t1") is None
    told = [(e.body["status"], e.body.get("attempt")) for e in journal.events(job.id) if e.key == "say"]
    assert told == [("queued", None), ("running", 1), ("queued", 1), ("running", 2), ("succeeded", 2)]


def test_frozen_worker_changes_nothing(journal, job):
    journal.queue_step(job.id, job.epoch, row(job))
    a = journal.claim_step(job.id, "say", "a", GONE)
    b = journal.claim_step(job.id, "say", "b", 60)
    assert (b.attempt, b.lost, b.worker) == (2, 1, "b")
    assert not journal.commit_step(job.id, "say", a.attempt, {"v": "late"})
    assert journal.fail_step(job.id, "say", a.attempt, {"message": "late"}, retry=True) is None
    assert not journal.release_step(job.id, "say", a.attempt)
    both = {(job.id, "say", 1): "lost", (job.id, "say", 2): "ok"}  # one worker may hold both for a while
    assert journal.renew_steps(both, 60) == both
    assert journal.renew_steps([(job.id, "say", 1)], 60) == {(job.id, "say", 1): "lost"}
    for _ in range(2): assert journal.commit_step(job.id, "say", b.attempt, {"v": 1})  # true after a lost answer, too
    assert journal.claim_step(job.id, "say", "c", 60) is None and journal.step(job.id, "say").outputs == {"v": 1}


def test_renewed_lease_is_kept_and_expired_one_is_still_renewable_by_its_owner(journal, job):
    journal.queue_step(job.id, job.epoch, row(job))
    a = journal.claim_step(job.id, "say", "a", GONE)
    assert [s.key for s in journal.expired_steps()] == ["say"]
    assert journal.renew_steps([(job.id, "say", a.attempt)], 60) == {(job.id, "say", a.attempt): "ok"}
    assert journal.expired_steps() == [] and journal.claim_step(job.id, "say", "b", 60) is None


def test_failed_attempt_is_queued_again_unpublished(journal, job):
    journal.queue_step(job.id, job.epoch, row(job))
    journal.mark_published([(job.id, "say", "1-0")])
    a = journal.claim_step(job.id, "say", "a", 60)
    for _ in range(2):  # the second time after a lost answer
        r = journal.fail_step(job.id, "say", a.attempt, {"message": "out of memory"}, ART, {}, retry=True)
        assert (r.status, r.entry_id, r.worker, r.notebook) == ("queued", None, None, ART)
        assert r.error == {"message": "out of memory"}
    b = journal.claim_step(job.id, "say", "b", 60)
    r = journal.fail_step(job.id, "say", b.attempt, {"message": "again \0"})
    assert (r.status, r.error["message"], r.attempt) == ("failed", "again \ufffd", 2)
    assert states(journal, job)[1] == {"say": "failed"}


def test_handed_back_attempt_does_not_count(journal, job):
    journal.queue_step(job.id, job.epoch, row(job, retries=1))
    a = journal.claim_step(job.id, "say", "a", 60)
    assert journal.release_step(job.id, "say", a.attempt) and not journal.release_step(job.id, "say", a.attempt)
    r = journal.claim_step(job.id, "say", "b", 60)
    assert (r.attempt, r.lost) == (2, 0) and r.attempt - r.lost <= r.retries


def test_poison_step_is_not_given_to_a_fourth_worker(journal, job):
    journal.queue_step(job.id, job.epoch, row(job))
    for w in "abc": assert journal.claim_step(job.id, "say", w, GONE)
    assert journal.claim_step(job.id, "say", "d", 60) is None
    [r] = journal.requeue_expired()
    assert r.lost == 3 and journal.claim_step(job.id, "say", "d", 60) is None
    assert [s.key for s in journal.poisoned()] == ["say"]
    assert journal.fail_queued(job.id, "say", {"message": "took 3 workers"}).status == "failed"
    assert journal.fail_queued(job.id, "say", {}) is None and journal.poisoned() == []


def test_requeue_by_many_reconcilers_counts_each_loss_once(journal, job):
    for i in range(40):
        journal.queue_step(job.id, job.epoch, row(job, f"say[{i}]"))
        journal.claim_step(job.id, f"say[{i}]", "w", GONE)
    with ThreadPoolExecutor(4) as ex:
        got = [r for o in ex.map(lambda _: journal.requeue_expired(), range(4)) for r in o]
    assert len(got) == 40 and {r.lost for r in journal.steps(job.id)} == {1}


def test_control_step_has_no_lease_and_counts_its_runs(journal, job):
    run = row(job, status="running", attempt=1, worker="conductor")
    assert journal.record_step(job.id, job.epoch, run).attempt == 1
    assert journal.claim_step(job.id, "say", "w", 60) is None and journal.expired_steps() == []
    [other] = (journal.release_job(job.id, job.epoch) and journal.lease_jobs("other", 60, 1))
    assert journal.record_step(job.id, other.epoch, run).attempt == 2  # a successor runs it again
    journal.record_step(job.id, other.epoch, run.model_copy(update=dict(status="waiting")))
    r = journal.record_step(job.id, other.epoch, run.model_copy(update=dict(status="succeeded", outputs={"v": 1})))
    assert (r.status, r.attempt, r.outputs, r.seconds > 0) == ("succeeded", 2, {"v": 1}, True)
    assert journal.record_step(job.id, other.epoch, run).status == "succeeded"  # an ended row is left alone


def test_steps_of_many_jobs_go_in_one_statement_each_under_its_own_fence(journal):
    for i in range(3): journal.submit(GRAPH, {"i": i})
    a, b, c = journal.lease_jobs("conductor", 60, 3)
    journal.record_step(a.id, a.epoch, row(a, "done", status="succeeded", outputs={"v": 1}))
    journal.cancel_job(b.id)
    given = [(a, "done", a.epoch), (b, "say", b.epoch), (c, "say[10]", c.epoch), (c, "say[9]", c.epoch), (c, "x", 99)]
    got = journal.record_steps([step_params(row(j, key, status="running", attempt=1), epoch) for j, key, epoch in given])
    assert [o if isinstance(o, str) else type(o) for o in got] == ["succeeded", FenceLost, "running", "running", FenceLost]
    assert journal.step(a.id, "done").outputs == {"v": 1} and journal.steps(b.id) == []
    assert [r.key for r in journal.steps(c.id)] == ["say[10]", "say[9]"]  # in the order in which they came
    queued = journal.queue_steps([step_params(row(c, "q"), c.epoch), step_params(row(b, "q"), b.epoch)])
    assert queued[0] == journal.step(c.id, "q") and queued[0].status == "queued" and isinstance(queued[1], FenceLost)
    assert journal.record_steps([]) == [] == journal.queue_steps([])


def test_many_jobs_end_together_and_each_by_its_own_conductor(journal):
    for i in range(3): journal.submit(GRAPH, {"i": i})
    a, b, c = journal.lease_jobs("conductor", 60, 3)
    for j in (a, b, c): journal.queue_step(j.id, j.epoch, row(j))
    journal.cancel_job(b.id)
    ends = [end_params(a.id, a.epoch, "succeeded", {"v": ART}), end_params(b.id, b.epoch, "succeeded"),
            end_params(c.id, c.epoch, "failed", error={"message": "x"})]
    for _ in range(2): assert journal.finish_jobs(ends) == [True, False, True]  # the same after a lost answer
    assert [journal.job(j.id).status for j in (a, b, c)] == ["succeeded", "cancelled", "failed"]
    assert journal.job(a.id).outputs == {"v": ART} and journal.job(c.id).error == {"message": "x"}
    assert {s.status for j in (a, b, c) for s in journal.steps(j.id)} == {"cancelled"}


def test_earlier_results_are_found_for_many_hashes_at_once(journal, job):
    for key, h in (("a", "h1"), ("b", "h1"), ("c", "h2"), ("d", "")):
        journal.record_step(job.id, job.epoch, row(job, key, status="succeeded", input_hash=h, outputs={"key": key}))
    found = journal.find_cached_many(["h1", "h2", "h3", ""])
    assert {h: r.outputs["key"] for h, r in found.items()} == {"h1": "b", "h2": "c"}


def test_queued_steps_come_in_pages_that_leave_none_out(journal, job):
    rows = journal.queue_steps([step_params(row(job, f"say[{i}]"), job.epoch) for i in range(25)])  # all of one moment
    journal.mark_published([(r.job, r.key, f"{i}-0") for i, r in enumerate(rows)])
    seen, last = [], None
    while page := journal.queued_steps(last, 10):
        seen += [o.key for o in page]
        last = page[-1]
    assert seen == [r.key for r in rows]


# --- streams

def test_rows_are_published_once_marked_and_found_when_their_entry_is_gone(journal, job):
    rows = [journal.queue_step(job.id, job.epoch, row(job, f"say[{i}]")) for i in range(4)]
    assert [r.key for r in journal.unpublished(older_s=0)] == [r.key for r in rows]
    assert journal.unpublished(older_s=60) == []
    assert journal.mark_published([(r.job, r.key, f"{i}-0") for i, r in enumerate(rows)]) == 4
    assert journal.unpublished(0) == [] and [r.entry_id for r in journal.queued_steps()] == ["0-0", "1-0", "2-0", "3-0"]
    journal.claim_step(job.id, "say[0]", "w", 60)
    assert journal.mark_published([(job.id, "say[0]", "9-0")]) == 0  # claimed meanwhile
    assert journal.unpublish([(job.id, "say[1]", "1-0"), (job.id, "say[2]", "old"), (job.id, "say[0]", "0-0")]) == 1
    assert [r.key for r in journal.unpublished(0)] == ["say[1]"]
    assert journal.mark_published([]) == journal.unpublish([]) == 0 and journal.renew_steps([], 60) == {}


def test_waiting_results_gives_the_ended_ones_in_one_query(journal, job):
    for k in "ab": journal.queue_step(job.id, job.epoch, row(job, k))
    journal.commit_step(job.id, "a", journal.claim_step(job.id, "a", "w", 60).attempt, {})
    assert [r.key for r in journal.waiting_results([(job.id, "a"), (job.id, "b"), (job.id, "c")])] == ["a"]
    assert journal.waiting_results([]) == []


# --- approvals and events

def test_question_is_asked_once_and_answered_once(journal, job):
    with pytest.raises(NotFound): journal.decide(job.id, "say", True)
    journal.ask(job.id, "say", "Is the script good?", {"script": "hello"})
    journal.ask(job.id, "say", "another wording")
    a = journal.approval(job.id, "say")
    assert (a["prompt"], a["show"], a["approved"]) == ("Is the script good?", {"script": "hello"}, None)
    for _ in range(2): assert journal.decide(job.id, "say", False, "ann", "too long")["by"] == "ann"
    with pytest.raises(Conflict, match="refused by ann"): journal.decide(job.id, "say", True, "bob")
    journal.finish_job(job.id, job.epoch, "failed")
    journal.retry_job(job.id)
    assert journal.approval(job.id, "say") is None


def test_follower_misses_no_event_of_concurrent_writers(journal, job):
    """Sequence numbers are given before commits happen: one that commits late must not be skipped."""
    n, stop, seen = 240, threading.Event(), []

    def follow() -> None:
        last = 0
        while True:
            ended = stop.is_set()
            for e in journal.events(job.id, after=last):
                seen.append(e)
                last = e.seq
            if ended: return
    t = threading.Thread(target=follow)
    t.start()
    with ThreadPoolExecutor(8) as ex:
        list(ex.map(lambda i: journal.queue_step(job.id, job.epoch, row(job, f"say[{i}]")), range(n)))
    stop.set()
    t.join(20)
    assert seen == journal.events(job.id) and len(seen) == n + 2


def test_events_of_one_job_are_numbered_in_the_order_of_their_commits(journal, job, postgres_url):
    journal.queue_step(job.id, job.epoch, row(job))
    attempt = journal.claim_step(job.id, "say", "w", 60).attempt
    first, began = journal.events(job.id)[-1].seq, threading.Event()
    with psycopg.connect(postgres_url) as c, ThreadPoolExecutor(1) as ex:
        c.execute("UPDATE job SET status = 'waiting' WHERE id = %s", [job.id])  # has its number, is not committed
        later = ex.submit(lambda: began.set() or journal.commit_step(job.id, "say", attempt, {}))
        began.wait()
        with psycopg.connect(postgres_url, autocommit=True) as look:
            end = time.monotonic() + 20
            while not look.execute("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted").fetchone():
                assert time.monotonic() < end and not later.done()
        assert journal.events(job.id, after=first) == []
        c.commit()
        assert later.result(20)
    assert [(e.kind, e.body["status"]) for e in journal.events(job.id, after=first)] == [("job", "waiting"),
                                                                                       ("step", "succeeded")]


# --- many rows

def test_pages_of_a_long_history_are_quick(journal):
    body = to_pg(GRAPH)
    with psycopg.connect(journal.connections.url, autocommit=True) as c:
        c.execute("INSERT INTO graph VALUES ('h', %s)", [body])
        c.execute("ALTER TABLE job DISABLE TRIGGER USER")
        c.execute("""INSERT INTO job (id, pipeline, graph, params, request, status, created_at, ended_at)
            SELECT 'job_' || i, CASE i % 2 WHEN 0 THEN 'hello' ELSE 'other' END, 'h', '{"text": "x"}', '',
              CASE i % 100 WHEN 0 THEN 'failed' ELSE 'succeeded' END, now() + i * interval '1 ms', now()
            FROM generate_series(1, 100000) i""")
        c.execute("ANALYZE job")
    took = {}
    asked = dict(first={}, deep=dict(before="job_500"), failed=dict(status="failed"), other=dict(pipeline="other"),
                 nothing=dict(parent="job_x"), both=dict(status="failed", pipeline="hello"))
    for name, kw in asked.items():
        t = time.perf_counter()
        jobs = journal.jobs(**kw)
        took[name] = time.perf_counter() - t
        assert len(jobs) == (0 if name == "nothing" else 50)
        assert jobs == sorted(jobs, key=lambda j: j.created_at, reverse=True)
    t = time.perf_counter()
    assert journal.stats()["jobs"] == {"succeeded": 99000, "failed": 1000}
    took["stats"] = time.perf_counter() - t
    assert max(took.values()) < 0.2, took


def test_pages_follow_each_other_without_gap(journal):
    ids = [journal.submit(GRAPH, {"i": i}).id for i in range(25)]
    seen, before = [], None
    while page := journal.jobs(limit=10, before=before):
        seen += [j.id for j in page]
        before = page[-1].id
    assert seen == ids[::-1]


# --- connections

def test_cut_connections_are_replaced_without_an_error(journal, postgres_url):
    with ThreadPoolExecutor(6) as ex: list(ex.map(lambda _: journal.stats(), range(24)))
    with psycopg.connect(postgres_url, autocommit=True) as c:
        cut = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
            WHERE application_name = 'myspinbot' AND datname = current_database()"""
        for i in range(5):
            c.execute(cut)
            assert journal.submit(GRAPH, {"i": i}).status == "queued"
    assert len(journal.jobs()) == 5


def test_failed_transaction_does_not_poison_its_connection(journal, job):
    with pytest.raises(psycopg.errors.CheckViolation): journal.finish_job(job.id, job.epoch, "done")
    assert journal.job(job.id).status == "running" and journal.finish_job(job.id, job.epoch, "failed")


def test_server_that_is_killed_is_unavailable_and_comes_back():
    with tempfile.TemporaryDirectory(prefix="spin") as d:
        servers = Embedded(d)
        try:
            journal = Journal(servers.start().postgres_url)
            journal.migrate()
            job = journal.submit(GRAPH, {"text": "kept"})
            servers.postgres_process().send_signal(signal.SIGKILL)
            t = time.perf_counter()
            with pytest.raises(ServiceUnavailable, match="does not answer"):
                while True: journal.job(job.id)
            assert time.perf_counter() - t < 5
            servers.start()
            assert journal.job(job.id) == job
        finally: servers.stop()


def test_wrong_address_and_password_say_so_and_keep_the_secret(postgres_url):
    for url, said in (("postgresql://me:secret@127.0.0.1:9/x", "Connection refused"),
                      (postgres_url.replace("dbname=t_", "dbname=no_"), "does not exist")):
        with pytest.raises(ServiceUnavailable, match=said) as e: Journal(url).stats()
        assert "secret" not in str(e.value)
    with pytest.raises(InputError, match="not a PostgreSQL URL"): Journal("postgres//x").stats()


def test_forked_child_uses_its_own_connections(journal, job):
    code = """
import os, sys
from myspinbot.store.journal import Journal, end_params
j = Journal(sys.argv[1])
j.stats()
pid = os.fork()
for _ in range(50): assert j.job(sys.argv[2]).id == sys.argv[2]
if not pid: os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code, journal.connections.url, job.id], check=True, timeout=60)
