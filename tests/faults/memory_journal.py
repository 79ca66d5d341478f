"""The journal without PostgreSQL: the same methods and answers over plain dictionaries, for the simulation.

`test_memory_journal.py` drives it beside the real journal and compares every answer and every row.
"""
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from myspinbot.store.steps import MAX_LEASE_S, MAX_LOST, Place, fenced, step_params
from myspinbot.core import Conflict, FenceLost, NotFound, hash_json, new_id
from myspinbot.store.journal import Journal
from myspinbot.schema import JOB_END, PRIORITIES, STEP_END, Artifact, Event, Graph, Job, StepRow
from myspinbot.schema import check_priority, dump_value, parse_value
from myspinbot.store.tables import mended, to_pg

START = datetime(2030, 1, 1, tzinfo=UTC)
JOB_FIELDS, STEP_FIELDS = tuple(Job.model_fields), tuple(StepRow.model_fields)
TIMES = ("queued_at", "started_at", "ended_at", "created_at")
RECORDED = ("status", "version", "worker", "input_hash", "source_hash", "code", "inputs", "outputs", "error", "notebook",
            "origin", "record")
QUEUED = ("version", "queue", "priority", "input_hash", "source_hash", "code", "inputs", "weight", "timeout_s")
GIVEN = ("job", "key", "node", "step", "version", "queue", "status", "attempt", "worker", "input_hash", "source_hash", "code",
         "origin", "weight", "retries", "timeout_s")
Row = dict[str, Any]


def moment(seconds: float | None) -> datetime | None:
    "The virtual clock's seconds as a time."
    return None if seconds is None else START + timedelta(seconds=seconds)


def value(text: str | None, default: Any = None) -> Any:
    "What a JSON column gives back."
    return default if text is None else parse_value(json.loads(text))


def given(o: Mapping[str, Any]) -> Row:
    "The row that `step_params` describes."
    began = o["started_at"] and (datetime.fromisoformat(o["started_at"]) - START).total_seconds()
    row = {k: o[k] for k in GIVEN} | dict(priority=PRIORITIES[o["rank"]], started_at=began)
    return row | {k: value(o[k]) for k in ("inputs", "outputs", "error", "notebook", "record")}


def again(row: Row, token: str | None) -> bool:
    "Did this very claim take the lease?"
    return token is not None and row["lease_until"] is not None and row.get("claim") == token


