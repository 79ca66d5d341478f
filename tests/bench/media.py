"""Talking video in seconds and megabytes: the whole pipeline, warm, and the memory of its longest step.

The pipeline runs through `LocalRunner`, which is what `pipeline.run()` uses: two notebooks at once, one warm kernel for each
step family. Every run has a text and a portrait that no run before had, so nothing comes from the step cache.
"""
import ast
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from table import Row, main

from myspinbot.graph.catalogue import catalogue
from myspinbot.executor.attempt import Executor, RunContext
from myspinbot.executor.pool import KernelPool
from myspinbot.jobs.local import LocalRunner
from myspinbot.media.speech import speak

RUNS = 3
TEXT = ("Good morning, everybody. Today we look at how a picture learns to speak, and why the lips must follow every sound. "
        "Please stay with us for a moment, and number {} will show you more.")   # about ten seconds
STEPS = ("prepare", "speech", "talk", "check")


def portrait(folder: Path, n: int) -> str:
    "A picture like the others, and with another face to find."
    from PIL import Image
    from skimage.data import astronaut
    path = folder / f"portrait{n}.png"
    Image.fromarray(np.roll(astronaut(), 2 * n, axis=1)).save(path)
    return str(path)


def calls(step: str) -> list[str]:
    "The longest call in each cell of a step notebook, for people who read its times."
    nb, found = json.loads(Path(catalogue().notebook(step)).read_text(encoding="utf-8")), []
    for c in nb["cells"]:
        walk = ast.walk(ast.parse("".join(c["source"]))) if c["cell_type"] == "code" else ()
        made = [o for o in walk if isinstance(o, ast.Call) and isinstance(o.func, ast.Name)]
        found.append(max(made, key=lambda o: len(ast.unparse(o))).func.id if made else "step")
    return found


def cpu_seconds(pids: set[int]) -> float:
    return sum(sum(psutil.Process(p).cpu_times()[:2]) for p in pids | {os.getpid()})


def pipeline_rows(home: Path) -> list[Row]:
    "Wall time of the pipeline, its CPU time, and the time of each step with its slowest cells."
    runner, graph = LocalRunner(catalogue(), home, 2), catalogue().pipeline("talking_portrait").to_graph()
    walls, cpu, length, steps, cells = [], [], [], {k: [] for k in STEPS}, {}
    try:
        warm = runner.run(graph, dict(portrait=portrait(home, 0), text=TEXT.format("zero")))
        assert warm.job.status == "succeeded", warm.job.error
        pids = {r.record["kernel"]["pid"] for r in warm.rows.values() if r.record}
        for n in range(1, RUNS + 1):
            given = dict(portrait=portrait(home, n), text=TEXT.format(n))
            before, began = cpu_seconds(pids), time.monotonic()
            done = runner.run(graph, given)
            wall = time.monotonic() - began
            assert done.job.status == "succeeded", done.job.error
            assert all(done.rows[k].status == "succeeded" for k in STEPS), "nothing may come from the cache"
            assert {done.rows[k].record["kernel"]["pid"] for k in STEPS} <= pids, "a kernel was not warm"
            report = json.loads(runner.store.found(done.job.outputs["report"]).read_text())
            ten = 10 / report["video"]["video_s"]
            length.append(report["video"]["video_s"])
            walls.append(wall * ten)
            cpu.append((cpu_seconds(pids) - before) * ten)
            for k in STEPS:
                steps[k].append(done.rows[k].seconds)
                for c in done.rows[k].record["cells"]: cells.setdefault((k, c["index"]), []).append(c["seconds"])
    finally: runner.close()
    rows = [Row("10 s of 512x512 talking video, warm, all steps", walls, "s", 4,
                note=f"wall time for 10 s; measured on {min(length):.1f} to {max(length):.1f} s of video"),
            Row("  CPU time of it, all processes", cpu, "s")]
    for k in STEPS:
        named = calls(next(n.step for n in graph.nodes if n.id == k))
        slow = sorted(((float(np.median(v)), i) for (s, i), v in cells.items() if s == k), reverse=True)[:3]
        rows.append(Row(f"  step {k}", steps[k], "s", note=", ".join(f"{named[i - 1]} {t:.2f}" for t, i in slow)))
    return rows


def memory_rows(home: Path) -> list[Row]:
    "Peak resident memory of a kernel that talks for 10, 30 and 60 s, a new kernel for each."
    face = home / "face"
    face.mkdir()
    from PIL import Image
    from skimage.data import astronaut

    from myspinbot.media.face import prepare_portrait
    made = prepare_portrait(astronaut(), 512)
    Image.fromarray(made.image).save(face / "portrait.png")
    (face / "landmarks.json").write_text(json.dumps(made.landmarks.to_json()))
    runner = LocalRunner(catalogue(), home, 1)
    spec, rows = catalogue().step("portrait.talk"), []
    for seconds in (10, 30, 60):
        phonemes = speak(TEXT.format(seconds) + (" " + TEXT.format(seconds)) * (seconds // 10 - 1), face / "s.wav")
        (face / "phonemes.json").write_text(json.dumps(phonemes))
        names = dict(portrait="portrait.png", landmarks="landmarks.json", audio="s.wav", phonemes="phonemes.json")
        given = {k: runner.store.put_file(face / v) for k, v in names.items()}
        with KernelPool(spare=0) as pool:
            done = Executor(runner.store, catalogue(), pool, home / "scratch").run(
                spec, given, context=RunContext(job="bench", key="talk"))
            assert done.status == "succeeded", done.error
            peak = peak_mb(done.record["kernel"]["pid"])
        rows.append(Row(f"peak memory of portrait.talk, {seconds} s of video", [peak], "MB", 1024 if seconds == 60 else None,
                        note=f"{phonemes['duration_s']:.1f} s, a new kernel"))
    runner.close()
    growth = rows[-1].median - rows[0].median
    return rows + [Row("  from 10 s to 60 s of video", [growth], "MB", 50, note="flat in the length")]


def peak_mb(pid: int) -> float:
    "The most that a process ever had in memory."
    line = next(o for o in Path(f"/proc/{pid}/status").read_text().splitlines() if o.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPIN_HOME"] = folder
        return pipeline_rows(Path(folder)) + memory_rows(Path(folder))


if __name__ == "__main__": main(rows)
