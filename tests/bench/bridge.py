"""The bridge beside the task queues that people would use instead: no-op jobs, one server, one worker process each.

    python tests/bench/bridge.py            # ours, streaq, taskiq-redis, saq, dramatiq
    python tests/bench/bridge.py --all      # and arq, rq, celery
    python tests/bench/bridge.py --only saq dramatiq
    python tests/bench/bridge.py --only ours

The peers are no dependencies of the project: they are installed into a temporary environment, and where that cannot be done
only our own rows are shown. Every queue does the same work (peers/work.py) against the same Valkey (AOF, fsync every second) in
a process of its own; ours does it on a Redis, too, where there is one. The rounds alternate between them, so that the noise of
the machine hits all alike.
ROUNDS, JOBS and PACED set how much is measured.
"""
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import redis

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import SERVERS
from table import Row, main, percentile

PEERS = Path(__file__).parent / "peers"
ROUNDS, JOBS, PACED = (int(os.environ.get(k, v)) for k, v in (("ROUNDS", 3), ("JOBS", 5000), ("PACED", 300)))
GAP_S, WARM = 0.02, 20


@dataclass
class Queue:
    "One contestant."
    name: str
    package: str                   # what to install; empty: this project
    command: str                   # its worker
    default: bool = False          # in a run without flags?
    results: dict[str, list[float]] = field(default_factory=dict)


OURS = Queue("ours", "", "python with_bridge.py", True)
ALL = [
    OURS,
    Queue("streaq", "streaq", "streaq run with_streaq:worker", True),
    Queue("taskiq", "taskiq-redis", "taskiq worker with_taskiq:broker --workers 1 --max-async-tasks 32", True),
    Queue("saq", "saq[redis]", "saq with_saq.settings", True),
    Queue("dramatiq", "dramatiq[redis]", "dramatiq with_dramatiq --processes 1 --threads 32", True),
    Queue("arq", "arq", "arq with_arq.WorkerSettings"),
    Queue("rq", "rq", "rq worker --worker-class rq.SimpleWorker bench --url {url}"),
    Queue("celery", "celery[redis]", "celery -A with_celery worker -P threads -c 32 -l ERROR --without-gossip --without-mingle"),
]
MEASURES = [("p50", "start delay p50", "ms", False), ("p99", "start delay p99", "ms", False),
            ("drain", "drain", "jobs/s", True), ("enqueue", "bulk enqueue", "jobs/s", True)]


@contextmanager
def redis_server(exe: str) -> Iterator[tuple[str, redis.Redis]]:
    "URL and client of a server that writes its append-only file, and syncs it every second."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder, redis.Redis(port=port) as client:
        server = subprocess.Popen([exe, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", "",
            "--appendonly", "yes", "--appendfsync", "everysec", "--auto-aof-rewrite-percentage", "0"],
            stdout=subprocess.DEVNULL)
        try:
            wait(lambda: answers(client), 20)
            yield f"redis://127.0.0.1:{port}/0", client
        finally:
            server.terminate()
            server.wait(10)


def answers(client: redis.Redis) -> bool:
    try: return client.ping()
    except redis.ConnectionError: return False


