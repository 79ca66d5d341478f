"""Redis and PostgreSQL that die, forget, fill up and freeze."""
import random
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import psycopg
import redis
from outage import Load, only_once, pause
from proxy import Proxy
from run import fault
from world import World, wait_for

from myspinbot.api.client import Client
from myspinbot.embedded import redis_answers
from myspinbot.bridge.keys import GROUP, JOBS, JOBS_GROUP
from myspinbot.schema import PRIORITIES


def kill_redis(w: World) -> None:
    w.servers.redis_process().kill()
    w.report.kills += 1
    wait_for("Redis is gone", lambda: w.servers.redis_process() is None)


def forget(w: World) -> None:
    "Remove what Redis keeps on its disk."
    for o in w.servers.redis_dir.glob("appendonly*"):
        shutil.rmtree(o) if o.is_dir() else o.unlink()


# Redis ----------------------------------------------------------------------------------------------------------------
def redis_restarted(name: str, empty: bool) -> None:
    @fault(f"Redis killed, restarted {name}", short=empty)
    def scenario(w: World, rng: random.Random) -> None:
        with Load(w):
            for _ in range(2):
                pause(rng, 0.1, 1.5)
                kill_redis(w)
                if empty: forget(w)
                pause(rng, 0.0, 3.0)
                w.servers.start()


redis_restarted("with its log", empty=False)
redis_restarted("empty", empty=True)


@fault("Redis FLUSHALL in mid-job")
def flushed(w: World, rng: random.Random) -> None:
    with Load(w):
        for _ in range(4):
            pause(rng, 0.1, 1.5)
            w.redis.flushall()


@fault("Redis FLUSHALL, work queued and nobody reads", short=True)
def flushed_unread(w: World, rng: random.Random) -> None:
    w.start("control")
    jobs = [w.submit(w.chain(2)) for _ in range(rng.randint(3, 8))]
    s = w.stream()
    wait_for("all is published", lambda: w.redis.exists(s) and w.redis.xlen(s) == len(jobs))
    for _ in range(2):
        pause(rng, 0.0, 1.0)
        w.redis.flushall()
        at = time.time()
        wait_for("all is published again", lambda: w.redis.exists(s) and w.redis.xlen(s) >= len(jobs), 30)
        w.report.recovery_s.append(time.time() - at)
    w.start("w1")
    w.quiet()
    only_once(w)


@fault("Redis XGROUP DESTROY", short=True)
def groups_destroyed(w: World, rng: random.Random) -> None:
    with Load(w):
        for _ in range(8):
            pause(rng, 0.1, 0.6)
            for s in rng.sample([w.stream(priority=p) for p in PRIORITIES], 2):
                if w.redis.exists(s): w.redis.xgroup_destroy(s, GROUP)
            if rng.random() < 0.5 and w.redis.exists(JOBS): w.redis.xgroup_destroy(JOBS, JOBS_GROUP)


@fault("Redis streams deleted")
def streams_deleted(w: World, rng: random.Random) -> None:
    with Load(w):
        for _ in range(8):
            pause(rng, 0.1, 0.6)
            w.redis.delete(*rng.sample([JOBS, *(w.stream(priority=p) for p in PRIORITIES)], 3), w.stream())


@fault("Redis out of memory")
def out_of_memory(w: World, rng: random.Random) -> None:
    with Load(w, jobs=2) as load:
        pause(rng, 0.0, 1.0)
        w.redis.config_set("maxmemory", 1)
        w.heals.append(lambda: w.redis.config_set("maxmemory", 0))
        pause(rng, 3.0, 6.0)
        w.redis.config_set("maxmemory", 0)
        if load.submitter.refused: w.violate("a submit was refused because Redis is full")


def frozen(w: World, processes: list[psutil.Process], seconds: float) -> None:
    "Stop processes for a while."
    def thaw() -> None:
        for p in processes:
            try: p.resume()
            except psutil.NoSuchProcess: continue
    w.heals.append(thaw)
    for p in processes: p.suspend()
    time.sleep(seconds)
    thaw()


@fault("Redis frozen for three leases")
def redis_frozen(w: World, rng: random.Random) -> None:
    with Load(w, seconds=1.0):
        pause(rng, 0.0, 1.0)
        frozen(w, [w.servers.redis_process()], 3 * w.lease_s)


# a replica ------------------------------------------------------------------------------------------------------------
def replica_of(w: World, primary: Proxy) -> Path:
    "Start a second server that follows the first; its socket."
    home = w.home / "replica"
    home.mkdir()
    sock = home / "redis.sock"
    p = subprocess.Popen([w.program, "--port", "0", "--unixsocket", str(sock), "--dir", str(home), "--appendonly", "yes",
                          "--save", "", "--repl-diskless-sync-delay", "0", "--replicaof", "127.0.0.1", str(primary.port)],
                         stdout=(home / "log").open("wb"), stderr=subprocess.STDOUT)
    def end() -> None:
        p.kill()
        p.wait()
    w.ends.append(end)
    wait_for("the replica answers", lambda: sock.exists() and redis_answers(sock))
    r = redis.Redis(unix_socket_path=str(sock))
    wait_for("the replica follows", lambda: r.info("replication")["master_link_status"] == "up")
    return sock


