"""The bridge: one conformance suite for Valkey, Redis and the in-memory twin, then the failure cases of real streams on both."""
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from conftest import SERVERS, free_port

from myspinbot.bridge import streams as bridge_module
from myspinbot.bridge.connection import BLOCK_MS, HINT_ALL
from myspinbot.bridge.streams import Bridge, Entry
from myspinbot.bridge.memory import MemoryBridge
from myspinbot.core import InputError, ServiceUnavailable
from myspinbot.bridge.keys import BODY, DEAD, GROUP, JOBS, JOBS_GROUP, work_stream
from myspinbot.schema import StepMessage

NORMAL = work_stream("cpu", "normal")


def msg(key: str, job: str = "job_1") -> StepMessage: return StepMessage(job=job, key=key)
def keys(entries: list[Entry]) -> list[str]: return [e.message.key for e in entries]


def wait_for(what: Callable[[], object], limit_s: float = 10.0) -> object:
    end = time.monotonic() + limit_s
    while not (got := what()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)
    return got


@pytest.fixture(params=SERVERS)
def redis_url(request: pytest.FixtureRequest, flushed_server: Callable[[str], str]) -> str: return flushed_server(request.param)


@pytest.fixture(params=[*SERVERS, "memory"])
def bridge(request: pytest.FixtureRequest, flushed_server: Callable[[str], str]) -> Iterator[Bridge | MemoryBridge]:
    with (MemoryBridge() if request.param == "memory" else Bridge(flushed_server(request.param))) as b: yield b


@pytest.fixture
def real(redis_url: str) -> Iterator[Bridge]:
    with Bridge(redis_url) as b: yield b