def wait(what, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not what():
        if time.monotonic() > end: raise TimeoutError(f"not within {limit_s} s")
        time.sleep(0.005)


def install(folder: Path, packages: list[str]) -> bool:
    "An environment with the peers, by uv or pip; False, and the reason printed, where it cannot be made."
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    make = [uv, "venv", "-q", "--python", sys.executable] if uv else [sys.executable, "-m", "venv"]
    python = str(folder / "bin/python")
    fill = [uv, "pip", "install", "-q", "--python", python] if uv else [python, "-m", "pip", "install", "-q"]
    for command in ([*make, str(folder)], [*fill, "redis[hiredis]", *packages]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"The peers cannot be installed, so there are only our own rows: {done.stderr.strip()[-300:]}")
            return False
    return True


class Run:
    "One queue's processes against one server."
    def __init__(self, queue: Queue, bin: Path, url: str, client: redis.Redis):
        self.queue, self.client, self.url = queue, client, url
        path = f"{bin}{os.pathsep}{os.environ['PATH']}"
        source = os.pathsep.join(filter(None, [str(PEERS), str(PEERS.parents[2]) if not queue.package else ""]))
        self.env = {**os.environ, "BENCH_REDIS": url, "PATH": path, "PYTHONPATH": source}
        self.python = str(bin / "python")

    def produce(self, *args: object) -> float:
        module = f"with_{'bridge' if not self.queue.package else self.queue.name}"
        out = subprocess.run([self.python, str(PEERS / "produce.py"), module, *map(str, args)], env=self.env, cwd=PEERS,
                             check=True, capture_output=True, text=True)
        return float(out.stdout.split()[-1])

    @contextmanager
    def worker(self) -> Iterator[None]:
        command = self.queue.command.format(url=self.url).split()
        command[0] = shutil.which(command[0], path=self.env["PATH"])
        p = subprocess.Popen(command, env=self.env, cwd=PEERS, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             start_new_session=True)
        try: yield
        finally:
            try:
                os.killpg(p.pid, signal.SIGTERM)
                p.wait(8)
            except (OSError, subprocess.TimeoutExpired):
                os.killpg(p.pid, signal.SIGKILL)
                p.wait()

    def done(self) -> int: return int(self.client.get("bench:done") or 0)

    def delays(self) -> list[float]:
        "Milliseconds from enqueue to start, one job at a time, of a worker and a client that are both warm."
        self.client.flushall()
        with self.worker():
            self.produce("paced", WARM + PACED, GAP_S)  # in one go: connecting is not what is measured
            wait(lambda: self.done() >= WARM + PACED, 60)
        return [int(o) / 1e6 for o in self.client.lrange("bench:delays", WARM, -1)]

    def rates(self) -> tuple[float, float]:
        "Jobs in a second: enqueued with no worker there, then drained by one that was just started."
        self.client.flushall()
        enqueue = JOBS / self.produce("many", JOBS)
        with self.worker():
            wait(lambda: self.done() >= JOBS * 0.05, 60)
            first, began = self.done(), time.perf_counter()
            wait(lambda: self.done() >= JOBS, 180)
            return enqueue, (JOBS - first) / (time.perf_counter() - began)

    def measure(self) -> None:
        delays, (enqueue, drain) = self.delays(), self.rates()
        for k, v in dict(p50=percentile(delays, .5), p99=percentile(delays, .99), drain=drain, enqueue=enqueue).items():
            self.queue.results.setdefault(k, []).append(v)


def chosen() -> list[Queue]:
    if "--only" in sys.argv: return [q for q in ALL if q is OURS or q.name in sys.argv]
    return [q for q in ALL if q.default or "--all" in sys.argv]


def rows() -> list[Row]:
    queues, on = chosen(), {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name, exe in SERVERS.items():
            on[name] = stack.enter_context(redis_server(exe))
            info = on[name][1].info("server")
            print(f"{name}: {info.get('valkey_version', info['redis_version'])}")
        env = Path(folder) / "venv"
        packages = [q.package for q in queues if q.package]
        if packages and not install(env, packages): queues = [OURS]
        runs = [(q, "valkey") for q in queues]
        if "redis" in on: runs.insert(1, (replace(OURS, name="ours, on Redis", results={}), "redis"))
        for k in range(ROUNDS):
            for q, server in runs:
                url, client = on[server]
                Run(q, env / "bin" if q.package else Path(sys.executable).parent, url, client).measure()
                print(f"round {k + 1}: {q.name} {', '.join(f'{m} {v[-1]:.4g}' for m, v in q.results.items())}", flush=True)
    return [row for measure in MEASURES for row in table_rows([q for q, _ in runs], *measure)]


def table_rows(queues: list[Queue], key: str, what: str, unit: str, more: bool) -> list[Row]:
    "One measure of all; ours has the best peer's median to reach."
    made = {q.name: Row(f"bridge: {what}, {q.name}", q.results[key], unit, more=more) for q in queues}
    ours, peers = made["ours"], [q.name for q in queues if q.package]
    if peers:
        best = (max if more else min)(peers, key=lambda name: made[name].median)
        ours.reach, ours.note = made[best].median, f"the best peer is {best}"
    return list(made.values())


if __name__ == "__main__": main(rows)
