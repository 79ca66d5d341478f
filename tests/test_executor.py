"One attempt of one step: files in, files out, events on the way, nothing left over."
import json
import os
import socket
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest

from myspinbot.store.artifacts import LocalStore
from myspinbot.graph.catalogue import Catalogue
from myspinbot.core import Cancelled, GateFailed, InputError, KernelDied, NotFound, ServiceUnavailable, StepFailed
from myspinbot.executor.attempt import Executor, RunContext, StepResult
from myspinbot.executor.pool import KernelPool
from myspinbot.schema import Artifact, Event

NOTEBOOKS = Path(__file__).parent / "notebooks"


@pytest.fixture(scope="module")
def pool() -> Iterator[KernelPool]:
    with KernelPool(spare=0) as p: yield p


@pytest.fixture
def executor(pool: KernelPool, tmp_path: Path) -> Executor:
    "An executor over the fixture notebooks and an empty store."
    steps = tmp_path / "pipelines/steps"
    steps.mkdir(parents=True)
    for o in NOTEBOOKS.glob("*.ipynb"): shutil.copy(o, steps)
    store, catalogue = LocalStore(tmp_path / "store"), Catalogue(tmp_path / "pipelines")
    return Executor(store, catalogue, pool, tmp_path / "scratch", grace_s=0.3)


@pytest.fixture
def run(executor: Executor) -> Iterator[Callable[..., StepResult]]:
    "Run a step; after it the scratch folder must be empty."
    def go(step: str, inputs: dict | None = None, **kw) -> StepResult:
        kw.setdefault("context", RunContext("job_1", "node", 1, "worker:0"))
        return executor.run(executor.catalogue.step(step), inputs or {}, **kw)
    yield go
    assert list(executor.scratch.iterdir()) == []


def read(executor: Executor, a: Artifact) -> bytes:
    with executor.store.open(a) as f: return f.read()


def test_a_step_from_inputs_to_outputs(executor: Executor, run):
    source = executor.store.put_bytes(b"[40, 2]", "application/json", "numbers")
    r = run("toy.toy", dict(text="green", shade=7, source=source))
    assert r.error is None and r.status == "succeeded"
    assert set(r.outputs) == {"image", "total", "facts"} and r.outputs["total"] == 42
    assert r.outputs["image"].media_type == "image/png" and r.outputs["image"].name == "toy.png"
    assert json.loads(read(executor, r.outputs["facts"])) == {"text": "green", "suffix": ".json", "absolute": True}
    nb = nbformat.reads(read(executor, r.notebook).decode(), 4)
    assert nb.metadata.papermill.parameters["text"] == "green" and r.notebook.media_type == "application/x-ipynb+json"


def test_inputs_as_the_journal_holds_them_are_the_same(executor: Executor, run):
    source = executor.store.put_bytes(b"[1]", "application/json", "n.json")
    assert run("toy.toy", dict(source=source.to_json())).outputs["total"] == 1


def test_the_record_says_how_it_was_made(executor: Executor, run):
    record = run("toy.toy").record
    assert {"python", "myspinbot", "papermill", "numpy"} <= set(record["versions"])
    assert set(record["seconds"]) == {"fetch", "run", "store"}
    assert {"id", "kind", "runs", "pid", "shares"} == set(record["kernel"]) and record["kernel"]["kind"] == "pristine"
    assert record["source_hash"] == executor.catalogue.step("toy.toy").source_hash != ""
    assert [c["status"] for c in record["cells"]] == ["completed"] * len(record["cells"])
    json.dumps(record)


def test_events_arrive_in_order_and_a_logged_line_once(run):
    events: list[Event] = []
    r = run("toy.toy", dict(text="red"), on_event=events.append)
    assert r.error is None
    assert {(e.job, e.key) for e in events} == {("job_1", "node")}
    assert [e.body["text"] for e in events if e.kind == "log"] == ["painted red", "printed"]
    progress = [e.body["fraction"] for e in events if e.kind == "progress"]
    assert progress == sorted(progress) and progress[-1] == 1.0
    assert any(e.kind == "preview" for e in events)


def test_events_arrive_while_the_step_runs(run):
    seen: list[Event] = []
    r = run("toy.sleeps_forever", on_event=seen.append, should_stop=lambda: "seen" if seen else None)
    assert r.status == "cancelled" and seen[0].body["text"] == "before"


def test_flood_of_log_lines_is_thinned_out_and_the_notebook_has_them_all(executor: Executor, run):
    events: list[Event] = []
    r = run("toy.chatters", dict(lines=3000), on_event=events.append)
    texts = [e.body["text"] for e in events]
    assert 200 <= len(texts) < 1000 and texts[:3] == ["line 0", "line 1", "line 2"]
    left_out = sum(int(t[1:].split()[0]) for t in texts if "left out" in t)
    assert left_out + sum(t.startswith("line") for t in texts) == 3000
    assert b"line 2999" in read(executor, r.notebook)


