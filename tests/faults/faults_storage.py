"""Disks that are full, and an S3 server that is slow, away, broken, or left in the middle of an upload."""
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import redis
from run import fault
from s3_front import FAULTS, S3Front
from world import World, wait_for

from myspinbot.core import SpinError, hash_bytes
from myspinbot.graph.builder import Pipeline
from myspinbot.bridge.keys import event_stream
from myspinbot.schema import JOB_END, Artifact, Graph


def large(w: World, mb: int, gate: str = "") -> Graph:
    "One step with a large file, and a small one after it."
    p = Pipeline("large", catalogue=w.client.catalogue)
    first = p.step("witness.large", id="s0", name=f"j{next(w.names)}", mb=mb, gate=gate)
    p.output(value=p.step("witness.mark", id="s1", name=first.value).value)
    return p.to_graph()


def whole(w: World) -> None:
    "Every artifact that can be seen, listed in the store or named by the journal, has its hash."
    store, seen = w.client.store, 0
    for sha256 in store.list():
        seen += 1
        if hasattr(store, "client"):
            r = store.call(store.client.get_object, object_name=store.object(sha256))
            data = r.read()
            r.close()
            r.release_conn()
        else: data = store.path(sha256).read_bytes()
        if hash_bytes(data) != sha256: w.violate(f"I2 {sha256[:12]} has {len(data)} bytes of another hash")
    for j in w.accepted:
        for r in w.client.steps(j):
            for a in (o for o in (*r.outputs.values(), r.notebook) if hasattr(o, "sha256")):
                if not store.exists(a.sha256): w.violate(f"I2 {a.name} of {r.key} of {j} is not in the store")
    if not seen: w.violate("nothing was stored at all")


# full disks -----------------------------------------------------------------------------------------------------------
class Disk:
    "A small file system at a folder whose content it takes over."
    def __init__(self, w: World, folder: Path, mb: int):
        self.w, self.folder, self.fill = w, folder, folder / "filler"
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder.with_name(folder.name + ".aside")
        folder.rename(aside)
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mb}m", "spinfault", str(folder)], check=True)
        self.mounted = True
        w.heals.insert(0, self.room)
        subprocess.run(["cp", "-a", f"{aside}/.", str(folder)], check=True)
        subprocess.run(["rm", "-rf", str(aside)], check=True)

    def full(self, left_kb: int = 0) -> None:
        "Write until the disk takes no more, then give back a little."
        with open(self.fill, "ab", buffering=0) as f:
            try:
                while True: f.write(b"\0" * (64 << 10))
            except OSError: pass
            f.truncate(max(0, f.tell() - left_kb * 1024))

    def room(self) -> None: self.fill.unlink(missing_ok=True)

    def unmount(self) -> None:
        "Nothing may be left behind; lazily, for whoever still has a file open there."
        if not self.mounted: return
        subprocess.run(["umount", "-l", str(self.folder)], check=True)
        self.mounted = False


class DiskWorld(World):
    "A world that unmounts its disks when all its processes have ended."
    def __init__(self, *args: Any, **kw: Any):
        self.disks: list[Disk] = []
        super().__init__(*args, **kw)

    def disk(self, folder: Path, mb: int) -> Disk:
        self.disks.append(d := Disk(self, folder, mb))
        return d

    def close(self) -> None:
        "The servers end before their disks go, and these before the folder is removed."
        stop = self.servers.stop
        def stop_and_unmount() -> bool:
            try: return stop()
            finally:
                for d in self.disks: d.unmount()
        self.servers.stop = stop_and_unmount
        super().close()


def said(w: World, job: str) -> str:
    "The error that a user sees."
    return str((w.client.job(job).error or {}).get("message", ""))


def ended_well(w: World, jobs: list[str]) -> None:
    "All succeed; what failed while the disk was full says so, and succeeds when it is retried."
    for j in jobs:
        wait_for(f"{j} ends", lambda j=j: w.client.job(j).status in JOB_END, 150)
        if w.client.job(j).status == "failed":
            if not any(o in said(w, j) for o in ("disk is full", "No space left")):
                w.violate(f"the error of {j} does not say that the disk is full: {said(w, j)}")
            w.retried.add(j)
            w.client.retry(j)
    w.quiet()


