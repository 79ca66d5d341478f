"Notebooks in real kernels: what comes out, how they fail, how they are stopped, and that nothing is left over."
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
from nbclient.exceptions import DeadKernelError
from outputs import joined

from myspinbot.core import (
    Cancelled,
    GateFailed,
    InputError,
    KernelDied,
    NotFound,
    ServiceUnavailable,
    StepFailed,
    StepTimeout,
)
from myspinbot.executor.engine import RunRecord, run_notebook
from myspinbot.executor.outputs import _beginning
from myspinbot.executor.document import notebook_bytes, save_notebook
from myspinbot.executor.inside import _undisturbed
from myspinbot.executor.kernel import Kernel
from myspinbot.executor.pool import KernelPool

NOTEBOOKS = Path(__file__).parent / "notebooks"
IN_MEMORY = {"start_time", "end_time", "duration", "input_path", "output_path", "version"}


@pytest.fixture(scope="module")
def pool() -> Iterator[KernelPool]:
    with KernelPool(spare=1) as p: yield p


@pytest.fixture
def run(pool: KernelPool, tmp_path: Path) -> Callable[..., RunRecord]:
    "Run a fixture notebook in the shared pool, in a folder of its own."
    def go(name: str, parameters: dict | None = None, **kw) -> RunRecord:
        folder = tmp_path / "work"
        folder.mkdir(exist_ok=True)
        kw = dict(pool=pool, cwd=folder, grace_s=0.4) | kw
        return run_notebook(NOTEBOOKS / f"{name}.ipynb", tmp_path / f"{name}.out.ipynb", parameters, **kw)
    return go


def cells(r: RunRecord) -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(r.notebook, 4).cells if c.cell_type == "code"]


def printed(r: RunRecord) -> str:
    return "".join(o.text for c in cells(r) for o in c.outputs if o.output_type == "stream")


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not come about in time"
        time.sleep(0.01)


# What comes out

def test_executed_notebook_reads_like_papermills_own(run, tmp_path: Path):
    ours = nbformat.read(run("ok_three_cells", dict(n=4)).notebook, 4)
    path = str(NOTEBOOKS / "ok_three_cells.ipynb")
    theirs = papermill.execute_notebook(path, str(tmp_path / "theirs.ipynb"), dict(n=4), progress_bar=False)
    nbformat.validate(ours)
    assert [(c.cell_type, c.source) for c in ours.cells] == [(c.cell_type, c.source) for c in theirs.cells]
    for a, b in zip(ours.cells, theirs.cells, strict=True):
        assert a.metadata.tags == b.metadata.tags
        assert set(a.metadata.papermill) == set(b.metadata.papermill)
        assert {k: v for k, v in a.metadata.papermill.items() if k not in IN_MEMORY} == \
               {k: v for k, v in b.metadata.papermill.items() if k not in IN_MEMORY}
        if a.cell_type == "code": assert (joined(a.outputs), a.execution_count) == (joined(b.outputs), b.execution_count)
    assert set(theirs.metadata.papermill) <= set(ours.metadata.papermill)
    assert ours.metadata.papermill.parameters == {"n": 4}
    assert ours.metadata.language_info == theirs.metadata.language_info


def test_progress_line_keeps_its_last_state_and_an_updated_display_its_newest(run):
    first, second = cells(run("overwrites_its_line"))[-2:]
    assert [o.text for o in first.outputs] == ["step 99\n"]
    assert second.outputs[0].data["text/plain"] == "'new'"


STANDS_STILL = """
import os, signal, sys
from myspinbot.executor.engine import default_pool, run_notebook
seen = []
def output(index, message):
    seen.append(index)
    if len(seen) == 5: os.kill(os.getpid(), signal.SIGSTOP)
done = run_notebook(sys.argv[1], sys.argv[2], dict(count=5000), on_output=output)
default_pool().close()
sys.exit(not done.ok)
"""