@fault("Redis fails over to a replica that lacks the last writes")
def failed_over(w: World, rng: random.Random) -> None:
    primary = w.servers.redis_socket()
    link, address = Proxy(primary), Proxy(primary)  # between the two servers; what clients call Redis
    w.ends += [link.close, address.close]
    url = f"redis://127.0.0.1:{address.port}/0"
    w.farm.env["SPIN_REDIS_URL"] = url
    client = Client(w.farm.cfg.changed(redis_url=url), w.client.catalogue)
    w.ends.append(client.close)
    w.client = client
    sock = replica_of(w, link)
    with Load(w):
        pause(rng, 0.0, 1.0)
        link.set("hole")               # the replica falls behind and does not know it
        pause(rng, 0.5, 2.0)
        r = redis.Redis(unix_socket_path=str(sock))
        r.replicaof("NO", "ONE")
        address.to(sock)
        w.redis.close()
        w.redis = r


# PostgreSQL -----------------------------------------------------------------------------------------------------------
def postgres(w: World) -> list[psutil.Process]:
    "The postmaster and its children."
    p = w.servers.postgres_process()
    return [p, *p.children(recursive=True)]


def admin(w: World) -> psycopg.Connection:
    return psycopg.connect(w.farm.cfg.postgres_url.get_secret_value(), autocommit=True, application_name="nemesis")


OURS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'myspinbot' AND pid <> pg_backend_pid()"


def postgres_gone(w: World, sig: int) -> None:
    p = w.servers.postgres_process()
    p.send_signal(sig)
    w.report.kills += sig == signal.SIGKILL
    p.wait(30)


@fault("PostgreSQL killed", short=True)
def postgres_killed(w: World, rng: random.Random) -> None:
    with Load(w):
        for _ in range(2):
            pause(rng, 0.1, 1.5)
            postgres_gone(w, signal.SIGKILL)
            pause(rng, 0.0, 2.0)
            w.servers.start()


@fault("PostgreSQL backend killed")
def backend_killed(w: World, rng: random.Random) -> None:
    with Load(w):
        for _ in range(3):
            pause(rng, 0.1, 1.5)
            with admin(w) as c: pids = [r[0] for r in c.execute(OURS).fetchall()]
            psutil.Process(rng.choice(pids)).kill()
            w.report.kills += 1
            wait_for("PostgreSQL ends them all", lambda pids=pids: not any(map(psutil.pid_exists, pids)))
            wait_for("PostgreSQL has recovered", lambda: w.client.health()["postgres"]["ok"])


@fault("PostgreSQL restarted, fast and immediate")
def postgres_restarted(w: World, rng: random.Random) -> None:
    with Load(w):
        for sig in rng.sample([signal.SIGINT, signal.SIGQUIT, signal.SIGINT], 3):
            pause(rng, 0.1, 1.5)
            postgres_gone(w, sig)
            w.servers.start()


def postgres_down(seconds: float, short: bool) -> None:
    @fault(f"PostgreSQL down for {seconds:g} s", short=short)
    def scenario(w: World, rng: random.Random) -> None:
        gate = w.home / "gate"
        w.start("control", "w1", "w2")
        job = w.submit(w.chain(2, gate=str(gate)))
        with ThreadPoolExecutor(1) as pool, Load(w, workers=0):
            waiting = pool.submit(w.client.wait, job, seconds + 60)
            w.at_work(job, "s0")
            postgres_gone(w, rng.choice([signal.SIGINT, signal.SIGQUIT]))
            down = time.monotonic()
            time.sleep(rng.uniform(0.2, 0.8) * seconds)
            gate.touch()                # this step ends while nobody can write that down
            time.sleep(max(0.0, down + seconds - time.monotonic()))
            w.servers.start()
            if waiting.result().status != "succeeded": w.violate(f"who waited heard {waiting.result().status}")


postgres_down(10, short=True)
postgres_down(60, short=False)


@fault("SIGTERM: worker and conductor while PostgreSQL is away")
def stopped_in_an_outage(w: World, rng: random.Random) -> None:
    "They end in time and by themselves; what they could not write down is done again by others."
    gate = w.home / "gate"
    w.start("control", "w1")
    job = w.submit(w.chain(2, gate=str(gate)))
    w.at_work(job, "s0")
    postgres_gone(w, signal.SIGQUIT)
    gate.touch()
    pause(rng, 0.0, 3.0)
    began = time.monotonic()
    w.stop("w1", "control")
    if (took := time.monotonic() - began) > 45: w.violate(f"it took {took:.0f} s to stop")
    w.servers.start()
    w.start("control2", "w2")
    w.quiet()


@fault("PostgreSQL connections terminated in a loop", short=True)
def terminated(w: World, rng: random.Random) -> None:
    with Load(w) as load, admin(w) as c:
        end = time.monotonic() + rng.uniform(3.0, 6.0)
        cut = 0
        while time.monotonic() < end:
            cut += len(c.execute(OURS.replace("SELECT pid", "SELECT pg_terminate_backend(pid)")).fetchall())
            time.sleep(0.1)
        if not cut: w.violate("no connection was there to cut")
        if not load.submitter.sent: w.violate("nobody submitted")


@fault("PostgreSQL frozen for three leases")
def postgres_frozen(w: World, rng: random.Random) -> None:
    with Load(w, seconds=1.0, once=False):  # a claim whose answer came too late is repeated after its lease
        pause(rng, 0.0, 1.0)
        frozen(w, postgres(w), rng.uniform(3.0, 6.0) * w.lease_s)
