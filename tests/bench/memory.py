"""What things weigh: imports in fresh processes, a worker that waits for work, and one kernel over 500 runs.

The kernel runs a small notebook, every tenth time one that changes whatever a notebook can change, and every fiftieth one that
shows its state; those outputs must be, byte for byte, what a never-used kernel gives. Sizes are resident (RSS), taken
after the reset that follows a run.
"""
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from engine import NOTEBOOK, installation
from myspinbot.engine import RunRecord, run_notebook
from myspinbot.pool import KernelPool
from table import Row, main

HEAVY = ("torch", "dlib", "av", "numpy", "cv2", "psycopg", "redis", "minio", "langgraph", "papermill", "matplotlib")
RUNS = 500


def sizes(pid: int) -> dict[str, float]:
    "Rss and Pss of a process in MB."
    lines = [o.split() for o in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]]
    return {o[0].rstrip(":"): int(o[1]) / 1024 for o in lines if o[0] in ("Rss:", "Pss:")}


def importing(module: str, reach: float) -> Row:
    "Seconds of an import in a new process, and what of the heavy it brings."
    code = (f"import sys, time; t = time.perf_counter(); import {module}; "
            f"print(time.perf_counter() - t, *set({HEAVY!r}) & set(sys.modules))")
    said = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
            for _ in range(7)]
    return Row(f"import {module}", [float(o[0]) for o in said], "s", reach,
               note=f"loads {', '.join(said[-1][1:]) or 'nothing heavy'}")


def idle_worker() -> list[Row]:
    "A worker that is connected and waits, and the same after its first step, with its launcher."
    from engine import Sender
    from psutil import Process
    with installation() as (client, env, home), open(home / "worker.log", "wb") as log:
        p = subprocess.Popen([sys.executable, "-m", "myspinbot.cli", "worker"], env=env, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 60
            while b"ready" not in (home / "worker.log").read_bytes() and time.monotonic() < end: time.sleep(0.1)
            before = []
            for _ in range(5):
                time.sleep(0.5)
                before.append(sizes(p.pid))
            sender = Sender(client)
            sender.run(3)
            sender.stop.set()
            after, kids = sizes(p.pid), [sizes(o.pid)["Pss"] for o in Process(p.pid).children(recursive=True)]
        finally:
            p.terminate()
            p.wait(30)
    return [Row("idle worker without kernels, RSS", [o["Rss"] for o in before], "MB", 100,
                note=f"PSS {before[-1]['Pss']:.0f} MB"),
            Row("worker after three steps, RSS", [after["Rss"]], "MB",
                note=f"PSS {after['Pss']:.0f} MB; launcher and kernels, PSS each: {', '.join(f'{o:.0f}' for o in kids)} MB")]


def outputs(r: RunRecord) -> str:
    "All outputs of an executed notebook, as text to compare."
    if r.error: raise r.error
    return json.dumps([c["outputs"] for c in json.loads(r.document)["cells"] if c["cell_type"] == "code"])


def long_lived_kernel() -> list[Row]:
    "One kernel, many runs."
    situations = NOTEBOOK.parent
    with KernelPool(max_runs=10 * RUNS, spare=0) as pool, tempfile.TemporaryDirectory() as folder:
        def run(name: str, kernel: str = "warm") -> RunRecord:
            return run_notebook(situations / f"{name}.ipynb", None, pool=pool, kernel=kernel, family="long", cwd=folder)
        fresh, kernels, curve, same = outputs(run("shows_its_state", "fresh")), set(), [], []
        for i in range(RUNS + 1):
            r = run("shows_its_state" if i % 50 == 0 else "changes_everything" if i % 10 == 5 else "ok_three_cells")
            if i % 50 == 0: same.append(outputs(r) == fresh)
            kernels.add(r.kernel["id"])
            if i and i % 50 == 0:
                k = pool.acquire("long")  # comes when the reset is done
                curve.append(sizes(k.pid)["Rss"])
                pool.release(k)
    xs = [50 * (i + 1) for i in range(len(curve))]
    slope = statistics.linear_regression(xs[1:], curve[1:]).slope * 100
    shown = " ".join(f"{o:.1f}" for o in curve)
    return [Row(f"kernel over {RUNS} warm runs, growth per 100 runs after the first 100", [slope], "MB", 0.5,
                note=f"RSS each 50 runs: {shown}; {len(kernels)} kernel(s)"),
            Row("its state as shown beside a fresh kernel's: byte-equal outputs", [100 * statistics.mean(same)], "%", 100,
                more=True, note=f"{len(same)} looks")]


def rows() -> list[Row]:
    "Measure."
    return [importing("myspinbot", 0.3), importing("myspinbot.ui", 1.0), *idle_worker(), *long_lived_kernel()]


if __name__ == "__main__": main(rows)