def test_a_worker_that_stands_still_for_a_moment_misses_no_output(tmp_path: Path):
    notebook, out = NOTEBOOKS / "displays_a_lot.ipynb", tmp_path / "out.ipynb"
    worker = psutil.Popen([sys.executable, "-c", STANDS_STILL, str(notebook), str(out)])
    end = time.monotonic() + 60
    while worker.status() != psutil.STATUS_STOPPED and time.monotonic() < end: time.sleep(0.01)
    used, quiet = -1.0, 0
    while quiet < 20 and time.monotonic() < end:  # until the kernel has said everything that it has to say
        time.sleep(0.02)
        now = sum(sum(o.cpu_times()[:2]) for o in worker.children(recursive=True))
        quiet, used = quiet + 1 if now == used else 0, now
    worker.resume()
    assert worker.wait(60) == 0
    outputs = nbformat.read(out, 4).cells[-1].outputs
    assert [o.data["text/plain"] for o in outputs[:-1]] == [f"{{'i': {i}}}" for i in range(5000)]


def test_thousands_of_displays_all_arrive(run):
    outputs = cells(run("displays_a_lot", dict(count=3000)))[-1].outputs
    assert [o.data["text/plain"] for o in outputs[:-1]] == [f"{{'i': {i}}}" for i in range(3000)]


def test_endless_output_is_cut_off_with_a_note_and_the_run_goes_on(run):
    r = run("prints_a_lot", dict(mb=8), max_mb=2)
    assert r.ok
    assert 1_900_000 < r.notebook.stat().st_size < 3_000_000
    assert "more than 2 MB of output" in printed(r)


