"""Garbage on the streams and channels, put there behind the back of the library, with real processes reading it."""
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from farm import Farm, wait_for

from myspinbot.bridge.connection import HINT_ALL
from myspinbot.bridge.streams import Bridge
from myspinbot.bridge.keys import BODY, CANCEL, DEAD, DONE, JOBS, event_channel, event_stream, work_stream
from myspinbot.schema import StepMessage

TOYS = Path(__file__).parents[1] / "pipelines"
GOOD = StepMessage(job="job_0123456789abcdef", key="a").model_dump()
BODIES: dict[str, tuple[bytes, str]] = {  # -> a word of the reason
    "empty": (b"", "not a StepMessage"),
    "no JSON": (b"{job", "not a StepMessage"),
    "not UTF-8": (b'{"job": "\xff\xfe", "key": "a"}', "not a StepMessage"),
    "half a surrogate pair": (b'{"job": "\\ud800", "key": "a"}', "not a StepMessage"),
    "a list": (b"[1, 2]", "not a StepMessage"),
    "nested 100 000 levels": (b'{"job":' * 100_000, "not a StepMessage"),
    "unknown field": (json.dumps(GOOD | dict(nice=True)).encode(), "nice"),
    "job is a number": (json.dumps(GOOD | dict(job=5)).encode(), "job"),
    "no key": (b'{"job": "j"}', "key"),
    "empty job": (json.dumps(GOOD | dict(job="")).encode(), "job"),
    "NUL in the job": (json.dumps(GOOD | dict(job="a\0b")).encode(), "job"),
    "10 MB": (json.dumps(GOOD | dict(job="j" * 10 * 2**20)).encode(), "at most 200"),
    "newer": (json.dumps(GOOD | dict(schema_version=99, more={})).encode(), "schema_version 99 is newer than 1"),
    "newer, same fields": (json.dumps(GOOD | dict(schema_version=2)).encode(), "schema_version 2 is newer than 1"),
}


@pytest.fixture
def up(farm: Callable[..., Farm]) -> Farm:
    f = farm(TOYS)
    f.start("control")
    f.start("w1")
    return f


def alive(f: Farm) -> None:
    for name, p in f.procs.items(): assert p.poll() is None, f.log(name)


def test_unreadable_messages_become_dead_letters_and_other_work_goes_on(up: Farm, redis_url: str) -> None:
    r, stream = redis.Redis.from_url(redis_url), work_stream("cpu")
    ids = {r.xadd(stream, {BODY: body}).decode(): name for name, (body, _) in BODIES.items()}
    ids[r.xadd(stream, {b"\xff\x00": b"\xfe", b"x": b"1"}).decode()] = "other fields"
    ids[r.xadd(stream, {f"f{i}": "v" for i in range(20_000)}).decode()] = "20 000 fields"
    job = up.client.submit("fan")
    assert up.done(job.id).status == "succeeded"
    wait_for("all dead letters", lambda: len(up.client.bridge.dead_letters()) >= len(ids))
    found = {d["entry"]: d for d in up.client.bridge.dead_letters()}
    for id, name in ids.items():
        assert BODIES.get(name, (b"", "no field 'm'"))[1] in found[id]["reason"], (name, found[id]["reason"])
        assert (found[id]["stream"], found[id]["consumer"]) == (stream, "w1")
    assert len(found) == len(ids) and r.memory_usage(DEAD, samples=0) < 500_000, "a dead letter keeps the head of a message"
    alive(up)
    assert all(s["length"] == s["pending"] == 0 for s in up.client.bridge.stats()["streams"].values())


def test_message_about_an_unknown_job_is_dropped(up: Farm, redis_url: str) -> None:
    r, stream = redis.Redis.from_url(redis_url), work_stream("cpu", "high")
    for key in ("a", "../../x", "marks[99999999999999999999]"):
        r.xadd(stream, {BODY: StepMessage(job="job_ffffffffffffffff", key=key).model_dump_json()})
    wait_for("the stream is empty", lambda: r.xlen(stream) == 0)
    assert up.done(up.client.submit("fan").id).status == "succeeded" and up.client.bridge.dead_letters() == []
    alive(up)


HINTS = [{b"job": b"\xff\xfe"}, {b"jbo": b"x"}, {b"job": b"", b"more": b"1"}, {b"\xff": b"\xff", b"job": b"y"},
         {b"job": b"j" * 1_000_000}, {b"job": b"a\0b"}, {b"job": b"../../x"}]
GARBAGE = [b"", b"\xff\xfe", b"{", b"null", b"5", b"[]", b'"text"', b"{}", b'{"job": 5, "key": []}', b'{"job": "x"}',
           b"[" * 100_000, b"NaN", b'{"job": {"a": 1}, "key": "b"}', b"x" * 1_000_000]


