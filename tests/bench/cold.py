"""What users wait for when nothing is warm: the demo from an empty data folder, with new words on stopped services, and the first
and second new text after `up`. Each in processes of their own, as a shell starts them; no text comes from the step cache.
"""
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from table import Row, main

ROUNDS = int(os.environ.get("ROUNDS", "3"))
WORDS = "This sentence is new, and it has the number {}. Bees keep a map of every meadow; maybe they remember it."
SPIN = Path(sys.executable).with_name("myspinbot")


def cpu_seconds() -> float:
    "Of this process's children that have ended, and of theirs."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def spin(home: Path, *args: str) -> dict:
    "Run `myspinbot`; what it printed as JSON."
    done = subprocess.run([SPIN, *args, "--json"], env=os.environ | dict(SPIN_HOME=str(home)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def timed(home: Path, *args: str) -> tuple[float, float]:
    "Seconds and CPU seconds of a command that makes a video."
    began, cpu = time.monotonic(), cpu_seconds()
    job = spin(home, *args)
    assert job["status"] == "succeeded", job
    return time.monotonic() - began, cpu_seconds() - cpu


def after_up(home: Path, n: int) -> tuple[float, float]:
    "The first and the second new text on services that have just started."
    env = os.environ | dict(SPIN_HOME=str(home), SPIN_CONTROL_PORT="0", SPIN_DASHBOARDS_PORT="0")
    up = subprocess.Popen([SPIN, "up"], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert up.stdout.readline(), "it did not start"
        return tuple(timed(home, "demo", "--text", WORDS.format(f"{n} {o}"))[0] for o in ("one", "two"))
    finally:
        up.terminate()
        up.wait(60)


def rows() -> list[Row]:
    nothing, cold, cpu, first, second = [], [], [], [], []
    for n in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder) / "home"
            nothing.append(timed(home, "demo")[0])
            wall, used = timed(home, "demo", "--text", WORDS.format(n))
            cold.append(wall)
            cpu.append(used)
            a, b = after_up(home, n)
            first.append(a)
            second.append(b)
    return [Row("`demo`, empty data folder", nothing, "s", note="without the install"),
            Row("`demo` with new words, services stopped", cold, "s", 9, note="starts the services and stops them"),
            Row("  CPU time of it, all processes that ended", cpu, "s"),
            Row("first new text after `up`", first, "s", 6, note="as soon as `up` has printed its addresses"),
            Row("the next new text", second, "s", 4)]


if __name__ == "__main__": main(rows)
