"""Live events: one conformance suite for Redis and the in-memory twin, then caps, expiry and a Redis that goes away."""
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import redis
from conftest import SERVERS, free_port

from myspinbot.core import InputError, ServiceUnavailable
from myspinbot.bridge.live import LOG_BYTES, VALUE_BYTES, Events, MemoryEvents, trim
from myspinbot.bridge.keys import event_channel, event_stream
from myspinbot.schema import Event


def log(text: object, job: str = "job_1") -> Event:
    return Event(job=job, kind="log", key="talk", body={"text": text}, at=1.5)


def text(e: Event | tuple[str, Event]) -> str: return (e[1] if isinstance(e, tuple) else e).body["text"]
def texts(events: Iterable) -> list[str]: return [text(e) for e in events]


def wait_for(what: Callable[[], object], limit_s: float = 10.0) -> object:
    end = time.monotonic() + limit_s
    while not (got := what()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)
    return got


@pytest.fixture(params=SERVERS)
def redis_url(request: pytest.FixtureRequest, flushed_server: Callable[[str], str]) -> str: return flushed_server(request.param)


@pytest.fixture(params=[*SERVERS, "memory"])
def events(request: pytest.FixtureRequest, flushed_server: Callable[[str], str]) -> Iterator[Events | MemoryEvents]:
    e = MemoryEvents() if request.param == "memory" else Events(flushed_server(request.param))
    yield e
    e.close()


# ---- conformance: both ----

def test_events_come_back_in_order_and_unchanged(events):
    half = {"fraction": 0.5, "note": "ö"}
    sent = [log("one"), Event(job="job_1", kind="progress", key="talk", body=half, at=2.0, seq=4)]
    ids = [events.publish(e) for e in sent]
    assert events.read("job_1") == list(zip(ids, sent, strict=True))
    assert events.last_id("job_1") == ids[-1]


def test_jobs_do_not_see_each_others_events(events):
    events.publish_many([log("a"), log("b", "job_2"), log("c")])
    assert texts(events.read("job_1")) == ["a", "c"] and texts(events.read("job_2")) == ["b"]
    assert events.read("job_3") == [] and events.last_id("job_3") == "0"


def test_reading_goes_on_after_the_last_id_in_pages(events):
    events.publish_many([log(str(k)) for k in range(10)])
    page = events.read("job_1", count=4)
    rest = events.read("job_1", after_id=page[-1][0])
    assert texts(page) == list("0123") and texts(rest) == list("456789")


def test_a_waiting_reader_is_woken(events):
    t = threading.Timer(0.05, events.publish, (log("late"),))
    t.start()
    assert texts(events.read("job_1", block_ms=2000)) == ["late"]
    started = time.monotonic()
    assert events.read("job_1", after_id=events.last_id("job_1"), block_ms=50) == []
    assert 0.04 < time.monotonic() - started < 1.0


def test_follow_replays_then_streams_until_the_end(events):
    events.publish_many([log("one"), log("two")])
    got, end = [], lambda e: e.body["text"] == "end"
    t = threading.Thread(target=lambda: got.extend(texts(events.follow("job_1", until=end))))
    t.start()
    events.publish_many([log("three"), log("end"), log("after")])
    t.join(5)
    assert got == ["one", "two", "three", "end"]


def test_follow_ends_by_stop_and_by_time(events):
    events.publish(log("one"))
    stop = threading.Event()
    for _ in events.follow("job_1", stop=stop): stop.set()
    started = time.monotonic()
    assert texts(events.follow("job_1", timeout_s=0.1)) == ["one"]
    assert 0.09 < time.monotonic() - started < 2.0


def test_following_from_now_on_skips_what_was(events):
    events.publish(log("old"))
    got = []
    news = events.follow("job_1", after_id="$", timeout_s=5, until=bool)
    t = threading.Thread(target=lambda: got.extend(texts(news)))
    t.start()
    wait_for(lambda: events.publish(log("new")) and not t.is_alive())
    assert got == ["new"]


def test_an_old_stream_keeps_only_its_newest_events(redis_url):
    for e in (Events(redis_url, maxlen=100), MemoryEvents(maxlen=100)):
        e.publish_many([log(str(k)) for k in range(1000)])
        kept = texts(e.read("job_1", count=5000))
        assert 100 <= len(kept) <= 300 and kept[-1] == "999"
        e.close()


def test_a_deleted_job_has_no_events(events):
    events.publish(log("one"))
    events.delete("job_1")
    assert events.read("job_1") == []


def test_posted_events_arrive_in_order(events):
    for k in range(300): events.post(log(str(k)))
    assert events.flush() and events.dropped == 0
    assert texts(events.read("job_1")) == [str(k) for k in range(300)]


def test_closing_sends_what_was_posted(redis_url):
    e = Events(redis_url)
    for k in range(50): e.post(log(str(k)))
    e.close()
    again = Events(redis_url)
    assert len(again.read("job_1")) == 50
    again.close()