@pytest.fixture
def raw(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as r: yield r


class Server:
    "A server that a test may stop, freeze and start again on the same port and data."
    def __init__(self, program: str, folder: Path, *options: str) -> None:
        self.program, self.port, self.folder, self.options = program, free_port(), folder, options
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([self.program, "--port", str(self.port), "--bind", "127.0.0.1", "--dir",
            str(self.folder), "--save", "", "--appendonly", "yes", "--appendfsync", "always", *self.options],
            stdout=subprocess.DEVNULL)
        r = redis.Redis(port=self.port)
        wait_for(lambda: self._answers(r))

    def _answers(self, r: redis.Redis) -> bool:
        try: return r.ping()
        except redis.ConnectionError: return False

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    s = Server(SERVERS[request.param], tmp_path)
    yield s
    s.stop()


class Wire:
    "A TCP relay in front of Redis; `cut()` lets the next request through and loses its reply with the connection."
    def __init__(self, port: int) -> None:
        self._to, self._cut, self._listen = port, threading.Event(), socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listen.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None: self._cut.set()
    def close(self) -> None: self._listen.close()

    def _accept(self) -> None:
        while True:
            try: near, _ = self._listen.accept()
            except OSError: return
            far = socket.create_connection(("127.0.0.1", self._to))
            threading.Thread(target=self._pump, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, replies: bool) -> None:
        with source, sink, suppress(OSError):  # the other direction may have closed both
            while data := source.recv(65536):
                if replies and self._cut.is_set():
                    self._cut.clear()
                    break
                sink.sendall(data)
            for s in (source, sink): s.shutdown(socket.SHUT_RDWR)


# ---- conformance: both bridges ----

def test_what_is_published_is_read_once_by_one_consumer(bridge):
    id = bridge.publish("cpu", "normal", msg("talk"))
    got, = bridge.read(["cpu"], "w1", block_ms=0)
    assert (got.id, got.stream, got.queue, got.priority, got.consumer) == (id, NORMAL, "cpu", "normal", "w1")
    assert got.message == msg("talk") and not got.error
    assert bridge.read(["cpu"], "w2", block_ms=0) == []


def test_high_comes_before_normal_before_low_and_old_before_new(bridge):
    bridge.publish_many([("cpu", p, msg(p + n)) for n in "12" for p in ("low", "normal", "high")])
    assert keys(bridge.read(["cpu"], "w1", count=4, block_ms=0)) == ["high1", "high2", "normal1", "normal2"]
    assert keys(bridge.read(["cpu"], "w1", count=4, block_ms=0)) == ["low1", "low2"]


def test_a_worker_gets_no_more_than_its_free_slots(bridge):
    bridge.publish_many([("cpu", p, msg(p)) for p in ("low", "normal", "high")])
    assert keys(bridge.read(["cpu"], "w1", count=1)) == ["high"]
    assert bridge.read(["cpu"], "w1", count=0) == []
    assert keys(bridge.read(["cpu"], "w2", count=9)) == ["normal", "low"]


def test_queues_are_served_apart_and_take_turns(bridge):
    bridge.publish_many([(q, "normal", msg(f"{q}{k}")) for k in range(2) for q in ("cpu", "gpu", "io")])
    assert keys(bridge.read(["io"], "w1", count=9, block_ms=0)) == ["io0", "io1"]
    turns = [bridge.read(["cpu", "gpu"], "w1", block_ms=0)[0].queue for _ in range(4)]
    assert sorted(turns[:2]) == ["cpu", "gpu"] and sorted(turns) == ["cpu", "cpu", "gpu", "gpu"]


def test_a_waiting_reader_is_woken_by_any_stream(bridge):
    assert bridge.read(["cpu", "gpu"], "w1", block_ms=1) == []
    for queue, priority in (("cpu", "low"), ("gpu", "high")):
        t = threading.Timer(0.05, bridge.publish, (queue, priority, msg("late")))
        t.start()
        started = time.monotonic()
        got, = bridge.read(["cpu", "gpu"], "w1", count=3, block_ms=BLOCK_MS)
        t.join()
        assert (got.queue, got.priority) == (queue, priority) and time.monotonic() - started < 1.5


def test_a_read_without_work_comes_back_in_time(bridge):
    started = time.monotonic()
    assert bridge.read(["cpu"], "w1", block_ms=60) == []
    assert 0.05 <= time.monotonic() - started < 1.0
    assert bridge.last_read >= started


def test_finish_removes_the_entry_and_tells_the_conductor(bridge):
    stop, hints = threading.Event(), []
    follower = threading.Thread(target=lambda: hints.extend(_until(bridge.follow_done(stop), stop, 3)))
    follower.start()
    wait_for(lambda: _subscribed(bridge, "spin:done"))
    bridge.publish_many([("cpu", "normal", msg("a")), ("cpu", "low", msg("b"))])
    a, b = bridge.read(["cpu"], "w1", count=2)
    assert bridge.finish(a, {"job": "job_1", "key": "a"}) is True
    assert bridge.finish(a) is False
    assert bridge.finish(b, {"job": "job_1", "key": "b"}) is True
    follower.join(5)
    assert hints == [HINT_ALL, {"job": "job_1", "key": "a"}, {"job": "job_1", "key": "b"}]
    assert bridge.has_entries([(a.stream, a.id), (b.stream, b.id)]) == [False, False]
    assert bridge.own_pending(["cpu"], "w1") == []


def _until(it: Iterator, stop: threading.Event, n: int) -> Iterator:
    for k, o in enumerate(it, 1):
        yield o
        if k == n: stop.set()


def _subscribed(bridge: Bridge | MemoryBridge, channel: str) -> bool:
    if isinstance(bridge, MemoryBridge): return any(o[0] == channel for o in bridge._followers)
    return dict(bridge._redis.pubsub_numsub(channel))[channel.encode()] > 0


def test_has_entries_knows_waiting_and_delivered_ones(bridge):
    one, two = bridge.publish_many([("cpu", "normal", msg("a")), ("cpu", "normal", msg("b"))])
    bridge.read(["cpu"], "w1")
    pairs = [(NORMAL, one), (NORMAL, two), (NORMAL, "1-1"), (work_stream("gpu"), one)]
    assert bridge.has_entries(pairs) == [True, True, False, False]
    assert bridge.has_entries([]) == []


def test_silent_consumers_lose_their_entries_and_renewing_ones_keep_them(bridge):
    bridge.publish_many([("cpu", "normal", msg("a")), ("cpu", "high", msg("b"))])
    held = bridge.read(["cpu"], "w1", count=2)
    assert bridge.reclaim(["cpu"], "w2", min_idle_ms=60_000, count=9) == []
    wait_for(lambda: bridge.stats()["streams"][NORMAL]["oldest_idle_ms"] >= 30)
    assert bridge.renew([o for o in held if o.message.key == "a"]) == [o for o in held if o.message.key == "a"]
    taken = bridge.reclaim(["cpu"], "w2", min_idle_ms=25, count=9)
    assert keys(taken) == ["b"] and taken[0].consumer == "w2"
    assert keys(bridge.renew(held)) == ["a"]
    assert keys(bridge.own_pending(["cpu"], "w1")) == ["a"] and keys(bridge.own_pending(["cpu"], "w2")) == ["b"]


def test_the_loser_can_neither_hand_back_nor_bury_what_it_lost(bridge):
    bridge.publish("cpu", "normal", msg("a"))
    mine, = bridge.read(["cpu"], "w1")
    theirs, = bridge.reclaim(["cpu"], "w2", min_idle_ms=0)
    assert bridge.hand_back(mine) is None and bridge.dead_letter(mine, "no") is None
    assert bridge.renew([mine]) == [] and bridge.renew([theirs]) == [theirs]
    assert bridge.renew([]) == []


def test_a_worker_that_shuts_down_hands_back(bridge):
    bridge.publish("cpu", "high", msg("a"))
    mine, = bridge.read(["cpu"], "w1")
    new = bridge.hand_back(mine)
    assert bridge.has_entries([(mine.stream, mine.id), (mine.stream, new)]) == [False, True]
    theirs, = bridge.read(["cpu"], "w2", block_ms=0)
    assert (theirs.id, theirs.message) == (new, mine.message)


def test_a_restarted_consumer_finds_what_it_held(bridge):
    bridge.publish_many([("cpu", "normal", msg("a")), ("gpu", "low", msg("b"))])
    held = bridge.read(["cpu", "gpu"], "host:0", count=2)
    assert sorted(keys(bridge.own_pending(["cpu", "gpu"], "host:0"))) == ["a", "b"]
    for o in held: bridge.finish(o)
    assert bridge.own_pending(["cpu", "gpu"], "host:0") == []
    assert bridge.own_pending(["cpu"], "nobody") == []


def test_a_consumer_is_forgotten_only_when_it_holds_nothing(bridge):
    bridge.publish("cpu", "normal", msg("a"))
    held, = bridge.read(["cpu"], "w1")
    assert bridge.forget_consumer(["cpu"], "w1") is False
    assert keys(bridge.own_pending(["cpu"], "w1")) == ["a"]
    bridge.finish(held)
    assert bridge.forget_consumer(["cpu"], "w1") is True and bridge.forget_consumer(["cpu"], "w9") is True


def test_dead_letters_keep_the_message_and_the_reason(bridge):
    bridge.publish("cpu", "normal", msg("poison"))
    mine, = bridge.read(["cpu"], "w1")
    assert bridge.dead_letter(mine, "killed 3 workers") and bridge.dead_letter(mine, "again") is None
    letter, = bridge.dead_letters()
    assert {k: letter[k] for k in ("entry", "stream", "consumer", "reason")} == dict(
        entry=mine.id, stream=NORMAL, consumer="w1", reason="killed 3 workers")
    assert StepMessage.model_validate_json(letter["raw"][BODY]) == msg("poison")
    assert bridge.has_entries([(mine.stream, mine.id)]) == [False] and bridge.stats()["dead"] == 1


def test_each_job_hint_reaches_one_conductor(bridge):
    for job in ("job_1", "job_2", "job_1"): bridge.hint_jobs(job)
    assert bridge.read_jobs("c1") == ["job_1", "job_2"]
    assert bridge.read_jobs("c2", block_ms=1) == []
    t = threading.Timer(0.05, bridge.hint_jobs, ("job_3",))
    t.start()
    assert bridge.read_jobs("c2") == ["job_3"]
    assert bridge.stats()["jobs"] == 0


def test_cancel_reaches_every_follower(bridge):
    stop, seen = threading.Event(), [[], []]
    threads = [threading.Thread(target=lambda s=s: [s.append(job) for job in bridge.follow_cancel(stop)]) for s in seen]
    for t in threads: t.start()
    wait_for(lambda: _subscribers(bridge, "spin:cancel") == 2)
    bridge.publish_cancel("job_7")
    bridge.publish_done("job_7", "talk")
    wait_for(lambda: len(seen[0]) == len(seen[1]) == 2)
    stop.set()
    for t in threads: t.join(5)
    assert seen == [["", "job_7"], ["", "job_7"]]


def _subscribers(bridge: Bridge | MemoryBridge, channel: str) -> int:
    if isinstance(bridge, MemoryBridge): return sum(o[0] == channel for o in bridge._followers)
    return dict(bridge._redis.pubsub_numsub(channel))[channel.encode()]


def test_publish_done_reaches_the_conductor(bridge):
    stop, got = threading.Event(), []
    for hint in bridge.follow_done(stop):
        got.append(hint)
        if hint == HINT_ALL: bridge.publish_done("job_1", "talk")
        else: stop.set()
    assert got == [HINT_ALL, {"job": "job_1", "key": "talk"}]


def test_stats_count_waiting_and_held_work(bridge):
    bridge.publish_many([("cpu", "normal", msg(str(k))) for k in range(5)] + [("gpu", "low", msg("x"))])
    bridge.read(["cpu"], "w1", count=2)
    s = bridge.stats()["streams"]
    assert {k: s[NORMAL][k] for k in ("queue", "priority", "length", "pending", "waiting", "consumers")} == dict(
        queue="cpu", priority="normal", length=5, pending=2, waiting=3, consumers={"w1": 2})
    assert s[work_stream("gpu", "low")]["waiting"] == 1 and s[work_stream("gpu", "low")]["oldest_idle_ms"] == 0


def test_epoch_stays_while_the_content_stays(bridge):
    assert bridge.epoch() == bridge.epoch() != ""


def test_bad_names_are_refused_where_they_enter(bridge):
    with pytest.raises(InputError, match="Not a queue name: 'GPU'"): bridge.publish("GPU", "normal", msg("a"))
    with pytest.raises(InputError, match="Unknown priority 'urgent'"): bridge.publish("cpu", "urgent", msg("a"))
    with pytest.raises(InputError): bridge.publish_many([("cpu", "low", msg("a")), ("cpu", "", msg("b"))])
    assert bridge.read(["cpu"], "w1", count=9, block_ms=0) == [] and bridge.read([], "w1") == []


def test_many_threads_publish_read_and_finish_without_loss(bridge):
    n, seen, lock, done = 300, [], threading.Lock(), threading.Event()

    def work(name: str) -> None:
        while not done.is_set():
            for e in bridge.read(["cpu"], name, count=8, block_ms=50):
                assert bridge.finish(e, {"job": "j", "key": e.message.key})
                with lock: seen.append(e.message.key)

    readers = [threading.Thread(target=work, args=(f"w{k}",)) for k in range(3)]
    writers = [threading.Thread(target=lambda p=p: [bridge.publish("cpu", p, msg(f"{p}{k}")) for k in range(n // 3)])
               for p in ("high", "normal", "low")]
    for t in readers + writers: t.start()
    wait_for(lambda: len(seen) >= n, 30)
    done.set()
    for t in readers + writers: t.join(10)
    assert len(seen) == len(set(seen)) == n


def test_threads_that_finish_at_once_each_get_their_own_answer(bridge):
    bridge.publish_many([("cpu", "normal", msg(str(k))) for k in range(40)])
    held = bridge.read(["cpu"], "w1", count=40)
    for o in held[::2]: bridge.finish(o)
    start, answers = threading.Barrier(40), {}

    def end(k: int) -> None:
        start.wait(10)
        answers[k] = bridge.finish(held[k], {"job": "j", "key": str(k)})

    threads = [threading.Thread(target=end, args=(k,)) for k in range(40)]
    for t in threads: t.start()
    for t in threads: t.join(20)
    assert answers == {k: k % 2 == 1 for k in range(40)}
    assert bridge.own_pending(["cpu"], "w1") == []


# ---- the failure cases of Redis Streams; numbers as in the project's table of facts ----

def test_1_finished_entries_leave_no_memory_behind(real, raw):
    real.publish_many([("cpu", "normal", msg(str(k))) for k in range(50)])
    for o in real.read(["cpu"], "w1", count=50): real.finish(o)
    assert raw.xlen(NORMAL) == 0 and raw.xpending(NORMAL, GROUP)["pending"] == 0


def test_1_a_hundred_thousand_entries_leave_redis_memory_where_it_was(real, raw):
    def through(n: int) -> None:
        for _ in range(n // 1000):
            real.publish_many([("cpu", "normal", msg("a"))] * 1000)
            held = real.read(["cpu"], "w1", count=1000)
            bridge_module._finish(real, [(o.stream, o.id, '{"job":"j","key":"a"}') for o in held])  # as for 1000 threads at once

    through(1000)
    before = raw.info("memory")["used_memory"]
    through(100_000)
    assert raw.info("memory")["used_memory"] - before < 200_000, "two bytes an entry"
    assert raw.xlen(NORMAL) == 0 and raw.xinfo_groups(NORMAL)[0]["pending"] == 0


def test_1_reclaim_follows_the_cursor_past_busy_entries(real, raw):
    real.publish_many([("cpu", "normal", msg(str(k))) for k in range(200)])
    held = real.read(["cpu"], "w1", count=200)
    raw.xclaim(NORMAL, GROUP, "w1", 0, [held[-1].id], idle=60_000, justid=True)
    assert keys(real.reclaim(["cpu"], "w2", min_idle_ms=30_000, count=2)) == ["199"]
    assert real.stats()["streams"][NORMAL]["pending"] == 200


def test_2_an_entry_whose_body_is_gone_is_acknowledged(real, raw):
    real.publish_many([("cpu", "normal", msg("a")), ("cpu", "normal", msg("b")), ("cpu", "normal", msg("c"))])
    a, b, c = real.read(["cpu"], "w1", count=3)
    raw.xdel(NORMAL, a.id)
    assert keys(real.reclaim(["cpu"], "w2", min_idle_ms=0, count=9)) == ["b", "c"]
    raw.xdel(NORMAL, b.id)
    assert keys(real.own_pending(["cpu"], "w2")) == ["c"]
    assert raw.xpending(NORMAL, GROUP)["pending"] == 1
    assert real.has_entries([(NORMAL, o.id) for o in (a, b, c)]) == [False, False, True]


def test_2_handing_back_or_burying_an_entry_without_body_only_acknowledges(real, raw):
    real.publish_many([("cpu", "normal", msg("a")), ("cpu", "normal", msg("b"))])
    a, b = real.read(["cpu"], "w1", count=2)
    raw.xdel(NORMAL, a.id, b.id)
    assert real.hand_back(a) is None
    assert real.dead_letter(b, "gone") and real.dead_letters()[0]["raw"] == {}
    assert raw.xpending(NORMAL, GROUP)["pending"] == 0 and raw.xlen(NORMAL) == 0


def test_3_work_streams_are_never_trimmed(real, raw):
    real.publish_many([("cpu", "low", msg(str(k))) for k in range(12_000)])
    assert raw.xlen(work_stream("cpu", "low")) == 12_000
    assert len(real.read(["cpu"], "w1", count=12_000)) == 12_000


def test_4_a_stable_name_leaves_one_consumer_and_forgetting_leaves_none(real, raw, redis_url):
    for _ in range(3):
        real.publish("cpu", "normal", msg("a"))
        with Bridge(redis_url) as b: b.finish(*b.read(["cpu"], "host:0"))
    assert [o["name"] for o in raw.xinfo_consumers(NORMAL, GROUP)] == [b"host:0"]
    assert real.forget_consumer(["cpu"], "host:0") and raw.xinfo_consumers(NORMAL, GROUP) == []


def test_4_silent_consumers_and_the_hints_they_took_are_forgotten(real, raw, redis_url):
    for name in ("gone", "busy"): real.publish("cpu", "normal", msg(name))
    real.finish(*real.read(["cpu"], "gone"))
    assert keys(real.read(["cpu"], "busy")) == ["busy"]
    real.hint_jobs("job_1")
    with Bridge(redis_url) as b: b._script(b._reader, bridge_module.READ, [JOBS], JOBS_GROUP, "dead:1", 10)
    silent = lambda: all(o["idle"] > 100 for o in raw.xinfo_consumers(NORMAL, GROUP) + raw.xinfo_consumers(JOBS, JOBS_GROUP))
    wait_for(silent)
    real.publish("cpu", "normal", msg("now"))
    real.finish(*real.read(["cpu"], "here"))
    real.hint_jobs("job_2")
    assert real.forget_silent(["cpu", "gpu"], 100) >= 2  # where reading nothing counts (Redis 7), also from the other streams
    assert {o["name"] for o in raw.xinfo_consumers(NORMAL, GROUP)} == {b"busy", b"here"}
    assert raw.xpending(JOBS, JOBS_GROUP)["pending"] == 0 and raw.xlen(JOBS) == 1
    assert real.read_jobs("next:2", block_ms=0) == ["job_2"] and keys(real.own_pending(["cpu"], "busy")) == ["busy"]


def test_5_work_published_before_the_first_worker_is_found(real):
    real.publish("cpu", "normal", msg("early"))
    assert keys(real.read(["cpu"], "w1", block_ms=0)) == ["early"]
    assert real.recreated == 0


def test_5_flushall_between_reads_makes_the_group_anew_and_says_so(redis_url, raw):
    told = []
    with Bridge(redis_url, on_recreated=told.append) as b:
        b.read(["cpu"], "w1", block_ms=1)
        assert told == [] and b.recreated == 0
        raw.flushall()
        b.publish("cpu", "normal", msg("after"))
        assert keys(b.read(["cpu"], "w1", count=3, block_ms=1)) == ["after"]
        assert told == [[work_stream("cpu", p) for p in ("high", "normal", "low")]] and b.recreated == 3
        assert b.finish(*b.own_pending(["cpu"], "w1")) is True


def test_5_flushall_under_a_waiting_reader_does_not_stop_it(redis_url, raw):
    told, got = [], []
    with Bridge(redis_url, on_recreated=told.append) as b:
        b.read(["cpu"], "w1", block_ms=1)
        t = threading.Thread(target=lambda: got.extend(b.read(["cpu"], "w1") or b.read(["cpu"], "w1")))
        t.start()
        wait_for(lambda: raw.info("clients")["blocked_clients"] == 1)
        raw.flushall()
        b.publish("cpu", "low", msg("after"))
        t.join(8)
        assert keys(got) == ["after"] and told and b.recreated >= 1


def test_5_flushall_under_a_conductor_does_not_stop_it(real, raw):
    assert real.read_jobs("c1", block_ms=1) == []
    raw.flushall()
    real.hint_jobs("job_2")
    assert real.read_jobs("c1") == ["job_2"]
    assert raw.xpending(JOBS, JOBS_GROUP)["pending"] == 0


def test_6_a_group_made_again_delivers_again_and_finishing_twice_is_harmless(real, raw):
    real.publish("cpu", "normal", msg("a"))
    first, = real.read(["cpu"], "w1")
    raw.xgroup_destroy(NORMAL, GROUP)
    second, = real.read(["cpu"], "w2")
    assert second.id == first.id and second.message == first.message
    assert [real.finish(first), real.finish(second)] == [True, False]
    assert raw.xlen(NORMAL) == 0


def test_7_lost_writes_are_seen_by_epoch_and_by_has_entries(real, raw):
    before, id = real.epoch(), real.publish("cpu", "normal", msg("a"))
    raw.flushall()
    assert real.epoch() != before and real.has_entries([(NORMAL, id)]) == [False]
    real.publish("cpu", "normal", msg("a"))
    assert keys(real.read(["cpu"], "w1")) == ["a"]


@pytest.fixture
def wire(redis_url: str) -> Iterator[Wire]:
    w = Wire(urlsplit(redis_url).port)
    yield w
    w.close()


def test_8_a_lost_publish_reply_makes_a_duplicate_at_worst(wire, raw):
    with Bridge(wire.url) as b:
        b.epoch()
        wire.cut()
        assert b.publish("cpu", "normal", msg("a"))
        assert keys(b.read(["cpu"], "w1", count=9)) == ["a", "a"]


def test_8_a_lost_read_reply_is_an_error_and_the_entry_is_in_our_pending_list(wire, real):
    with Bridge(wire.url) as b:
        b.read(["cpu"], "w1", block_ms=1)
        real.publish_many([("cpu", "normal", msg("a")), ("cpu", "normal", msg("b"))])
        wire.cut()
        with pytest.raises(ServiceUnavailable) as e: b.read(["cpu"], "w1", block_ms=0)
        assert e.value.fields["operation"] == "read" and e.value.retryable
        assert keys(b.own_pending(["cpu"], "w1")) == ["a"]
        assert keys(b.read(["cpu"], "w1", count=9)) == ["b"]


def test_9_a_blocking_read_whose_connection_drops_recovers(wire, real, raw):
    with Bridge(wire.url) as b:
        b.read(["cpu"], "w1", block_ms=1)
        failed = []
        t = threading.Thread(target=lambda: failed.append(_error(lambda: b.read(["cpu"], "w1"))))
        t.start()
        wait_for(lambda: raw.info("clients")["blocked_clients"] == 1)
        wire.cut()
        real.publish("cpu", "normal", msg("a"))
        t.join(8)
        assert isinstance(failed[0], ServiceUnavailable)
        assert keys(b.own_pending(["cpu"], "w1")) == ["a"] and b.read(["cpu"], "w1", block_ms=0) == []


def _error(call: Callable[[], object]) -> BaseException | None:
    try: call()
    except ServiceUnavailable as e: return e
    return None


def test_9_no_read_blocks_longer_than_two_seconds(real):
    started = time.monotonic()
    assert real.read(["cpu"], "w1", block_ms=600_000) == []
    assert 1.9 < time.monotonic() - started < 4.0


def test_10_renewal_keeps_a_long_task_and_does_not_count_as_a_delivery(real, raw):
    real.publish("cpu", "normal", msg("long"))
    held = real.read(["cpu"], "w1")
    raw.xclaim(NORMAL, GROUP, "w1", 0, [held[0].id], idle=60_000, justid=True)
    assert real.renew(held) == held
    assert real.reclaim(["cpu"], "w2", min_idle_ms=30_000) == []
    row, = raw.xpending_range(NORMAL, GROUP, "-", "+", 9)
    assert row["times_delivered"] == 1 and row["consumer"] == b"w1"


def test_11_a_frozen_owner_learns_from_its_renewal_that_it_lost(real, raw):
    real.publish_many([("cpu", "normal", msg("a")), ("cpu", "low", msg("b"))])
    held = real.read(["cpu"], "w1", count=2)
    raw.xclaim(NORMAL, GROUP, "w1", 0, [held[0].id], idle=60_000, justid=True)
    theirs, = real.reclaim(["cpu"], "w2", min_idle_ms=30_000, count=9)
    assert keys(real.renew(held)) == ["b"]
    assert raw.xpending_range(NORMAL, GROUP, "-", "+", 9)[0]["consumer"] == b"w2"
    assert real.finish(theirs) is True and real.finish(held[0]) is False


@pytest.mark.parametrize("body, reason", [
    ({"m": b"\xff\xfe"}, "Invalid JSON"), ({"m": b"{}"}, "Field required"), ({"x": b"1"}, "no field 'm'"),
    ({"m": b"[1, 2]"}, "not a StepMessage"), ({"m": b'{"job": "j", "key": "k", "extra": 1}'}, "not a StepMessage"),
    ({"m": b'{"schema_version": 9, "job": "j", "key": "k"}'}, "schema_version 9 is newer than 1"),
    ({"m": b'{"schema_version": 2, "job": "j", "shards": [1]}'}, "schema_version 2 is newer than 1"),
    ({"m": b'{"schema_version": "x", "job": "j", "key": "k"}'}, "not a StepMessage")])
def test_13_what_cannot_be_read_arrives_with_a_reason_and_is_buried_raw(real, raw, body, reason):
    raw.xadd(NORMAL, body)
    real.publish("cpu", "normal", msg("next"))
    bad, good = real.read(["cpu"], "w1", count=2)
    assert bad.message is None and reason in bad.error and good.message == msg("next")
    assert real.dead_letter(bad, bad.error)
    letter, = real.dead_letters()
    assert letter["raw"] == {k.encode(): v for k, v in body.items()} and reason in letter["reason"]
    assert raw.xlen(NORMAL) == 1 and raw.xlen(DEAD) == 1


def test_14_a_wake_up_by_several_streams_at_once_takes_only_the_free_slot(real, raw):
    real.read(["cpu"], "w1", block_ms=1)
    got = []
    t = threading.Thread(target=lambda: got.extend(real.read(["cpu"], "w1", count=1)))
    t.start()
    wait_for(lambda: raw.info("clients")["blocked_clients"] == 1)
    pipe = raw.pipeline(transaction=True)
    for p in ("low", "normal", "high"): pipe.xadd(work_stream("cpu", p), {BODY: msg(p).model_dump_json()})
    pipe.execute()
    t.join(5)
    rest = real.read(["cpu"], "w2", count=9, block_ms=0)
    assert len(got) == 1 and sorted(keys(got + rest)) == ["high", "low", "normal"]


def test_14_more_than_the_free_slots_goes_straight_back(real, monkeypatch):
    "Entries arrive on all streams after the look and before the wait: the wait may bring one from each."
    real.read(["cpu"], "w1", block_ms=1)
    wait = Bridge._wait

    def late(self: Bridge, *args: object) -> list:
        real.publish_many([("cpu", p, msg(p)) for p in ("low", "normal", "high")])
        return wait(self, *args)

    monkeypatch.setattr(Bridge, "_wait", late)
    assert keys(real.read(["cpu"], "w1", count=1)) == ["high"]
    assert keys(real.own_pending(["cpu"], "w1")) == ["high"]
    assert keys(real.read(["cpu"], "w2", count=9, block_ms=0)) == ["normal", "low"]


def test_15_many_reclaimers_at_once_share_without_a_lock(real):
    real.publish_many([("cpu", "normal", msg(str(k))) for k in range(60)])
    real.read(["cpu"], "dead", count=60)
    wait_for(lambda: real.stats()["streams"][NORMAL]["oldest_idle_ms"] >= 300)
    taken: list[list[Entry]] = [[] for _ in range(4)]
    threads = [threading.Thread(target=lambda k=k: taken[k].extend(real.reclaim(["cpu"], f"w{k}", 300, 40)))
               for k in range(4)]
    for t in threads: t.start()
    for t in threads: t.join(10)
    ids = [o.id for part in taken for o in part]
    assert len(ids) == len(set(ids)) == 60


def test_16_a_full_redis_pushes_back_and_finishing_still_works(server):
    with Bridge(server.url) as b, redis.Redis.from_url(server.url) as r:
        b.publish_many([("cpu", "normal", msg("a")), ("cpu", "normal", msg("b"))])
        a, other = b.read(["cpu"], "w1", count=2)
        r.config_set("maxmemory", "100kb")
        r.config_set("maxmemory-policy", "noeviction")
        with pytest.raises(ServiceUnavailable) as e: b.publish("cpu", "normal", msg("c"))
        assert e.value.fields["out_of_memory"] is True and "out of memory" in str(e.value)
        with pytest.raises(ServiceUnavailable): b.hand_back(other)
        assert keys(b.renew([a, other])) == ["a", "b"], "a refused hand-back leaves the entry where it was"
        assert b.finish(a, {"job": "j", "key": "a"}) is True
        r.config_set("maxmemory", "0")
        assert b.hand_back(other)


def test_16_a_server_that_evicts_or_forgets_is_named_by_problems(server):
    with Bridge(server.url) as b, redis.Redis.from_url(server.url) as r:
        assert b.problems() == []
        r.config_set("maxmemory-policy", "allkeys-lru")
        r.config_set("appendonly", "no")
        assert [o[:27] for o in b.problems()] == ["maxmemory-policy is allkeys", "appendonly is off: a restar"]


def test_17_a_wall_clock_that_jumps_does_not_expire_anything(bridge, monkeypatch):
    bridge.publish("cpu", "normal", msg("a"))
    bridge.read(["cpu"], "w1")
    now = time.time
    monkeypatch.setattr(bridge_module.time, "time", lambda: now() + 86_400)
    assert bridge.reclaim(["cpu"], "w2", min_idle_ms=30_000) == []


def test_19_a_frozen_redis_is_an_error_in_time_and_last_read_stands_still(server):
    with Bridge(server.url, command_s=0.4) as b:
        b.read(["cpu"], "w1", block_ms=1)
        before = b.last_read
        os.kill(server.process.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(ServiceUnavailable): b.publish("cpu", "normal", msg("a"))
        with pytest.raises(ServiceUnavailable): b.read(["cpu"], "w1")
        assert time.monotonic() - started < 6.0 and b.last_read == before
        os.kill(server.process.pid, signal.SIGCONT)
        b.own_pending(["cpu"], "w1")
        b.read(["cpu"], "w1", count=9, block_ms=1)
        assert b.last_read > before


def test_19_every_thread_that_finishes_on_a_frozen_redis_gets_the_error_and_can_try_again(server):
    with Bridge(server.url, command_s=0.4) as b:
        b.publish_many([("cpu", "normal", msg(str(k))) for k in range(8)])
        held, failed = b.read(["cpu"], "w1", count=8), []
        os.kill(server.process.pid, signal.SIGSTOP)
        threads = [threading.Thread(target=lambda e=e: failed.append(_error(lambda: b.finish(e)))) for e in held]
        for t in threads: t.start()
        for t in threads: t.join(20)
        assert [type(o) for o in failed] == [ServiceUnavailable] * 8
        os.kill(server.process.pid, signal.SIGCONT)
        for e in held: b.finish(e)
        assert b.own_pending(["cpu"], "w1") == [] and b.has_entries([(o.stream, o.id) for o in held]) == [False] * 8


def test_a_hint_that_is_no_json_harms_only_its_own_caller(real):
    real.publish("cpu", "normal", msg("a"))
    mine, = real.read(["cpu"], "w1")
    with pytest.raises(TypeError): real.finish(mine, {"job": object()})
    assert real.finish(mine, {"job": "j", "key": "a"}) is True


def test_a_restarted_redis_goes_on_where_it_was(server):
    stop, hints = threading.Event(), []
    with Bridge(server.url) as b:
        follower = threading.Thread(target=lambda: hints.extend(_until(b.follow_done(stop), stop, 3)))
        follower.start()
        b.publish_many([("cpu", "normal", msg("a")), ("cpu", "normal", msg("b"))])
        epoch, held = b.epoch(), b.read(["cpu"], "w1")
        wait_for(lambda: _subscribed(b, "spin:done"))
        server.stop()
        with pytest.raises(ServiceUnavailable, match="failed in publish"): b.publish("cpu", "normal", msg("c"))
        server.start()
        assert b.epoch() == epoch and b.renew(held) == held
        assert keys(b.read(["cpu"], "w1", count=9)) == ["b"]
        wait_for(lambda: _subscribed(b, "spin:done"))
        assert b.finish(held[0], {"job": "job_1", "key": "a"})
        follower.join(8)
    assert hints == [HINT_ALL, HINT_ALL, {"job": "job_1", "key": "a"}]


def test_errors_name_server_and_operation_but_not_the_password(redis_url):
    port = redis_url.split(":")[-1]
    for url in (f"redis://:topsecret@127.0.0.1:{port}", f"redis://:topsecret@127.0.0.1:{free_port()}/0"):
        with Bridge(url) as b, pytest.raises(ServiceUnavailable) as e: b.stats()
        assert "topsecret" not in str(e.value.to_dict()) and e.value.fields["operation"] == "stats"
        assert e.value.fields["url"].startswith("redis://:***@127.0.0.1:")


def test_scripts_survive_a_script_flush(real, raw):
    real.publish_many([("cpu", "normal", msg("a")), ("cpu", "normal", msg("b"))])
    real.finish(*real.read(["cpu"], "w1"))
    raw.script_flush()
    assert real.finish(*real.read(["cpu"], "w1")) is True