def disk_fault(name: str, short: bool = False) -> Any:
    "Mounting needs root; elsewhere these faults are not there."
    if os.geteuid() == 0: return fault(name, short, world=DiskWorld)
    return lambda fn: fn


if os.geteuid() != 0: print("Not root: no file system can be mounted, the faults of full disks are left out.", file=sys.stderr)


def live(w: World, job: str) -> str:
    "What a user who follows the job was told."
    return "\n".join(o.decode() for _, body in w.redis.xrange(event_stream(job)) for o in body.values())


@disk_fault("disk full: artifacts", short=True)
def artifacts_full(w: DiskWorld, rng: random.Random) -> None:
    "A step's result waits for room; nothing of it is to be seen before it is whole."
    d, gate = w.disk(w.farm.home / "store", 64), w.home / "gate"
    w.start("control", "w1")
    job = w.submit(large(w, rng.randint(20, 40), gate=str(gate)))
    w.at_work(job, "s0")
    d.full(left_kb=rng.randint(0, 8000))
    gate.touch()
    wait_for("the user is told", lambda: "waiting for the store" in live(w, job), 60)
    if not ("the disk is full" in live(w, job) and str(d.folder) in live(w, job)): w.violate(f"not clear: {live(w, job)}")
    for sha256 in w.client.store.list():
        if hash_bytes(w.client.store.path(sha256).read_bytes()) != sha256: w.violate(f"I2 {sha256[:12]} is not whole")
    d.room()
    ended_well(w, [job])
    whole(w)


@disk_fault("disk full: kernels' folders")
def scratch_full(w: DiskWorld, rng: random.Random) -> None:
    "Steps fail with the reason, other workers' do not; a retry succeeds."
    scratch, tmp = w.disk(w.farm.home / "scratch", 64), w.disk(w.tmp, 64)
    w.start("control", "w1")
    gate = w.home / "gate"
    jobs = [w.submit(large(w, rng.randint(15, 25), gate=str(gate))) for _ in range(2)]
    for j in jobs: w.at_work(j, "s0")
    scratch.full(left_kb=rng.randint(0, 4000))
    tmp.full()
    gate.touch()
    wait_for("a step has failed", lambda: any(w.client.job(j).status == "failed" for j in jobs), 90)
    scratch.room()
    tmp.room()
    ended_well(w, jobs)
    whole(w)


def on_small_disk(w: DiskWorld, folder: Path, mb: int) -> Any:
    "A server's folder on a small file system of its own; conductor and worker run."
    w.servers.stop()
    d = w.disk(folder, mb)
    w.servers.start()
    w.start("control", "w1")
    return d


@disk_fault("disk full: PostgreSQL")
def postgres_full(w: DiskWorld, rng: random.Random) -> None:
    "Submits are refused with the reason or accepted for good; a server that gave up is started again."
    d = on_small_disk(w, w.servers.pgdata, 256)
    running = [w.submit(w.chain(2)) for _ in range(rng.randint(1, 4))]
    d.full()
    refused, end = "", time.monotonic() + 40
    while not refused and time.monotonic() < end:
        key = f"known-{next(w.names)}"
        graph = w.chain(20)
        try: w.accepted.append(w.client.submit(graph, {}, idempotency_key=key).id)
        except SpinError as e: refused, again = str(e), (graph, key)
    if not refused: w.violate(f"a full disk was never met: {len(w.accepted)} jobs")
    elif not any(o in refused for o in ("is full", "does not answer")): w.violate(f"not clear: {refused}")
    time.sleep(rng.uniform(0.5, 2.0))
    d.room()
    w.servers.start()
    if refused: w.submit(again[0], tries=50, key=again[1])
    ended_well(w, [*running, *w.accepted[len(running):]])
    whole(w)


@disk_fault("disk full: Redis")
def redis_full(w: DiskWorld, rng: random.Random) -> None:
    "Redis refuses writes, jobs are accepted by the journal and run when there is room."
    d = on_small_disk(w, w.servers.redis_dir, 16)
    before = [w.submit(w.chain(2)) for _ in range(rng.randint(1, 4))]
    d.full()
    def refuses() -> bool:
        try: w.redis.set("filler", os.urandom(1 << 16))
        except redis.exceptions.ResponseError as e: return "MISCONF" in str(e)
        return False
    wait_for("Redis refuses writes", refuses, 30)
    during = [w.submit(w.chain(2), tries=5) for _ in range(3)]
    time.sleep(rng.uniform(0.5, 4.0))
    d.room()
    w.servers.start()
    wait_for("Redis takes writes", lambda: not refuses(), 30)
    w.redis.delete("filler")
    ended_well(w, [*before, *during])
    whole(w)