@pytest.mark.parametrize("text", ["0123456789\n", "\0", "ü\n", "🎬", '"\\"', "x", "\n"])
def test_what_is_kept_of_an_output_is_as_large_in_the_file_as_it_may_be(text):
    def size(kept: str) -> int:
        out = nbformat.v4.new_output("stream", text=kept)
        return len(notebook_bytes(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", id="one", outputs=[out])])))
    kept = _beginning(text * 300_000, 200_000)
    assert abs(size(kept) - size("") - 200_000) < 0.1 * 200_000 and (text * 300_000).startswith(kept)
    assert _beginning(text * 3, 200_000) == text * 3


@pytest.mark.parametrize("value", ["a 'quoted' \"text\"\n\\ {x} \0", "مرحبا 🎬", "'''); __import__('os').abort()",
                                   [1, [2.5, None]], {"a": {"b": True}}, 10**20])
def test_parameters_arrive_as_they_were(run, value):
    r = run("prints_its_parameter", dict(n=value))
    assert json.loads(printed(r)) == value


# Failures

def test_exception_in_a_cell(run):
    r = run("raises", dict(n=3))
    assert (type(r.error), r.error.retryable) == (StepFailed, False)
    assert r.error.fields["ename"] == "ZeroDivisionError" and "n / 0" in r.error.fields["traceback"]
    assert [c["status"] for c in r.cells] == ["completed", "completed", "failed"]
    nb = nbformat.read(r.notebook, 4)
    nbformat.validate(nb)
    assert "An Exception was encountered" in nb.cells[0].source
    assert nb.cells[-1].metadata.papermill.status == "pending" and nb.metadata.papermill.exception is True


def test_our_own_error_comes_back_as_itself(run):
    r = run("raises_gate", dict(limit=0.7))
    assert type(r.error) is GateFailed
    assert (r.error.message, r.error.hint) == ("Score 0.31 is below 0.7.", "Use a sharper portrait.")
    assert r.error.fields["score"] == 0.31


def test_segfault_keeps_what_was_printed_and_says_where(run):
    r = run("poison_segfault")
    assert type(r.error) is KernelDied and r.error.retryable and "SIGSEGV" in str(r.error)
    assert "Segmentation fault" in r.error.fields["log"]
    last = cells(r)[-1]
    assert last.metadata.papermill.status == "failed" and last.outputs[-1].ename == "KernelDied"
    assert printed(r) == "before\n"


def test_kernel_that_kills_itself(run):
    assert "SIGKILL" in str(run("kills_itself").error)


def test_asking_a_person_is_a_failure(run):
    r = run("asks_input")
    assert r.error.fields["ename"] == "StdinNotImplementedError" and "never" not in printed(r)


@pytest.mark.parametrize("code", [0, None, "", "0"])
def test_notebook_that_leaves_early_has_succeeded(run, code: object):
    r = run("sys_exit", dict(code=code))
    assert r.ok and r.error is None and "never" not in printed(r)
    assert [c["status"] for c in r.cells] == ["completed", "completed", "left"]
    nb = nbformat.read(r.notebook, 4)
    assert nb.metadata.spin.status == "succeeded" and not any("papermill-error" in str(c.metadata) for c in nb.cells)
    assert cells(r)[-1].metadata.papermill.status == "pending" and not cells(r)[-1].outputs


@pytest.mark.parametrize("code, said", [(1, "SystemExit: 1"), (True, "SystemExit: True"), (False, "SystemExit: False"),
                                        (0.0, "SystemExit: 0.0"), ("enough", "SystemExit: enough")])
def test_notebook_that_leaves_with_a_complaint_has_failed(run, code: object, said: str):
    r = run("sys_exit", dict(code=code))
    assert type(r.error) is StepFailed and r.error.message == said and "cell 3" in r.error.hint and "never" not in printed(r)


def test_exit_and_quit_end_the_notebook_after_their_cell(run):
    r = run("calls_exit")
    assert r.ok and [c["status"] for c in r.cells] == ["completed", "left"]
    assert printed(r) == "before\nto the end of the cell\n" and r.seconds < 5
    assert [c.metadata.papermill.status for c in cells(r)] == ["completed", "completed", "pending"]


def test_notebook_that_breaks_its_kernel_does_not_hang_the_worker(run):
    r = run("breaks_its_kernel")
    assert type(r.error) is KernelDied and "broke its kernel" in r.error.message


def test_run_whose_folder_is_gone_ends_well_and_so_does_the_next(run):
    assert run("removes_its_folder").ok
    assert run("ok_three_cells").ok


def test_missing_and_broken_notebooks_are_named(pool: KernelPool, tmp_path: Path):
    with pytest.raises(NotFound, match="No notebook"): run_notebook(tmp_path / "none.ipynb", None, pool=pool)
    for text in ("", "not json", "[]", '{"cells": 3}'):
        (tmp_path / "broken.ipynb").write_text(text)
        with pytest.raises(InputError, match="Not a notebook"): run_notebook(tmp_path / "broken.ipynb", None, pool=pool)


def test_own_kernel_under_another_name_is_forked_and_another_pythons_is_executed(pool, run, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    start = ["-m", "ipykernel_launcher", "-f", "{connection_file}"]
    for name, argv in dict(mine=[sys.executable, *start], other=["env", sys.executable, *start]).items():
        (tmp_path / "kernels" / name).mkdir(parents=True)
        (tmp_path / "kernels" / name / "kernel.json").write_text(json.dumps(dict(argv=argv, display_name=name, language="python")))
    nb = nbformat.read(NOTEBOOKS / "ok_three_cells.ipynb", 4)
    for name, runs in dict(mine=2, other=1).items():
        nb.metadata.kernelspec.name = name
        nbformat.write(nb, tmp_path / "named.ipynb")
        again = dict(pool=pool, kernel="resident", cwd=tmp_path)
        for _ in range(2): r = run_notebook(tmp_path / "named.ipynb", tmp_path / "out.ipynb", dict(n=4), **again)
        assert r.ok and r.kernel["runs"] == runs
        assert nbformat.read(tmp_path / "out.ipynb", 4).metadata.kernelspec.name == name


def test_notebook_that_names_no_kernel_runs_in_python3(pool: KernelPool, tmp_path: Path):
    nb = json.loads((NOTEBOOKS / "ok_three_cells.ipynb").read_text())
    for spec, ok in ((dict(language="python", display_name="x"), True), (dict(name=5, display_name="x"), False)):
        (tmp_path / "a.ipynb").write_text(json.dumps(nb | dict(metadata=dict(kernelspec=spec))))
        if ok: assert run_notebook(tmp_path / "a.ipynb", None, pool=pool).ok
        else:
            with pytest.raises(InputError): run_notebook(tmp_path / "a.ipynb", None, pool=pool)


def test_notebook_of_an_unknown_kernel(pool: KernelPool, tmp_path: Path):
    nb = nbformat.read(NOTEBOOKS / "ok_three_cells.ipynb", 4)
    nb.metadata.kernelspec.name = "fortran"
    nbformat.write(nb, tmp_path / "fortran.ipynb")
    with pytest.raises(NotFound, match="fortran"): run_notebook(tmp_path / "fortran.ipynb", None, pool=pool)
    assert pool.acquire(timeout_s=5).alive(), "the failed start took no place in the pool"


# Stopping

@pytest.mark.parametrize("name, grace_s, exit_code", [
    ("sleeps_forever", 30, -signal.SIGKILL), ("swallows_interrupt", 30, -signal.SIGKILL),  # after the interrupt
    ("c_loop_ignores_sigint", 0.3, -signal.SIGTERM), ("ignores_every_signal", 0.3, -signal.SIGKILL)])
def test_stop_climbs_the_ladder(pool: KernelPool, run, name: str, grace_s: float, exit_code: int):
    seen: list[str] = []
    def on_output(index: int, message: dict) -> None: seen.append(message["content"].get("text", ""))
    def should_stop() -> str | None: return "cancelled" if "before" in "".join(seen) else None
    r = run(name, on_output=on_output, should_stop=should_stop, grace_s=grace_s)
    assert type(r.error) is Cancelled and r.error.fields["reason"] == "cancelled"
    assert printed(r) == "before\n" + ("swallowed\n" if name == "swallows_interrupt" else "")
    exits = next(iter(pool._launcher.parents.values())).exits
    wait_until(lambda: r.kernel["id"] in exits)
    assert exits[r.kernel["id"]] == exit_code


def test_notebook_beyond_its_time_is_stopped(run):
    r = run("sleeps_forever", timeout_s=0.3)
    assert type(r.error) is StepTimeout and r.error.retryable and r.error.fields["timeout_s"] == 0.3


def test_interrupted_notebook_keeps_the_traceback_of_where_it_was(run):
    outputs = cells(run("sleeps_forever", timeout_s=0.3, grace_s=30))[-1].outputs
    assert outputs[-1].ename == "KeyboardInterrupt"
    assert "time.sleep(3600)" in re.sub(r"\x1b\[[0-9;]*m", "", "".join(outputs[-1].traceback))


def test_processes_of_a_run_end_with_it(run, pool: KernelPool):
    r = run("starts_a_child")
    assert r.ok
    child = int(printed(r))
    wait_until(lambda: not psutil.pid_exists(child))
    wait_until(lambda: not psutil.pid_exists(r.kernel["pid"]))


# Pristine and resident kernels

def test_a_kernel_is_never_used_twice_unless_it_is_resident(run):
    kernels = [run("ok_three_cells").kernel for _ in range(6)]
    assert len({k["id"] for k in kernels}) == 6 and {(k["kind"], k["runs"]) for k in kernels} == {("pristine", 1)}
    resident = [run("ok_three_cells", dict(n=i), kernel="resident").kernel for i in range(3)]
    assert len({k["id"] for k in resident}) == 1
    assert [(k["kind"], k["runs"]) for k in resident] == [("resident", i) for i in (1, 2, 3)]


def test_resident_kernel_serves_one_notebook_source_only(run, pool: KernelPool, tmp_path: Path):
    first = run("ok_three_cells", kernel="resident").kernel
    assert run("shows_its_state", kernel="resident").kernel["id"] != first["id"]
    nb = nbformat.read(NOTEBOOKS / "ok_three_cells.ipynb", 4)
    (path := tmp_path / "own.ipynb").write_text(nbformat.writes(nb))
    kernel = lambda **kw: run_notebook(path, None, kw, pool=pool, kernel="resident", cwd=tmp_path).kernel["id"]
    mine = kernel()
    assert mine != first["id"] and mine == kernel(n=5), "the same source in another file has a kernel of its own"
    nb.cells[-1].source += "\nprint('edited')"
    path.write_text(nbformat.writes(nb))
    assert kernel() != mine


def test_resident_kernel_shows_nothing_of_the_run_before(run, tmp_path: Path, pool: KernelPool):
    folder = tmp_path / "work"
    pristine = printed(run("shows_its_state"))
    changes, shows = ("\n".join(c.source for c in nbformat.read(NOTEBOOKS / f"{o}.ipynb", 4).cells if c.cell_type == "code")
                      for o in ("changes_everything", "shows_its_state"))
    cell = nbformat.v4.new_code_cell("change = False", metadata=dict(tags=["parameters"]))
    both = nbformat.v4.new_code_cell(f"get_ipython().run_cell({changes!r} if change else {shows!r}).raise_error()")
    nb = nbformat.v4.new_notebook(cells=[cell, both])
    (path := tmp_path / "both.ipynb").write_text(nbformat.writes(nb))
    def go(change: bool) -> RunRecord:
        r = run_notebook(path, tmp_path / "out.ipynb", dict(change=change), pool=pool, kernel="resident", cwd=folder)
        assert r.ok, r.error
        return r
    first = printed(go(False))
    changed = go(True).kernel["id"]
    again = go(False)
    assert again.kernel["id"] == changed and again.kernel["runs"] == 3
    assert printed(again) == first
    assert first.replace("'change'", "") == pristine


def test_many_runs_of_one_resident_kernel_stay_equal_and_its_memory_flat(run):
    sizes = []
    for i in range(80):
        r = run("ok_three_cells", dict(n=i), kernel="resident")
        assert r.ok and printed(r) == f"n is {i + 1}\n"
        if i in (20, 79): sizes.append(psutil.Process(r.kernel["pid"]).memory_info().rss)
    assert r.kernel["runs"] >= 80
    assert sizes[1] < sizes[0] * 1.1


def test_resident_kernel_keeps_nothing_of_the_source_of_an_earlier_run():
    with KernelPool(spare=0) as pool:
        kernel = pool.acquire(resident="source")
        kernel.request("n = 123456789")
        pool.release(kernel)
        kernel = pool.acquire(resident="source")
        reply = kernel.request("", silent=True, expression="[len(get_ipython().history_manager.db_input_cache), "
                               "len(get_ipython().kernel.session.digest_history) < 5]")
        assert kernel.runs == 2 and reply["user_expressions"]["spin"]["data"]["text/plain"] == "[0, True]"


def test_a_run_sends_one_request_a_cell_straight_to_the_main_thread(run, monkeypatch):
    sent, send = [], Kernel.send
    def told(self: Kernel, code: str, **kw) -> str:
        if self.runs: sent.append(code)  # before its first run it rehearses
        return send(self, code, **kw)
    with KernelPool(spare=0) as pool:
        monkeypatch.setattr(Kernel, "send", told)
        run("ok_three_cells", pool=pool)
        assert sent == ["n: int = 1  # any number", "n += 1", "print('n is', n)\nn"]
        kernel, seen = pool.acquire(), []
        kernel.request("import threading; print(*[t.name for t in threading.enumerate()], sep='|')", on_message=seen.append)
    threads = "".join(m["content"]["text"] for m in seen if m["msg_type"] == "stream").strip().split("|")
    assert {"MainThread", "IOPub"} <= {*threads} and not {"Shell channel", "Control"} & {*threads}
    assert [kind for kind, _ in groupby(m["msg_type"] for m in seen)] == ["execute_input", "stream", "status"]


def test_interrupt_in_the_middle_of_a_send_waits_for_its_end():
    sent, before = [], signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a kernel
    try:
        with pytest.raises(KeyboardInterrupt):
            with _undisturbed():
                sent.append("one half")
                signal.raise_signal(signal.SIGINT)
                sent.append("the other half")
            sent.append("never")
    finally: signal.signal(signal.SIGINT, before)
    assert sent == ["one half", "the other half"]


def test_interrupt_of_a_cell_that_prints_without_pause_is_answered_by_the_cell(run):
    for _ in range(6):
        began = time.monotonic()
        r = run("prints_until_stopped", timeout_s=0.2, grace_s=30, max_mb=0.2)
        assert type(r.error) is StepTimeout and time.monotonic() - began < 25
        assert cells(r)[-1].outputs[-1].ename == "KeyboardInterrupt"  # it answered: no rung above the interrupt was needed


def test_resident_kernel_is_replaced_after_an_error():
    with KernelPool(spare=0) as pool:
        k = pool.acquire(resident="a")
        pool.release(k, ok=False)
        assert pool.acquire(resident="a").id != k.id


def test_resident_kernel_outlives_the_folder_of_its_first_run(tmp_path: Path):
    with KernelPool(spare=0) as pool:
        (folder := tmp_path / "run").mkdir()
        k = pool.acquire(resident="a", cwd=folder)
        k.enter(None, str(folder))
        assert k.request("x = 1")["status"] == "ok"
        folder.rmdir()
        pool.release(k, wait=True)
        assert pool.acquire(resident="a").id == k.id


def test_kernel_that_runs_while_the_pool_is_closed_is_ended_and_can_be_given_back():
    pool = KernelPool(spare=0)
    k = pool.acquire()
    pool.close()
    pool.release(k, False)
    wait_until(lambda: not psutil.pid_exists(k.pid) and pool._total() == 0)


@pytest.mark.parametrize("limit", [dict(max_runs=1), dict(max_mb=1)])
def test_resident_kernel_past_its_mark_is_replaced(tmp_path: Path, limit: dict):
    with KernelPool(spare=0, **limit) as pool:
        ids = set()
        for _ in range(2):
            k = pool.acquire(resident="a")
            ids.add(k.id)
            pool.release(k)
            wait_until(lambda k=k: not psutil.pid_exists(k.pid))
        assert len(ids) == 2


def test_resident_kernel_with_yesterdays_code_is_replaced(tmp_path: Path):
    (tmp_path / "helper_of_resident.py").write_text("VALUE = 1")
    with KernelPool(spare=0) as pool:
        k = pool.acquire(resident="a")
        k.request(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import helper_of_resident")
        pool.release(k, wait=True)
        again = pool.acquire(resident="a")
        assert again.id == k.id
        pool.release(again, wait=True)
        (tmp_path / "helper_of_resident.py").write_text("VALUE = 222")
        assert pool.acquire(resident="a").id != k.id


def test_threads_get_kernels_of_their_own_and_the_pool_stays_within_its_bound():
    with KernelPool(max_kernels=2, spare=0) as pool:
        a, b = pool.acquire(resident="a"), pool.acquire()
        assert a.id != b.id
        with pytest.raises(ServiceUnavailable, match="All 2 kernels are in use"): pool.acquire(timeout_s=0.2)
        threading.Timer(0.2, pool.release, [a]).start()
        assert pool.acquire(timeout_s=10).id != a.id and not a.alive(), "the idle resident kernel made room"


@pytest.mark.parametrize("waiting", ["resident", "spare"])
def test_dead_waiting_kernel_is_not_handed_out(waiting: str):
    with KernelPool(spare=1) as pool:
        k = pool.acquire(resident="a" if waiting == "resident" else "")
        pool.release(k, wait=True)
        wait_until(lambda: f"{waiting}=1" in repr(pool))
        [dead] = pool._idle if waiting == "resident" else pool._spares[()]
        os.kill(dead.pid, signal.SIGKILL)
        wait_until(lambda: not dead.alive())
        assert pool.acquire(resident="a" if waiting == "resident" else "").id != dead.id


def test_spares_are_forked_ahead_for_the_imports_in_use_and_give_way_to_others():
    with KernelPool(spare=2, max_kernels=4) as pool:
        pool.release(pool.acquire(["wave"]))
        wait_until(lambda: list(map(len, pool._spares.values())) == [2] and pool._used == 0)
        assert pool.acquire(["wave"]).request("import sys; assert 'wave' in sys.modules")["status"] == "ok"
        for _ in range(3):
            other = pool.acquire(["sndhdr"], timeout_s=20)
            assert other.request("assert 'wave' not in __import__('sys').modules")["status"] == "ok"


def test_other_variables_of_the_owner_are_those_of_the_next_kernel(monkeypatch):
    with KernelPool() as pool:
        def shown() -> str:
            k, said = pool.acquire(), []
            k.request("import os; print(os.environ.get('SPIN_OF_THE_OWNER'))", on_message=said.append)
            pool.release(k)
            return said[1]["content"]["text"].strip()
        assert shown() == "None"
        monkeypatch.setenv("SPIN_OF_THE_OWNER", "new")
        assert shown() == "new"
        monkeypatch.delenv("SPIN_OF_THE_OWNER")
        assert shown() == "None"


# Nothing is left over

def test_killed_owner_leaves_no_kernel_and_no_file():
    code = ("import time; from myspinbot.executor.pool import KernelPool; p = KernelPool(spare=1); k = p.acquire(['wave']);"
            "k.send('import time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)');"
            "print(k.pid, p._launcher._process.pid, k.parent.folder, flush=True); time.sleep(600)")
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    kernel, launcher, folder = owner.stdout.readline().split()
    owner.kill()
    owner.wait()
    wait_until(lambda: not psutil.pid_exists(int(kernel)) and not psutil.pid_exists(int(launcher)))
    wait_until(lambda: not Path(folder).exists())


def test_killed_launcher_takes_its_kernels_along_and_is_replaced(run, pool: KernelPool):
    r = run("ok_three_cells", kernel="resident")
    pool._launcher._process.kill()
    wait_until(lambda: not psutil.pid_exists(r.kernel["pid"]) or psutil.Process(r.kernel["pid"]).status() == "zombie")
    again = run("ok_three_cells", kernel="resident")
    assert again.ok and again.kernel["runs"] == 1


def test_closed_pool_leaves_nothing():
    pool = KernelPool(spare=1)
    kernels = [pool.acquire(["wave"]), pool.acquire(resident="b")]
    folders = {k.parent.folder for k in kernels}
    assert all(o.is_dir() for o in folders)
    pool.release(kernels[0])
    pool.close()
    assert not any(psutil.pid_exists(k.pid) for k in kernels)
    assert not any(o.exists() for o in folders)
    with pytest.raises(ServiceUnavailable, match="closed"): pool.acquire()


def test_pool_that_is_closed_while_it_forks_spare_kernels_ends_them_itself():
    for _ in range(12):  # Linux would end them as well, but later
        pool = KernelPool(spare=2)
        kernel, launcher = pool.acquire(), pool._launcher._process
        pool.close()
        assert launcher.returncode == 0 and not psutil.pid_exists(kernel.pid)


def test_notebook_that_cannot_be_written_leaves_the_old_one_whole(tmp_path: Path):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("old")])
    save_notebook(nb, tmp_path / "a.ipynb")
    nb.metadata["not json"] = object()
    with pytest.raises(TypeError): save_notebook(nb, tmp_path / "a.ipynb")
    assert nbformat.read(tmp_path / "a.ipynb", 4).cells[0].source == "old"
    assert [o.name for o in tmp_path.iterdir()] == ["a.ipynb"]


# papermill --engine spin

def test_papermill_command_with_our_engine(tmp_path: Path):
    out = tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "papermill", "--engine", "spin", str(NOTEBOOKS / "ok_three_cells.ipynb"), str(out)]
    subprocess.run([*command, "-p", "n", "5"], check=True, capture_output=True)
    nb = nbformat.read(out, 4)
    assert nb.cells[-1].outputs[-1].data["text/plain"] == "6"
    assert {c.metadata.papermill.status for c in nb.cells} == {"completed"}


def test_papermill_reports_our_engines_failures_as_its_own(tmp_path: Path):
    def execute(name: str, **kw) -> None:
        papermill.execute_notebook(str(NOTEBOOKS / f"{name}.ipynb"), str(tmp_path / "o.ipynb"), engine_name="spin",
                                   progress_bar=False, **kw)
    with pytest.raises(papermill.PapermillExecutionError, match="ZeroDivisionError"): execute("raises")
    with pytest.raises(DeadKernelError, match="SIGKILL"): execute("kills_itself")
    assert nbformat.read(tmp_path / "o.ipynb", 4).metadata.papermill.exception is True
    with open(tmp_path / "stdout.txt", "w") as f: execute("overwrites_its_line", stdout_file=f)
    assert (tmp_path / "stdout.txt").read_text().endswith("step 99\n")


def test_result_is_what_happened_in_the_json_of_the_notebook(run):
    nb = json.loads(run("kills_itself").notebook.read_text())
    assert nb["metadata"]["spin"]["error"]["type"] == "KernelDied"
