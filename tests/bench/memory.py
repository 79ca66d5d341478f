"""What things weigh: imports in fresh processes, a worker that waits for work, and one resident kernel over 500 runs.

The kernel runs a small notebook, which every tenth time changes whatever a notebook can change, and every fiftieth time shows its
state; those outputs must be, byte for byte, what a pristine kernel gives. Sizes are resident (RSS), taken
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
from myspinbot.executor.engine import RunRecord, run_notebook
from myspinbot.executor.pool import KernelPool
from table import Row, main

HEAVY = ("torch", "ai_edge_litert", "av", "numpy", "cv2", "psycopg", "redis", "minio", "langgraph", "papermill", "matplotlib")
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


def settled_children(pid: int) -> list[int]:
    "All processes below one, when no kernel comes or goes any more."
    from psutil import Process
    def below() -> list[int]: return sorted(o.pid for o in Process(pid).children(recursive=True))
    before, end = None, time.monotonic() + 60
    while (now := below()) != before:
        if time.monotonic() > end: raise TimeoutError("kernels come and go for a minute")
        before = now
        time.sleep(0.5)
    return now


def idle_worker() -> list[Row]:
    "A worker that is connected and waits, and the same after its first step, with its launcher."
    from engine import Sender
    with installation() as (client, env, home), open(home / "worker.log", "wb") as log:
        p = subprocess.Popen([sys.executable, "-m", "myspinbot", "worker"], env=env, stdout=log, stderr=log)
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
            after, kids = sizes(p.pid), [sizes(o)["Pss"] for o in settled_children(p.pid)]
        finally:
            p.terminate()
            p.wait(30)
    return [Row("idle worker, RSS", [o["Rss"] for o in before], "MB", 100,
                note=f"PSS {before[-1]['Pss']:.0f} MB"),
            Row("worker after three steps, RSS", [after["Rss"]], "MB",
                note=f"PSS {after['Pss']:.0f} MB; launcher and kernels, PSS each: {', '.join(f'{o:.0f}' for o in kids)} MB")]


def outputs(r: RunRecord) -> str:
    "All outputs of an executed notebook, as text to compare."
    if r.error: raise r.error
    return json.dumps([c["outputs"] for c in json.loads(r.document)["cells"] if c["cell_type"] == "code"])


def one_notebook(folder: Path) -> Path:
    "The three notebooks as one, which does what its parameter says: a resident kernel serves one source only."
    def source(name: str) -> str:
        cells = json.loads((NOTEBOOK.parent / f"{name}.ipynb").read_text())["cells"]
        return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    nb = json.loads(NOTEBOOK.read_text())
    parts = {o: source(o) for o in ("shows_its_state", "changes_everything", "ok_three_cells")}
    nb["cells"][1]["source"], nb["cells"][2]["source"] = "part = 'ok_three_cells'", "pass"
    nb["cells"][3]["source"] = f"get_ipython().run_cell({parts!r}[part]).raise_error()"
    (path := folder / "one.ipynb").write_text(json.dumps(nb))
    return path


def long_lived_kernel() -> list[Row]:
    "One resident kernel, many runs."
    with KernelPool(max_runs=10 * RUNS, spare=0) as pool, tempfile.TemporaryDirectory() as folder:
        path = one_notebook(Path(folder))
        def run(part: str, kernel: str = "resident") -> RunRecord:
            return run_notebook(path, None, dict(part=part), pool=pool, kernel=kernel, cwd=folder)
        pristine, kernels, curve, same = outputs(run("shows_its_state", "pristine")), set(), [], []
        for i in range(RUNS + 1):
            r = run("shows_its_state" if i % 50 == 0 else "changes_everything" if i % 10 == 5 else "ok_three_cells")
            if i % 50 == 0: same.append(outputs(r) == pristine)
            kernels.add(r.kernel["id"])
            if i and i % 50 == 0:
                with pool._changed: pool._changed.wait_for(lambda: pool._idle, 30)  # until its reset is done
                curve.append(sizes(r.kernel["pid"])["Rss"])
    xs = [50 * (i + 1) for i in range(len(curve))]
    slope = statistics.linear_regression(xs[1:], curve[1:]).slope * 100
    shown = " ".join(f"{o:.1f}" for o in curve)
    return [Row(f"resident kernel over {RUNS} runs, growth per 100 runs after the first 100", [slope], "MB", 0.5,
                note=f"RSS each 50 runs: {shown}; {len(kernels)} kernel(s)"),
            Row("its state as shown beside a pristine kernel's: byte-equal outputs", [100 * statistics.mean(same)], "%", 100,
                more=True, note=f"{len(same)} looks")]


def rows() -> list[Row]:
    "Measure."
    return [importing("myspinbot", 0.3), importing("myspinbot.ui.widgets", 1.0), *idle_worker(), *long_lived_kernel()]


if __name__ == "__main__": main(rows)