# S3 -------------------------------------------------------------------------------------------------------------------
class S3World(World):
    "A world whose store is an S3 server behind a front that can be broken."
    def __init__(self, *args: Any, stale_s: float = 86400.0, **kw: Any):
        import logging

        from moto.server import ThreadedMotoServer
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
        self.moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.moto.start()
        host, port = self.moto.get_host_and_port()
        self.s3 = S3Front(f"{host}:{port}")
        url = f"s3://k:s@{self.s3.endpoint}/b{os.urandom(4).hex()}/pre/fix?secure=false&stale_s={stale_s:g}"
        super().__init__(*args, store_url=url, **kw)
        self.heals += [self.s3.up, self.s3.well]

    def check_stopped(self) -> None:
        super().check_stopped()
        whole(self)
        for name, _, at in self.client.store.unfinished(): self.violate(f"I3 upload of {name}, begun {at}, is left over")

    def close(self) -> None:
        try: super().close()
        finally:
            self.s3.down()
            self.moto.stop()


@fault("S3 slow", world=S3World)
def s3_slow(w: S3World, rng: random.Random) -> None:
    w.start("control", "w1")
    w.s3.delay_s = rng.uniform(1.5, 2.0)
    w.submit(w.chain(1))
    w.quiet()


@fault("S3 down", short=True, world=S3World)
def s3_down(w: S3World, rng: random.Random) -> None:
    "Longer than a client tries by itself: the worker holds the result, and the step does not run again."
    w.start("control", "w1")
    gate = w.home / "gate"
    job = w.submit(w.chain(2, gate=str(gate)))
    w.at_work(job, "s0")
    w.s3.down()
    gate.touch()
    wait_for("the user is told", lambda: "waiting for the store" in live(w, job), 60)
    time.sleep(rng.uniform(0, 4))
    w.s3.up()
    w.quiet()
    if w.row(job, "s0").attempt != 1: w.violate("the step ran again")


def s3_broken(kind: str, short: bool = False) -> None:
    @fault(f"S3: {kind}", short=short, world=S3World)
    def scenario(w: S3World, rng: random.Random) -> None:
        w.start("control", "w1")
        w.s3.fault, w.s3.times = kind, rng.randint(1, 6)
        if kind == "cut reply": w.s3.fits = lambda method, path: method == "GET" and "?" not in path
        wanted = w.s3.times
        w.submit(large(w, rng.randint(17, 40)))
        w.submit(w.chain(2))
        w.quiet()
        if kind == "cut reply": whole_through(w)
        if w.s3.times == wanted: w.violate(f"no request was met by {kind!r}")


def whole_through(w: S3World) -> None:
    "A client that fetches while replies are cut gets a whole file or our error."
    for j in w.accepted:
        for a in (o for r in w.client.steps(j) for o in r.outputs.values() if isinstance(o, Artifact)):
            try: data = w.client.store.open(a).read()
            except SpinError: continue
            if hash_bytes(data) != a.sha256: w.violate(f"{a.name} was fetched broken")


for _kind in FAULTS: s3_broken(_kind, short=_kind == "500 after")


@fault("S3: SIGKILL of a worker in mid-multipart", short=True, world=S3World, stale_s=6)
def killed_in_multipart(w: S3World, rng: random.Random) -> None:
    "Another worker makes it again; the half upload is aborted, and never was an object."
    w.start("control", "w1")
    w.s3.delay_s = 0.3
    w.submit(large(w, 40))
    parts, n = (lambda: [o for o in w.s3.seen if o[0] == "PUT" and "partNumber" in o[1]]), rng.randint(1, 2)
    wait_for(f"{n} parts are there", lambda: len(parts()) >= n, 60)
    w.kill("w1")
    w.s3.well()
    if not list(w.client.store.unfinished()): w.violate("the upload was not under way")
    w.start("w2")
    w.quiet()
    wait_for("the half upload is aborted", lambda: not list(w.client.store.unfinished()), 30)
