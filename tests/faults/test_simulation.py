"""The simulation in the small, and proof that it can fail: the product broken in one place must not pass."""
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from memory_journal import MemoryJournal
from simulate import Sim, SimBridge, summary

from myspinbot.jobs import conductor
from myspinbot.jobs.conductor import Conductor
from myspinbot.jobs.waiting import Waiter
from myspinbot.jobs.worker import Worker


def test_two_thousand_schedules_keep_the_promise():
    total: Counter = Counter()
    for seed in range(1, 2001):
        sim = Sim(seed).run()
        assert not sim.violations, f"python tests/faults/simulate.py --replay {seed}\n" + "\n".join(sim.violations)
        total += summary(sim)
    for what in ("calm", "unanswered", "crashes", "stop", "freeze", "lost replies", "flush", "restore", "regroup", "lose",
                 "duplicate", "takeovers", "jump"):
        assert total[what] > 50, f"{what} hardly happened: {total}"


def test_a_seed_is_a_schedule():
    def story(seed: int) -> list[str]:
        told: list[str] = []
        Sim(seed, tell=told.append).run()
        return told
    for seed in (3, 7, 11):
        assert story(seed) == story(seed) != story(seed + 1)


# --- mutations: each is a mistake that somebody could make

def edited(fn: Callable, old: str, new: str) -> Callable:
    "A function with one piece of its source replaced."
    import inspect
    import textwrap
    source = textwrap.dedent(inspect.getsource(fn))
    assert old in source, f"{fn.__qualname__} no longer has {old!r}"
    source = "\n".join(line for line in source.replace(old, new).splitlines() if line.strip() != "@patch")
    space: dict[str, Any] = {}
    exec(compile(source, fn.__qualname__, "exec"), fn.__globals__, space)
    return space[fn.__name__]


ANY_ATTEMPT = 's["attempt"] == attempt and ', ""
MUTATIONS = {
    "the end of an attempt is not fenced": (MemoryJournal, "mine", *ANY_ATTEMPT),
    "a claim ignores leases": (MemoryJournal, "claim_step", 's["lease_until"] < now', "True"),
    "a worker does not know its own claim again": (Worker, "handle", ', token=new_id("claim")', ""),
    "a conductor does not know its own lease again": (Conductor, "take_jobs", ", token=token", ""),
    "a silent worker's step is not queued again": (
        MemoryJournal,
        "requeue_expired",
        'self.over(s["lease_until"])',
        "False",
    ),
    "steps are written under any epoch": (
        MemoryJournal,
        "written",
        'self.live(o["job"], o["epoch"])',
        'self.live(o["job"])',
    ),
    "an ended job can be ended again": (
        MemoryJournal,
        "end_jobs",
        'self.live(o["job"], o.get("epoch"))',
        'self.job_rows.get(o["job"])',
    ),
    "a cancelled job leaves its steps open": (MemoryJournal, "end_jobs", 's["status"] not in STEP_END', "False"),
    "a repeated queueing starts over": (MemoryJournal, "queue_steps", 's["status"] != "pending"', "False"),
    "an idempotency key is not looked at": (MemoryJournal, "submit", 'self.keys.get(idempotency_key, "")', '""'),
    "job leases are never free": (MemoryJournal, "free", 'self.over(j["lease_until"])', "False"),
    "job leases are always free": (MemoryJournal, "free", 'self.over(j["lease_until"])', "True"),
    "a handed-back attempt is not given away": (MemoryJournal, "release_step", 'status="queued"', 'status="running"'),
    "the reconciler forgets to unpublish": (Conductor, "unpublish", "self.journal.unpublish(gone)", "pass"),
    "the reconciler does not publish": (
        Conductor,
        "reconcile",
        "self.journal.unpublished(older_s=1.0, limit=PAGE)",
        "[]",
    ),
    "the reconciler leaves poison": (Conductor, "reconcile", "self.journal.poisoned()", "[]"),
    "a conductor does not look at what is done": (
        conductor,
        "run_step",
        "if row and row.status in STEP_END",
        "if False",
    ),
    "a conductor does not renew": (Conductor, "renew", "if held else {}", "if False else {}"),
    "a waiter trusts the hints": (Waiter, "run", "look = set(self.futures)", "look = set()"),
    "a worker does not renew": (Worker, "beat", "if not (held := self.held()): return", "return"),
    "nobody reclaims": (Worker, "take", "old := self.not_running(old)", "False"),
    "a stop means nothing": (Worker, "settle", "if run.stop and", "if False and"),
    "a draining worker forgets to release": (Worker, "settle", 'run.stop == "draining" and', "False and"),
    "a lost attempt counts as a failed one": (Worker, "write", "row.attempt - row.lost <=", "row.attempt <="),
    "a cancelled attempt may commit": (MemoryJournal, "mine", ' and s["status"] == status', ""),
    "every failure is tried again": (
        Worker,
        "write",
        "bool(error and error.retryable) and row.attempt - row.lost <= row.retries",
        "True",
    ),
    "what cannot be stored is dropped": (
        Worker,
        "write",
        "except SpinError as e: error = e",
        'except SpinError as e: return "refused"',
    ),
}


HARMLESS = {  # each alone: the journal is the truth, and Redis only carries
    "an entry is finished by its reader": (SimBridge, "read", "self._held.setdefault(o.stream, {})[o.id] =", "_ ="),
    "a worker acknowledges before it commits": (Worker, "settle", "status = self.write(row, r)",
        "self.insist(self.bridge.finish, entry, None); status = self.write(row, r)"),
    "a worker forgets what it held before": (Worker, "pending", "return self.not_running(", "return [] and ("),
}


def first_violation(most: int) -> int | None:
    "The first seed that finds something wrong."
    return next((seed for seed in range(1, most + 1) if Sim(seed).run().violations), None)


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_mistake_is_found(monkeypatch, what):
    kind, name, old, new = MUTATIONS[what]
    monkeypatch.setattr(kind, name, edited(getattr(kind, name), old, new))
    assert first_violation(2500), f"2 500 schedules passed although {what}"


@pytest.mark.parametrize("what", HARMLESS)
def test_what_redis_remembers_of_a_delivery_is_not_needed(monkeypatch, what):
    kind, name, old, new = HARMLESS[what]
    monkeypatch.setattr(kind, name, edited(getattr(kind, name), old, new))
    assert first_violation(200) is None