class MemoryJournal:
    "Jobs, steps, events and approvals in this process; every call is one transaction."
    def __init__(self, clock: Callable[[], float], wall: Callable[[], float] | None = None):
        self.wall = wall or clock  # what an onlooker's clock says, which nobody sets
        self.clock, self.transaction, self.new_id = clock, 0, new_id
        self.job_rows: dict[str, Row] = {}
        self.step_rows: dict[tuple[str, str], Row] = {}
        self.by_job: dict[str, dict[str, Row]] = {}
        self.keys: dict[str, str] = {}              # idempotency key -> job
        self.approvals: dict[tuple[str, str], Row] = {}
        self.codes: dict[str, Row] = {}             # hash -> what a step was made of
        self.lessons: dict[str, Row] = {}           # source -> what runs of it found out
        self.told: list[Row] = []                   # events, each with the number of its transaction

    # --- rows, and the triggers that write events

    def change_job(self, j: Row, **to: Any) -> None:
        "Update a job, as one UPDATE statement."
        told = (to.get("status", j["status"]), to.get("epoch", j["epoch"])) != (j["status"], j["epoch"])
        j.update(to)
        if told: self.job_event(j)

    def job_event(self, j: Row) -> None:
        body = dict(status=j["status"], owner=j["owner"], epoch=j["epoch"] or None, error=(j["error"] or {}).get("message"))
        self.tell(j["id"], "job", "", body)

    def change_step(self, s: Row, **to: Any) -> Row:
        "Update a step, as one UPDATE statement."
        told = (to.get("status", s["status"]), to.get("attempt", s["attempt"])) != (s["status"], s["attempt"])
        s.update(to)
        if told: self.step_event(s)
        return s

    def step_event(self, s: Row) -> None:
        self.tell(s["job"], "step", s["key"], dict(status=s["status"], step=s["step"], attempt=s["attempt"] or None,
            lost=s["lost"] or None, worker=s["worker"], origin=s["origin"], error=(s["error"] or {}).get("message")))

    def tell(self, job: str, kind: str, key: str, body: Row) -> None:
        self.told.append(dict(seq=len(self.told) + 1, job=job, kind=kind, key=key, at=self.clock(), seen=self.wall(),
                              transaction=self.transaction,
                              body={k: v for k, v in body.items() if v is not None}))

    def live(self, job: str, epoch: int | None = None) -> Row | None:
        "A job that has not ended, fenced by its epoch."
        j = self.job_rows.get(job)
        return j if j and j["status"] not in JOB_END and epoch in (None, j["epoch"]) else None

    def as_step(self, s: Row) -> StepRow:
        d = {k: s[k] for k in STEP_FIELDS}
        for k in TIMES[:3]: d[k] = moment(d[k])
        return StepRow.model_construct(**d)

    def as_job(self, j: Row) -> Job:
        d = {k: j[k] for k in JOB_FIELDS}
        for k in TIMES[1:]: d[k] = moment(d[k])
        return Job.model_construct(**d)

    def in_order(self, status: str, when: Callable[[Row], bool], by: str = "queued_at") -> list[Row]:
        "Steps of a status, oldest first."
        return sorted((s for s in self.step_rows.values() if s["status"] == status and when(s)), key=lambda s: (s[by], s["n"]))

    # --- jobs

    def submit(self, graph: Graph, params: Mapping[str, Any], *, priority: str = "normal", idempotency_key: str | None = None,
               parent: str | None = None, no_cache: Sequence[str] = (), id: str | None = None) -> Job:
        self.transaction += 1
        check_priority(priority)
        to_pg(dict(params, idempotency_key=idempotency_key, parent=parent, id=id))
        id, plain = id or self.new_id(), graph.to_json()
        request = hash_json([plain, dump_value(dict(params)), list(no_cache)])
        if old := self.job_rows.get(id) or self.job_rows.get(self.keys.get(idempotency_key, "")):
            if old["request"] != request: raise Conflict(f"The idempotency key {idempotency_key or id!r} belongs to {old['id']}.")
            return self.as_job(old)
        j = dict(id=id, graph=graph, params=dict(params), status="queued", priority=priority, idempotency_key=idempotency_key,
                 parent=parent, no_cache=tuple(no_cache), outputs={}, error=None, epoch=0, owner=None, lease_until=None,
                 request=request, created_at=self.clock(), started_at=None, ended_at=None)
        self.job_rows[id], self.by_job[id] = j, {}
        if idempotency_key is not None: self.keys[idempotency_key] = id
        self.job_event(j)
        return self.as_job(j)

    def job(self, id: str) -> Job:
        if id not in self.job_rows: raise NotFound(f"No job {id!r}.")
        return self.as_job(self.job_rows[id])

    def jobs(self, status: str | None = None, pipeline: str | None = None, parent: str | None = None, limit: int = 50,
             before: str | None = None) -> list[Job]:
        rows = sorted(self.job_rows.values(), key=lambda j: (j["created_at"], j["id"]), reverse=True)
        if before:
            if before not in self.job_rows: return []
            b = self.job_rows[before]
            rows = [j for j in rows if (j["created_at"], j["id"]) < (b["created_at"], b["id"])]
        given = dict(status=status, parent=parent)
        rows = [j for j in rows if all(v is None or j[k] == v for k, v in given.items()) and pipeline in (None, j["graph"].name)]
        return [self.as_job(j) for j in rows[:limit]]

    def now(self) -> float: return START.timestamp() + self.clock()

    def over(self, until: float | None) -> bool:
        "Has a lease run out, or was it given before the clock was set back?"
        return until is not None and not self.clock() <= until <= self.clock() + MAX_LEASE_S

    def free(self, expired: bool = True, token: str | None = None) -> list[Row]:
        rows = [j for j in self.job_rows.values() if j["status"] not in JOB_END
                and (j["lease_until"] is None or (expired and self.over(j["lease_until"])) or again(j, token))]
        return sorted(rows, key=lambda j: (PRIORITIES.index(j["priority"]), j["created_at"], j["id"]))

    def orphan_jobs(self, limit: int = 1000) -> list[str]: return [j["id"] for j in self.free()[:limit]]

    def lease_jobs(self, owner: str, lease_s: float, limit: int, job_id: str | None = None,
                   expired: bool = True, token: str | None = None) -> list[Job]:
        self.transaction += 1
        now, rows = self.clock(), [j for j in self.free(expired, token) if job_id in (None, j["id"])][:limit]
        for j in rows:
            self.change_job(j, owner=owner, epoch=j["epoch"] + (not again(j, token)), claim=token, lease_until=now + lease_s,
                            status="running" if j["status"] == "queued" else j["status"],
                            started_at=now if j["started_at"] is None else j["started_at"])
        return [self.as_job(j) for j in rows]

    def renew_jobs(self, owner: str, held: Mapping[str, int], lease_s: float) -> dict[str, str]:
        self.transaction += 1
        states = {}
        for id, epoch in held.items():
            j = self.live(id, epoch)
            if j and j["owner"] == owner:
                j["lease_until"] = self.clock() + lease_s
                states[id] = "ok"
            else: states[id] = "cancelled" if self.job_rows.get(id, {}).get("status") == "cancelled" else "lost"
        return states

    def release_job(self, job: str, epoch: int) -> bool:
        self.transaction += 1
        if not (j := self.live(job, epoch)): return False
        self.change_job(j, owner=None, lease_until=None)
        return True

    def set_waiting(self, job: str, epoch: int, waiting: bool) -> bool:
        self.transaction += 1
        if not (j := self.live(job, epoch)): return False
        self.change_job(j, status="waiting" if waiting else "running")
        return True

    def end_jobs(self, ends: Sequence[Mapping[str, Any]]) -> set[str]:
        self.transaction += 1
        now, done = self.clock(), {o["job"]: o for o in ends if self.live(o["job"], o.get("epoch"))}
        for id in done:
            for s in self.by_job[id].values():
                if s["status"] not in STEP_END: self.change_step(s, status="cancelled", ended_at=now, lease_until=None)
        for id, o in done.items():
            j = self.job_rows[id]
            self.change_job(j, status=o["status"], outputs=value(o.get("outputs"), j["outputs"]), error=value(o.get("error")),
                            epoch=j["epoch"] + (o.get("epoch") is None), ended_at=now, owner=None, lease_until=None)
        return set(done)

    def finish_jobs(self, ends: Sequence[Mapping[str, Any]]) -> list[bool]:
        done = self.end_jobs(ends)
        rows = [self.job_rows.get(o["job"], {}) for o in ends]
        return [o["job"] in done or (j.get("epoch"), j.get("status")) == (o["epoch"], o["status"])
                for o, j in zip(ends, rows, strict=True)]

    finish_job = Journal.finish_job

    def cancel_job(self, job: str) -> Job:
        self.end_jobs([dict(job=job, status="cancelled")])
        return self.job(job)

    def retry_job(self, job: str) -> Job:
        self.transaction += 1
        j = self.job_rows.get(job)
        if j is None or j["status"] not in ("failed", "cancelled"): raise Conflict(f"Job {job} is {self.job(job).status}.")
        for s in self.by_job[job].values():
            if s["status"] in ("succeeded", "cached"): continue
            self.change_step(s, status="pending", error=None, worker=None, lease_until=None, entry_id=None, lost=0,
                             started_at=None, ended_at=None)
        self.approvals = {k: a for k, a in self.approvals.items() if k[0] != job or a["approved"] is True}
        self.change_job(j, status="queued", epoch=j["epoch"] + 1, error=None, ended_at=None, owner=None, lease_until=None)
        return self.as_job(j)

    def delete_job(self, job: str) -> None:
        self.transaction += 1
        if self.job(job).status not in JOB_END: raise Conflict(f"Job {job} is {self.job(job).status}.")
        self.keys.pop(self.job_rows.pop(job)["idempotency_key"], None)
        for key in self.by_job.pop(job): del self.step_rows[job, key]
        self.approvals = {k: a for k, a in self.approvals.items() if k[0] != job}
        self.told = [e for e in self.told if e["job"] != job]

    def events(self, job: str, after: int = 0, limit: int = 5000) -> list[Event]:
        rows = [e for e in self.told if e["job"] == job and e["seq"] > after][:limit]
        return [Event(job=job, kind=e["kind"], key=e["key"], body=e["body"], seq=e["seq"], at=moment(e["at"]).timestamp())
                for e in rows]

    # --- approvals

    def ask(self, job: str, key: str, prompt: str, show: Any = None) -> Row:
        self.approvals.setdefault((job, key), dict(prompt=mended(prompt), show=mended(dump_value(show)), approved=None, by=None,
                                                   comment=None, asked_at=moment(self.clock()), decided_at=None))
        return self.approval(job, key)

    def approval(self, job: str, key: str) -> Row | None:
        a = self.approvals.get((job, key))
        return a and dict(a)

    def decide(self, job: str, key: str, approved: bool, by: str = "", comment: str = "") -> Row:
        a = self.approvals.get((job, key))
        if a is None: raise NotFound(f"Job {job} asks nothing at step {key!r}.")
        if a["approved"] is None: a.update(approved=approved, by=by, comment=comment, decided_at=moment(self.clock()))
        if a["approved"] != approved: raise Conflict(f"Step {key} of job {job} was already decided.")
        return dict(a)

    # --- steps

    def steps(self, job: str) -> list[StepRow]:
        return [self.as_step(s) for s in sorted(self.by_job.get(job, {}).values(), key=lambda s: s["n"])]

    def step(self, job: str, key: str) -> StepRow | None:
        s = self.step_rows.get((job, key))
        return self.as_step(s) if s else None

    def waiting_results(self, keys: Iterable[tuple[str, str]]) -> list[StepRow]:
        rows = [self.step_rows.get(k) for k in keys]
        return [self.as_step(s) for s in rows if s and s["status"] in STEP_END]

    def find_cached_many(self, input_hashes: Iterable[str]) -> dict[str, StepRow]:
        hashes = {h for h in input_hashes if h}
        rows = self.in_order("succeeded", lambda s: s["input_hash"] in hashes, by="ended_at") if hashes else []
        return {s["input_hash"]: self.as_step(s) for s in rows}

    find_cached, queue_step = Journal.find_cached, Journal.queue_step

    def written(self, rows: Sequence[Mapping[str, Any]], also: Callable[[Row, Row], Row | None]) -> list[Row | FenceLost]:
        "Insert steps, or update those that are there as `also` says, each under its job's fence."
        self.transaction += 1
        return [self.write(given(o), also) if self.live(o["job"], o["epoch"]) else
                FenceLost(f"Job {o['job']} has ended or has another conductor.") for o in rows]

    def write(self, new: Row, also: Callable[[Row, Row], Row | None]) -> Row:
        s, now, status = self.step_rows.get((new["job"], new["key"])), self.clock(), new["status"]
        began = now if new["started_at"] is None else new["started_at"]
        new |= dict(started_at=began if status not in ("pending", "queued", "skipped") else None,
                    ended_at=now if status in STEP_END else None)
        if s is None:
            s = dict(new, n=self.transaction + len(self.step_rows), lost=0, lease_until=None, entry_id=None, queued_at=now)
            self.step_rows[s["job"], s["key"]] = self.by_job[s["job"]][s["key"]] = s
            self.step_event(s)
        elif to := also(s, new): self.change_step(s, **to)
        return s

    def queue_steps(self, rows: Sequence[Mapping[str, Any]]) -> list[StepRow | FenceLost]:
        def again(s: Row, new: Row) -> Row | None:
            if s["status"] != "pending": return None
            return {k: new[k] for k in QUEUED} | dict(status="queued", outputs={}, error=None, notebook=None, origin=None,
                record={}, entry_id=None, retries=new["retries"] + s["attempt"], queued_at=self.clock())
        answers = self.written([dict(o, status="queued", started_at=None) for o in rows], again)
        return [o if isinstance(o, FenceLost) else self.as_step(o) for o in answers]

    def recorded(self, rows: Sequence[Mapping[str, Any]]) -> list[Row | FenceLost]:
        def again(s: Row, new: Row) -> Row | None:
            if s["status"] in STEP_END: return None
            more = new["status"] == "running" and s["status"] != "waiting"
            return {k: new[k] for k in RECORDED} | dict(attempt=s["attempt"] + more, lease_until=None, entry_id=None,
                started_at=new["started_at"] if s["started_at"] is None else s["started_at"], ended_at=new["ended_at"])
        return self.written(rows, again)

    def record_steps(self, rows: Sequence[Mapping[str, Any]]) -> list[str | FenceLost]:
        return [o if isinstance(o, FenceLost) else o["status"] for o in self.recorded(rows)]

    def record_step(self, job: str, epoch: int, row: StepRow) -> StepRow:
        return self.as_step(fenced(self.recorded([step_params(row, epoch) | dict(job=job)])[0]))

    # --- attempts

    def claim_step(self, job: str, key: str, worker: str, lease_s: float, max_lost: int = MAX_LOST,
                   token: str | None = None) -> StepRow | None:
        self.transaction += 1
        s, now = self.step_rows.get((job, key)), self.clock()
        if s is None: return None
        mine = s["status"] == "running" and again(s, token)
        silent = not mine and s["status"] == "running" and s["lease_until"] is not None and s["lease_until"] < now
        if not (mine or (s["status"] == "queued" and s["lost"] < max_lost) or (silent and s["lost"] + 1 < max_lost)): return None
        return self.as_step(self.change_step(s, lost=s["lost"] + silent, status="running", attempt=s["attempt"] + (not mine),
                                             worker=worker, claim=token, lease_until=now + lease_s, started_at=now))

    def mine(self, job: str, key: str, attempt: int, status: str = "running") -> Row | None:
        "The row of an attempt that is still the latest, and in this status."
        s = self.step_rows.get((job, key))
        return s if s and s["attempt"] == attempt and s["status"] == status else None

    def renew_steps(self, held: Iterable[tuple[str, str, int]], lease_s: float) -> dict[tuple[str, str, int], str]:
        self.transaction += 1
        states = {}
        for job, key, attempt in sorted(held):
            if s := self.mine(job, key, attempt): s["lease_until"] = self.clock() + lease_s
            status = self.step_rows.get((job, key), {}).get("status")
            states[job, key, attempt] = "ok" if s else "cancelled" if status == "cancelled" else "lost"
        return states

    def commit_step(self, job: str, key: str, attempt: int, outputs: Mapping[str, Any], notebook: Artifact | None = None,
                    record: Mapping[str, Any] | None = None, input_hash: str | None = None, code: str | None = None) -> bool:
        self.transaction += 1
        to_pg(dict(outputs))
        if s := self.mine(job, key, attempt):
            key_of = {k: s[k] if v is None else v for k, v in dict(input_hash=input_hash, code=code).items()}
            self.change_step(s, status="succeeded", outputs=dict(outputs), notebook=notebook, record=mended(dict(record or {})),
                             error=None, lease_until=None, ended_at=self.clock(), **key_of)
        return bool(s or self.mine(job, key, attempt, "succeeded"))

    def keep_codes(self, codes: Mapping[str, Mapping[str, Any]]) -> int:
        self.transaction += 1
        new = {h: json.loads(to_pg(dict(body))) for h, body in codes.items() if h not in self.codes}
        self.codes |= new
        return len(new)

    def code(self, hash: str) -> Row | None:
        self.transaction += 1
        return self.codes.get(hash)

    def learn(self, source: str, body: Mapping[str, Any]) -> bool:
        self.transaction += 1
        self.lessons[source] = json.loads(to_pg(dict(body)))
        return True

    def learned(self, sources: Sequence[str]) -> dict[str, Row]:
        self.transaction += 1
        return {o: self.lessons[o] for o in sources if o in self.lessons}

    def fail_step(self, job: str, key: str, attempt: int, error: Mapping[str, Any], notebook: Artifact | None = None,
                  record: Mapping[str, Any] | None = None, retry: bool = False) -> StepRow | None:
        self.transaction += 1
        status = "queued" if retry else "failed"
        if s := self.mine(job, key, attempt):
            again = dict(queued_at=self.clock(), worker=None) if retry else dict(ended_at=self.clock())
            self.change_step(s, status=status, error=mended(dict(error)), notebook=notebook, record=mended(dict(record or {})),
                             lease_until=None, entry_id=None, **again)
        s = s or self.mine(job, key, attempt, status)
        return self.as_step(s) if s else None

    def release_step(self, job: str, key: str, attempt: int) -> bool:
        self.transaction += 1
        if not (s := self.mine(job, key, attempt)): return False
        self.change_step(s, status="queued", worker=None, lease_until=None, entry_id=None, started_at=None,
                         retries=s["retries"] + 1, queued_at=self.clock())
        return True

    def mark_published(self, sent: Iterable[tuple[str, str, str]]) -> int:
        rows = [(s, e) for job, key, e in sorted(sent) if (s := self.step_rows.get((job, key))) and s["status"] == "queued"]
        for s, e in rows: s["entry_id"] = e
        return len(rows)

    def unpublish(self, gone: Iterable[tuple[str, str, str]]) -> int:
        rows = [s for job, key, e in sorted(gone) if (s := self.step_rows.get((job, key))) and s["status"] == "queued"
                and s["entry_id"] == e]
        for s in rows: s["entry_id"] = None
        return len(rows)

    def places(self, limit: int, when: Callable[[Row], bool]) -> list[Place]:
        rows = self.in_order("queued", when)[:limit]
        return [Place(s["job"], s["key"], s["queue"], s["priority"], s["entry_id"], moment(s["queued_at"]), s["n"]) for s in rows]

    def unpublished(self, older_s: float = 1.0, limit: int = 1000) -> list[Place]:
        now = self.clock()
        return self.places(limit, lambda s: s["entry_id"] is None and not now - older_s <= s["queued_at"] <= now)

    def queued_steps(self, after: Place | None = None, limit: int = 1000) -> list[Place]:
        def later(s: Row) -> bool: return after is None or (moment(s["queued_at"]), s["n"]) > (after.at, after.n)
        return self.places(limit, lambda s: s["entry_id"] is not None and later(s))

    def expired_steps(self, limit: int = 1000) -> list[StepRow]:
        now = self.clock()
        rows = self.in_order("running", lambda s: s["lease_until"] is not None and s["lease_until"] < now, by="lease_until")
        return [self.as_step(s) for s in rows[:limit]]

    def requeue_expired(self, limit: int = 1000) -> list[StepRow]:
        self.transaction += 1
        rows = sorted(self.in_order("running", lambda s: self.over(s["lease_until"])), key=lambda s: (s["job"], s["key"]))[:limit]
        return [self.as_step(self.change_step(s, status="queued", lost=s["lost"] + 1, worker=None, lease_until=None, entry_id=None,
                                              started_at=None, queued_at=self.clock())) for s in rows]

    def poisoned(self, max_lost: int = MAX_LOST) -> list[StepRow]:
        return [self.as_step(s) for s in self.in_order("queued", lambda s: s["lost"] >= max_lost)]

    def fail_queued(self, job: str, key: str, error: Mapping[str, Any]) -> StepRow | None:
        self.transaction += 1
        s = self.step_rows.get((job, key))
        if not s or s["status"] != "queued": return None
        return self.as_step(self.change_step(s, status="failed", error=mended(dict(error)), entry_id=None, ended_at=self.clock()))