def test_conductor_and_worker_live_through_garbage_hints(farm: Callable[..., Farm], redis_url: str, tmp_path: Path) -> None:
    up, r = farm(TOYS, lease_s=60.0), redis.Redis.from_url(redis_url)  # so long that only a hint tells of a cancel in time
    up.start("control")
    up.start("w1")
    for h in HINTS: r.xadd(JOBS, h)
    for data in GARBAGE: assert r.publish(DONE, data) and r.publish(CANCEL, data)
    job = up.client.submit("branches", dict(gate=str(tmp_path / "gate")))
    wait_for("the slow step at work", lambda: (s := up.step(job.id, "slow")) and s.status == "running")
    wait_for("hints are taken", lambda: r.xlen(JOBS) == 0)
    began = time.monotonic()
    up.client.cancel(job.id)
    wait_for("the cancelled step stops", lambda: "step stopped" in up.log("w1"), 15)
    assert time.monotonic() - began < 15, "a third of a lease is 20 s: the listener of cancels must have told"
    assert up.done(up.client.submit("fan").id).status == "succeeded"
    alive(up)
    assert "Traceback" not in up.log("control") + up.log("w1")


def test_followers_hear_the_next_real_hint_after_garbage(redis_url: str) -> None:
    r, stop = redis.Redis.from_url(redis_url), threading.Event()
    got: dict[str, list[Any]] = dict(done=[], cancel=[])
    with Bridge(redis_url) as b:
        def collect(name: str, follow: Callable) -> None:
            for o in follow(stop): got[name].append(o)
        threads = [threading.Thread(target=collect, args=a, daemon=True) for a in
                   (("done", b.follow_done), ("cancel", b.follow_cancel))]
        for t in threads: t.start()
        wait_for("both listen", lambda: got["done"] and got["cancel"])
        for data in GARBAGE:
            r.publish(DONE, data)
            r.publish(CANCEL, data)
        b.publish_done("j1", "a")
        b.publish_cancel("j1")
        wait_for("the real hints", lambda: dict(job="j1", key="a") in got["done"] and "j1" in got["cancel"], 20)
        assert all(t.is_alive() for t in threads)
        stop.set()
        for t in threads: t.join(5)
    unknown = [o for o in got["done"] if o != dict(job="j1", key="a")]
    assert unknown == [HINT_ALL] * len(unknown) and len(unknown) >= len(GARBAGE), "what is no hint means: look at everything"


def test_hints_of_jobs_with_odd_fields_are_taken_once(redis_url: str) -> None:
    r = redis.Redis.from_url(redis_url)
    for h in HINTS: r.xadd(JOBS, h)
    with Bridge(redis_url) as b:
        b.hint_jobs("job_1")
        assert "job_1" in b.read_jobs("c1") and r.xlen(JOBS) == 0
        assert b.read_jobs("c1", block_ms=0) == []


EVENTS = [{b"e": b"\xff"}, {b"e": b"{"}, {b"x": b"y"}, {b"e": b"[" * 100_000}, {b"e": b'{"job": 5}'},
          {b"e": b'{"job":"j","kind":"progress","key":"marks[0]","body":{"fraction":"much","note":["a"]}}'},
          {b"e": b'{"job":"j","kind":"log","body":{"text":{"a":1}},"at":1e300}'},
          {b"e": b'{"job":"j","kind":"log","body":{"text":"[bold]x[/nothing]"},"at":NaN}'},
          {b"e": b'{"job":"j","kind":"step","key":"marks[0]","body":{"status":{"a":1}}}'},
          {b"e": b'{"job":"j","kind":"step","key":"marks[0]","body":null}'}]


def test_watchers_of_a_job_live_through_garbage_events(up: Farm, redis_url: str, tmp_path: Path) -> None:
    r, gate = redis.Redis.from_url(redis_url), tmp_path / "gate"
    job = up.client.submit("branches", dict(gate=str(gate))).id
    wait_for("the slow step at work", lambda: (s := up.step(job, "slow")) and s.status == "running")
    for e in EVENTS:
        r.xadd(event_stream(job), e)
        r.publish(event_channel(job), next(iter(e.values())))
    watch = [subprocess.Popen([sys.executable, "-m", "myspinbot", *a], env=up.env, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
             for a in (["logs", "-f", job], ["logs", "-f", job, "--json"])]
    bars = f"from myspinbot.cli import client, watch_job\nwith client() as c: print(watch_job(c, {job!r}).status)"
    follower = subprocess.Popen([sys.executable, "-c", bars], env=up.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True)
    seen = [e for _, e in up.client.events.read(job)]
    assert sum("cannot read" in str(e.body.get("text")) for e in seen) >= 6
    gate.touch()
    assert up.done(job).status == "succeeded"
    for p in (*watch, follower):
        said = p.communicate(timeout=60)[0]
        assert p.returncode == 0 and "Traceback" not in said, said
    assert said.strip().endswith("succeeded")
