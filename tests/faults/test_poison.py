"""Notebooks that ruin what they touch: each ends as its job's failure, with a reason, and harms nothing beside it."""
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from farm import wait_for
from world import World

from myspinbot.graph.builder import Graph, Pipeline
from myspinbot.executor.step import EVENTS_BYTES

LIMITS = dict(SPIN_KERNEL_MEMORY_MB="1024", SPIN_KERNEL_PROCESSES="60")
NOTEBOOK_BYTES, LIVE_BYTES = 25 << 20, 4 << 20

FAILS = {  # step: attempts, what a person reads
    "abort": (2, "SIGABRT"), "segfault": (2, "SIGSEGV"), "python_loop": (1, "longer than 2 s"), "c_loop": (1, "longer than 2 s"),
    "fork_bomb": (1, "the limit is 60. Start fewer, or raise SPIN_KERNEL_PROCESSES."),
    "allocates": (1, "the limit is 1024 MB. Use smaller settings, or raise SPIN_KERNEL_MEMORY_MB."),
    "children_allocate": (1, "raise SPIN_KERNEL_MEMORY_MB."), "sys_exit": (1, "SystemExit: 3"),
    "kills_its_parent": (2, "SIGKILL"), "asks": (1, "StdinNotImplementedError"),
    "deletes_its_folder": (1, "FileNotFoundError"),
}
TOOK_ITS_KERNEL = {"abort", "segfault", "fork_bomb", "allocates", "children_allocate", "kills_its_parent"}
ENDS_WELL = ["prints_200_mb", "prints_a_million_lines", "displays_much", "logs_much", "child_prints"]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    "One conductor and one worker with two slots for all of them."
    w = World(lease_s=20, **LIMITS)
    try:
        w.start("control", "w1")
        yield w
    finally: w.close()


def poison(w: World, name: str) -> Graph:
    p = Pipeline("poison", catalogue=w.client.catalogue)
    p.output(value=p.step(f"poison.{name}", id="it", name=f"j{next(w.names)}").value)
    return p.to_graph()


def letters(w: World, job: str) -> list[dict[str, Any]]:
    return [o for o in w.client.bridge.dead_letters(1000) if job.encode() in o["raw"].get(b"m", b"")]


def below(p: psutil.Process) -> set[int]: return {o.pid for o in p.children(recursive=True)}


def kernels(w: World) -> list[psutil.Process]:
    return [o for o in psutil.Process(w.procs["w1"].pid).children(recursive=True) if o.is_running()]


def live_bytes(w: World, job: str) -> int:
    return sum(len(e.model_dump_json()) for _, e in w.client.events.read(job, "0", count=100_000))


def run_beside_another(w: World, name: str, tmp_path: Path) -> Any:
    "Run it while another job is at work in the other slot; that one must not notice. Gives the ended job."
    worker, gate = w.procs["w1"].pid, tmp_path / "gate"
    other = w.submit(w.chain(1, gate=str(gate)))
    line = w.at_work(other, "s0")
    job = w.farm.done(w.submit(poison(w, name)), 200)
    assert w.row(other, "s0").status == "running" and psutil.pid_exists(line["pid"])
    gate.touch()
    assert w.farm.done(other).status == "succeeded" and w.row(other, "s0").attempt == 1
    assert w.procs["w1"].poll() is None and w.procs["w1"].pid == worker
    after = w.farm.done(w.submit(w.chain(1)))
    assert after.status == "succeeded"
    return job


def check_record(w: World, job: str) -> nbformat.NotebookNode:
    "The executed notebook and the live events are there, and small."
    path = w.client.file(w.row(job, "it").notebook)
    assert path.stat().st_size < NOTEBOOK_BYTES
    assert live_bytes(w, job) < LIVE_BYTES
    nb = nbformat.read(path, 4)
    printed = "".join(o.text for c in nb.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "stream")
    assert printed.startswith("before\n")
    return nb


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", FAILS)
def test_poison_fails_with_its_reason_and_harms_nothing(world: World, tmp_path: Path, name: str):
    attempts, reason = FAILS[name]
    before = below(psutil.Process(world.procs["w1"].pid))
    job = run_beside_another(world, name, tmp_path)
    row = world.row(job.id, "it")
    assert (job.status, row.status, row.attempt) == ("failed", "failed", attempts)
    said = f"{row.error['message']} {row.error['hint']}"
    assert reason in said and reason.split(".")[0] in str(job.error)
    found = letters(world, job.id)
    assert len(found) == (name in TOOK_ITS_KERNEL), found
    if found: assert reason in found[0]["reason"] and "poison." + name in found[0]["reason"]
    nb = check_record(world, job.id)
    assert nb.metadata.papermill.exception is True and "An Exception was encountered" in nb.cells[0].source
    shown = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
    assert shown and nb.metadata.spin.error["message"]
    worker = psutil.Process(world.procs["w1"].pid)
    wait_for("its processes have ended", lambda: len(below(worker) - before) < 12, 30)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ENDS_WELL)
def test_flood_of_output_is_capped_everywhere_and_the_step_ends_well(world: World, tmp_path: Path, name: str):
    scratch = world.farm.home / "scratch"
    job = run_beside_another(world, name, tmp_path)
    assert job.status == "succeeded", job.error
    check_record(world, job.id)
    worker = psutil.Process(world.procs["w1"].pid)
    assert worker.memory_info().rss < 600 << 20
    if name == "logs_much": assert EVENTS_BYTES <= job.outputs["value"] < EVENTS_BYTES + 10_000
    logs = [o for o in world.tmp.glob("spink*/*.log") if o.stat().st_size > 16 << 20]
    assert not logs and not letters(world, job.id)
    wait_for("scratch is empty", lambda: not any(scratch.rglob("events.jsonl")), 20)


@pytest.mark.timeout(400)
def test_step_that_takes_three_workers_with_it_is_poison_and_leaves_a_dead_letter():
    w = World(lease_s=1.5, **LIMITS)
    try:
        w.start("control")
        job, ended = w.submit(poison(w, "kills_its_worker")), time.monotonic() + 200
        lives = 0
        while w.client.job(job).status not in ("succeeded", "failed", "cancelled"):
            assert time.monotonic() < ended
            if "w1" in w.procs and w.procs["w1"].poll() is not None: w.procs.pop("w1")
            if "w1" not in w.procs:
                w.start("w1")
                lives += 1
            time.sleep(0.1)
        row = w.row(job, "it")
        assert (row.status, row.lost, row.attempt) == ("failed", 3, 3) and lives >= 3
        assert "took 3 workers with it" in row.error["message"]
        [letter] = letters(w, job)
        assert "took 3 workers with it" in letter["reason"] and "poison.kills_its_worker" in letter["reason"]
        assert os.path.basename(letter["stream"])
    finally: w.close()
