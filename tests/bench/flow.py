"""From submit to done, through real processes: delay of a first step, a no-op pipeline beside other tools, control steps, memory.

`python tests/bench/flow.py [delay pipeline control memory]`. Control and worker processes run with the product's default
settings on the embedded servers (AOF on). Metaflow and Dagster are installed into a temporary environment of their own.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from noops import chain, installation, memory_mb, write_pipelines
from table import Row, main, percentile

PACED, PACES_S, RUNS = 300, (0.05, 0.1), 3  # submits, and from one to the next
PIPELINES = 30
JOBS, LENGTH = 100, 40
QUEUED = 10_000


def delay() -> list[Row]:
    "Submit to claim, and to the first cell of the first step, at two paces: the first is more than a slow machine keeps up with."
    return [row for gap_s in PACES_S for row in paced(gap_s)]


def paced(gap_s: float) -> list[Row]:
    "The same at one pace."
    claims, starts, middle = [], [], []
    with installation(witness=True) as f:
        f.start("control")
        f.start("w1")
        graph = chain("noop.notebook", 1)
        for _ in range(20): f.done(f.client.submit(graph, dict(job="warm-up")).id)
        for run in range(RUNS):
            began, ids, due = {}, {}, time.monotonic()
            for i in range(PACED):
                due += gap_s
                time.sleep(max(0.0, due - time.monotonic()))
                began[name := f"run{run}-{i}"] = time.time()
                ids[name] = f.client.submit(graph, dict(job=name)).id
            rows = {name: (f.done(id), f.client.steps(id)[0])[1] for name, id in ids.items()}
            cells = {o[0]: float(o[3]) for o in f.runs()}
            claim = [1000 * (rows[n].started_at.timestamp() - t) for n, t in began.items()]
            start = [1000 * (cells[n] - t) for n, t in began.items()]
            claims.append(percentile(claim, 0.99))
            starts.append(percentile(start, 0.99))
            middle.append(percentile(start, 0.5))
    said = f"{PACED} submits {1000 * gap_s:.0f} ms apart in each run, one worker, pristine kernels, AOF on"
    return [Row("submit to first cell of the first step, p99", starts, reach=30, note=said),
            Row("  submit to claim by the worker, p99", claims), Row("  submit to first cell, p50", middle)]


METAFLOW = '''
from metaflow import FlowSpec, step
class Noop(FlowSpec):
    @step
    def start(self):
        self.value = 1
        self.next(self.middle)
    @step
    def middle(self):
        self.value += 1
        self.next(self.end)
    @step
    def end(self): self.value += 1
if __name__ == "__main__": Noop()
'''
DAGSTER = '''
import json, sys, time
from dagster import DagsterInstance, job, op
@op
def a() -> int: return 1
@op
def b(v: int) -> int: return v + 1
@op
def c(v: int) -> int: return v + 1
@job
def noop(): c(b(a()))
took = []
with DagsterInstance.local_temp() as instance:
    for _ in range(int(sys.argv[1]) + 2):
        began = time.perf_counter()
        assert noop.execute_in_process(instance=instance).success
        took.append(1000 * (time.perf_counter() - began))
print(json.dumps(took[2:]))
'''


def environment(folder: Path) -> tuple[Path | None, str]:
    "A virtual environment with Metaflow and Dagster, or why there is none."
    python = folder / "env" / "bin" / "python"
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    make = [uv, "venv", "-q", "--python", sys.executable] if uv else [sys.executable, "-m", "venv"]
    add = [uv, "pip", "install", "-q", "--python", str(python)] if uv else [str(python), "-m", "pip", "install", "-q"]
    for command in ([*make, str(folder / "env")], [*add, "metaflow", "dagster"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode: return None, f"not installable here: {done.stderr.strip().splitlines()[-1:]}"
    return python, ""


def alone() -> dict[str, str]:
    "This environment without this project's modules."
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def metaflow(python: Path, folder: Path, n: int) -> list[float]:
    "Its own `run`: a process for the flow and one for each step."
    (folder / "noop_flow.py").write_text(METAFLOW)
    env, took = alone() | dict(HOME=str(folder), USERNAME="bench", METAFLOW_DEFAULT_DATASTORE="local"), []
    for _ in range(n):
        began = time.perf_counter()
        done = subprocess.run([str(python), "noop_flow.py", "--quiet", "run"], cwd=folder, env=env, capture_output=True, text=True)
        took.append(1000 * (time.perf_counter() - began))
        assert done.returncode == 0, done.stderr[-1000:]
    return took


def dagster(python: Path, folder: Path, n: int) -> list[float]:
    "Ops in one process, with its SQLite run storage."
    (folder / "noop_job.py").write_text(DAGSTER)
    done = subprocess.run([str(python), "noop_job.py", str(n)], cwd=folder, env=alone() | dict(DAGSTER_HOME=str(folder)),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    return json.loads(done.stdout.splitlines()[-1])


def papermill(folder: Path, n: int) -> list[float]:
    "Three notebooks in sequence by papermill's own engine, in one process."
    import papermill
    source, took = write_pipelines(folder / "papermill") / "steps" / "noop_notebook.ipynb", []
    for _ in range(n):
        began = time.perf_counter()
        for i in range(3):
            papermill.execute_notebook(source, folder / f"out{i}.ipynb", dict(value=i), progress_bar=False, cwd=folder)
        took.append(1000 * (time.perf_counter() - began))
    return took


def pipeline() -> list[Row]:
    "Three no-op steps, submit to done, one at a time; other tools beside it."
    with tempfile.TemporaryDirectory(prefix="spin-bench") as name, installation() as f:
        folder = Path(name)
        f.start("control")
        f.start("w1")
        graph, took = chain("noop.notebook", 3), []
        for i in range(PIPELINES + 5):
            began = time.perf_counter()
            job = f.client.wait(f.client.submit(graph, dict(value=10 * i)).id, 60)
            took.append(1000 * (time.perf_counter() - began))
            assert job.outputs == dict(value=10 * i + 3), job.error
        rows = [Row("three-step no-op pipeline, submit to done, p50", took[5:], reach=150, note="notebooks, pristine kernels")]
        rows.append(Row("  papermill, three notebooks in sequence", papermill(folder, 3), note="no queue, no journal"))
        python, why = environment(folder)
        if python is None: return [*rows, Row("  Metaflow, Dagster", [0.0], note=why)]
        took = dagster(python, folder, PIPELINES)
        rows.append(Row("  Dagster, three ops in one process", took, note="no queue, no notebook; its journal is SQLite"))
        took = metaflow(python, folder, 3)
        return [*rows, Row("  Metaflow, three steps, local", took, note="no queue, no notebook; a process for each step")]


def control() -> list[Row]:
    "Durable no-op control steps: rows, attempts, notebooks and job ends are in the journal when a step counts."
    graph, rates = chain("noop.control", LENGTH), []
    with installation() as f:
        f.start("control")
        for run in range(RUNS):
            ids = [f.client.submit(graph, dict(value=1_000_000 * run + 1000 * i)).id for i in range(JOBS)]
            for id in ids: assert f.done(id).status == "succeeded"
            rates.append(rate(f, ids, LENGTH))
    said = f"{JOBS} jobs of {LENGTH}, each step looked up, written as running, run, its notebook stored, written as succeeded"
    return [Row("durable no-op control steps", rates, "/s", reach=500, more=True, note=said)]


def rate(f, ids: list[str], length: int) -> float:
    "Steps a second, from the first step's start to the last job's end."
    spans = f.client.journal.row("""SELECT extract(epoch FROM max(job.ended_at) - min(step.started_at))::float8 AS s,
        count(*) AS n, count(notebook) AS notebooks FROM step JOIN job ON job.id = step.job
        WHERE job = ANY(%(ids)s) AND step.status = 'succeeded' AND attempt = 1""", ids=ids)
    assert spans["n"] == spans["notebooks"] == length * len(ids), spans
    return spans["n"] / spans["s"]


def memory() -> list[Row]:
    "The control process with 10 000 jobs queued: as many as it takes at once wait for a worker that is not there."
    with installation() as f:
        first = f.client.submit(chain("noop.notebook", 1), dict(job="x")).id
        f.client.journal.connections.run(lambda c: c.execute("""INSERT INTO job (id, pipeline, graph, params, request)
            SELECT 'job_bench' || i, pipeline, graph, params, request FROM job, generate_series(1, %s) i WHERE id = %s""",
            [QUEUED - 1, first]))
        p, seen, end = f.start("control"), [], time.monotonic() + 30
        while time.monotonic() < end:
            time.sleep(1)
            seen.append(memory_mb(p.pid))
        counts = f.client.journal.stats()
    assert sum(counts["jobs"].values()) == QUEUED and counts["jobs"]["queued"] >= QUEUED - 100, counts
    return [Row("control process with 10 000 jobs queued, resident", [max(seen)], "MB", reach=200,
                note=f"the most in 30 s, API included; {counts['jobs'].get('running', 0)} of them taken and waiting")]


PARTS = dict(delay=delay, pipeline=pipeline, control=control, memory=memory)


def rows() -> list[Row]:
    names = [o for o in sys.argv[1:] if o in PARTS] or list(PARTS)
    return [row for name in names for row in PARTS[name]()]


if __name__ == "__main__": main(rows)