def test_long_lines_are_cut_and_large_previews_left_out(events):
    events.publish(log("x" * 100_000))
    events.publish(Event(job="job_1", kind="preview", body={"image": "A" * (VALUE_BYTES + 1), "note": "n"}))
    events.publish(Event(job="job_1", kind="preview", body={"image": "A" * VALUE_BYTES}))
    line, large, small = (e for _, e in events.read("job_1"))
    assert line.body["text"] == "x" * LOG_BYTES + f" ... [{100_000 - LOG_BYTES} bytes cut]"
    assert large.body == {"image": "[dropped: 65537 bytes, the limit is 65536]", "note": "n"}
    assert len(small.body["image"]) == VALUE_BYTES


def test_text_that_is_no_text_still_travels(events):
    events.publish(log("caf\udce9 \x00 \u20ac"))
    assert texts(events.read("job_1")) == ["caf\ufffd \x00 \u20ac"]


def test_a_body_that_is_not_json_is_refused_where_it_is_posted(events):
    for send in (events.post, events.publish):
        with pytest.raises(InputError, match="not JSON"): send(log(object()))
    assert events.read("job_1") == []


def test_caps_reach_into_lists_and_leave_short_events_alone():
    deep = Event(job="j", kind="log", body={"lines": ["ok", {"t": "y" * 9000}], "n": 3})
    assert trim(deep).body["lines"][1]["t"].endswith("bytes cut]") and trim(deep).body["n"] == 3
    short = Event(job="j", kind="log", body={"lines": ["ok", {"t": "ü"}]})
    assert trim(short) is short


# ---- Redis only ----

def test_a_stream_expires_after_its_last_event(redis_url):
    e = Events(redis_url, expire_s=100)
    e.publish_many([log("a"), log("b", "job_2")])
    with redis.Redis.from_url(redis_url) as r:
        assert 0 < r.ttl(event_stream("job_1")) <= 100 and 0 < r.ttl(event_stream("job_2")) <= 100
    e.close()


def test_listeners_of_the_channel_get_the_same_event(redis_url):
    e = Events(redis_url)
    with redis.Redis.from_url(redis_url) as r, r.pubsub(ignore_subscribe_messages=True) as sub:
        sub.subscribe(event_channel("job_1"))
        wait_for(lambda: r.pubsub_numsub(event_channel("job_1"))[0][1])
        e.publish(log("hello"))
        data = wait_for(lambda: sub.get_message(timeout=0.1))["data"]
    assert Event.model_validate_json(data) == log("hello")
    e.close()


def test_an_event_of_a_newer_version_does_not_stop_the_reader(redis_url):
    e = Events(redis_url)
    with redis.Redis.from_url(redis_url) as r:
        r.xadd(event_stream("job_1"), {"e": '{"job": "job_1", "kind": "hologram"}'})
        r.xadd(event_stream("job_1"), {"other": "x"})
    e.publish(log("after"))
    assert texts(e.read("job_1")) == ["[an event that this version cannot read: ValidationError]",
                                      "[an event that this version cannot read: KeyError]", "after"]
    e.close()


def start_redis(program: str, port: int, folder: Path) -> subprocess.Popen:
    p = subprocess.Popen([program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder),
                          "--save", "", "--appendonly", "yes", "--appendfsync", "always"], stdout=subprocess.DEVNULL)
    with redis.Redis(port=port) as r: wait_for(lambda: answers(r))
    return p


def answers(r: redis.Redis) -> bool:
    try: return r.ping()
    except redis.ConnectionError: return False


@pytest.mark.parametrize("program", SERVERS.values(), ids=SERVERS)
@pytest.mark.parametrize("keeps_data", [True, False], ids=["with its data", "emptied"])
def test_follow_lives_through_a_restart_of_redis(tmp_path, keeps_data, program):
    port, got, stop = free_port(), [], threading.Event()
    server = start_redis(program, port, tmp_path)
    events = Events(f"redis://127.0.0.1:{port}/0")
    events.publish(log("before"))
    t = threading.Thread(target=lambda: [got.append(o) for o in map(text, events.follow("job_1", stop=stop))])
    t.start()
    wait_for(lambda: got == ["before"])
    server.terminate()
    server.wait(10)
    with pytest.raises(ServiceUnavailable, match="failed in publish event"): events.publish(log("lost"))
    events.post(log("lost too"))
    assert events.flush() and events.dropped == 1
    folder = tmp_path if keeps_data else tmp_path / "new"
    folder.mkdir(exist_ok=True)
    server = start_redis(program, port, folder)
    events.publish(log("after"))
    wait_for(lambda: got == ["before", "after"])
    stop.set()
    t.join(5)
    assert not t.is_alive()
    events.close()
    server.terminate()
    server.wait(10)


def test_posting_to_a_dead_redis_neither_waits_nor_fails():
    events = Events(f"redis://127.0.0.1:{free_port()}/0")
    started = time.monotonic()
    for k in range(3000): events.post(log(str(k)))
    assert time.monotonic() - started < 2.0
    wait_for(lambda: events.dropped >= 2000)
    events.close()