@pytest.mark.parametrize("step, inputs, kind, said", [
    ("toy.raises", {}, StepFailed, "ZeroDivisionError"),
    ("toy.kills_itself", {}, KernelDied, "SIGKILL"),
    ("toy.sys_exit", dict(code=1), StepFailed, "SystemExit: 1"),
    ("toy.forgets", {}, StepFailed, "did not publish image"),
    ("toy.mislabels", {}, StepFailed, "declared image/png, but 'a.mp4' is"),
    ("toy.raises_gate", {}, GateFailed, "Score 0.31 is below 0.5"),
])
def test_failure_keeps_its_reason_and_the_executed_notebook(run, step: str, inputs: dict, kind: type, said: str):
    r = run(step, inputs)
    assert (r.status, type(r.error), r.outputs) == ("failed", kind, {})
    assert said in str(r.error)
    assert r.notebook is not None


def test_unknown_input_and_lost_artifact_fail_before_anything_runs(run):
    r = run("toy.toy", dict(shde=1))
    assert type(r.error) is InputError and "Did you mean shade?" in str(r.error) and r.notebook is None
    r = run("toy.toy", dict(source="/etc/hostname"))  # what is there on a worker's disk is no input of a job
    assert type(r.error) is InputError and "source takes Data, but got the path '/etc/hostname'" in str(r.error)
    gone = Artifact(sha256="0" * 64, size=1, media_type="application/json", name="gone.json")
    assert type(run("toy.toy", dict(source=gone)).error) is NotFound


def test_cancelled_step_is_cancelled_with_the_reason(run):
    told: list[Event] = []  # the cell has begun
    r = run("toy.c_loop_ignores_sigint", on_event=told.append, should_stop=lambda: "cancelled" if told else None)
    assert (r.status, type(r.error), r.error.fields["reason"]) == ("cancelled", Cancelled, "cancelled")
    assert r.notebook is not None


def test_full_disk_is_an_error_that_may_pass(executor: Executor):
    executor.scratch = Path("/proc/no/room")
    r = executor.run(executor.catalogue.step("toy.toy"), {}, context=RunContext("job_1", "node"))
    assert r.status == "failed" and type(r.error) is ServiceUnavailable and r.error.retryable


def test_two_steps_at_once_do_not_meet(executor: Executor, run):
    results: dict[int, StepResult] = {}
    def one(i: int) -> None: results[i] = run("toy.toy", dict(text=f"text {i}", shade=i))
    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    for i, r in results.items(): assert json.loads(read(executor, r.outputs["facts"]))["text"] == f"text {i}"
    assert len({r.outputs["image"].sha256 for r in results.values()}) == 4


def test_leftovers_of_a_killed_worker_are_cleared_and_those_of_a_living_one_are_not(executor: Executor, tmp_path: Path):
    here = socket.gethostname()
    for who in (f"4000000@{here}", f"1@{here}", "4000000@elsewhere"): (tmp_path / f"scratch/node-0-{who}").mkdir(parents=True)
    executor.sweep()
    assert {o.name for o in (tmp_path / "scratch").iterdir()} == {f"node-0-1@{here}", "node-0-4000000@elsewhere"}
    assert os.path.isdir(tmp_path / "store") is False, "looking around stores nothing"


def test_step_that_leaves_early_keeps_what_it_published(executor: Executor, run):
    r = run("toy.leaves")
    assert r.status == "succeeded" and r.outputs == {"word": "published"} and r.record["cells"][-1]["status"] == "left"
    assert b"sys.exit" in read(executor, r.notebook)
    r = run("toy.leaves", dict(publish=False))
    assert r.status == "failed" and "did not publish word" in r.error.message and "left early" in r.error.hint
    r = run("toy.leaves", dict(code=3))
    assert r.status == "failed" and r.error.message == "SystemExit: 3" and not r.outputs


def test_step_that_says_what_no_text_can_hold_is_heard(executor: Executor, run):
    seen: list[Event] = []
    r = run("toy.mumbles", on_event=seen.append)
    assert r.status == "succeeded", r.error
    assert r.outputs["word"] == "a 😀 \ufffd \ufffd b" and r.outputs["table"] == {"k\ufffd": ["\ufffd"]}
    assert r.outputs["file"].name == "file.json" and json.loads(read(executor, r.outputs["data"])) == {"\ufffd": 1}
    logs = [e.body["text"] for e in seen if e.kind == "log"]
    assert "logs \ufffd and \0" in logs and "prints \ufffd and \0" in logs and "escaped \ufffd" in logs and "5" in logs
    assert logs.count("logs \ufffd and \0") == 1 and "notes \ufffd" in [e.body.get("note") for e in seen]
    for e in seen: e.model_dump_json()
    assert "characters that cannot be stored became U+FFFD" in read(executor, r.notebook).decode("utf-8")
    r = run("toy.mumbles", dict(fail=True))
    assert type(r.error) is GateFailed and r.error.message == "bad \ufffd \0" and r.error.fields["score"] == "\ufffd \0"
