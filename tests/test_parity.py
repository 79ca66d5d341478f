"""papermill with its own engine and with ours: the same notebook, file, log and exception; and where they differ on purpose.

papermill's own engine takes seconds for each notebook, so a run of it is shared by all tests that ask for the same one.
"""
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import papermill
import psutil
import pytest
from jupyter_client.kernelspec import NoSuchKernel
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from outputs import joined
from papermill.exceptions import PapermillExecutionError

from myspinbot.executor.engine import run_notebook

ROOT = Path(__file__).parents[1]
NOTEBOOKS = Path(__file__).parent / "notebooks" / "parity"
ENGINES = dict(theirs=None, ours="spin")
TIMES = {"start_time", "end_time", "duration"}


@dataclass
class Run:
    "What a caller of papermill can see."
    nb: Any = None                                  # the file
    error: BaseException | None = None
    log: list[str] = field(default_factory=list)
    out: Path = Path()
    seconds: float = 0.0

    def cells(self) -> list[Any]: return [c for c in self.nb.cells if c.cell_type == "code"]
    def printed(self) -> str:
        return "".join(o.text for c in self.cells() for o in c.outputs if o.output_type == "stream")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    "Run a notebook as `theirs` or `ours`, once for each set of arguments."
    made: dict[str, Run] = {}

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None: lines.append(f"{record.levelname} {record.getMessage()}")

    def go(who: str, name: str, parameters: dict | None = None, again: bool = False, **kw: Any) -> Run:
        nonlocal lines
        key = json.dumps([who, name, parameters, kw], default=repr)
        if key in made and not again: return made[key]
        lines, folder = [], tmp_path_factory.mktemp(who)
        r = made[key] = Run(log=lines, out=folder / "out.ipynb")
        kw = dict(progress_bar=False, execution_timeout=30) | kw
        kw |= {k: kw[k](folder) for k in ("cwd", "output_path") if callable(kw.get(k))}
        out = kw.pop("output_path", str(r.out))
        logger, handler = logging.getLogger("papermill"), Lines()
        began = time.monotonic()
        before, was = logger.level, os.environ.pop("PYTEST_CURRENT_TEST", "")  # under which ipykernel captures less
        logger.setLevel("INFO")
        logger.addHandler(handler)
        def execute() -> None:
            papermill.execute_notebook(NOTEBOOKS / f"{name}.ipynb", out, parameters, engine_name=ENGINES[who], **kw)
        try:
            try: execute()
            except CellTimeoutError:  # now and then nbclient misses the end of a cell with an Output widget
                if who == "ours" or kw["execution_timeout"] != 30: raise
                execute()
        except Exception as e: r.error = e
        finally:
            r.seconds = time.monotonic() - began
            logger.removeHandler(handler)
            logger.setLevel(before)
            os.environ["PYTEST_CURRENT_TEST"] = was
        if r.out.exists(): r.nb = nbformat.read(r.out, 4)
        return r
    lines: list[str] = []
    return go


def masked(text: str, r: Run) -> str:
    "Without what is new in each run: folders, process ids, model ids, addresses, colours."
    for what, word in ((re.escape(str(r.out.parent)), "OUT"), (r"[0-9a-f]{32}", "ID"), (r"ipykernel_\d+/\d+", "FILE"),
                       (r"0x[0-9a-f]{6,}", "ADDRESS"), (r"\x1b\[[0-9;]*m", "")): text = re.sub(what, word, text)
    return text


def document(r: Run) -> dict[str, Any]:
    "The executed notebook without times and chance."
    if r.nb is None: return {}
    nb = json.loads(masked(json.dumps(r.nb), r))
    for meta in (nb["metadata"], *(c["metadata"] for c in nb["cells"])):
        meta["papermill"] = {k: v for k, v in meta["papermill"].items() if k not in TIMES} if "papermill" in meta else None
        if "execution" in meta: meta["execution"] = sorted(meta["execution"])
    for c in nb["cells"]:
        if {"injected-parameters", "papermill-error-cell-tag"} & {*c["metadata"].get("tags", [])}: c["id"] = "new"
        if "outputs" in c: c["outputs"] = joined(c["outputs"])
    for o in nb["metadata"].get("widgets", {}).values():  # in the order of their random ids
        models = list(json.loads(json.dumps(r.nb.metadata.widgets))["application/vnd.jupyter.widget-state+json"]["state"].values())
        o["state"] = sorted(masked(json.dumps(m), r) for m in models)
    return nb


def failure(r: Run) -> tuple[Any, ...]:
    "Type, message and attributes of the exception."
    e = r.error
    fields = {k: masked(str(v), r) for k, v in vars(e).items()} if isinstance(e, PapermillExecutionError) else {}
    return type(e), masked(str(e), r), fields


def assert_same(ours: Run, theirs: Run) -> None:
    assert failure(ours) == failure(theirs)
    a, b = document(ours), document(theirs)
    for x, y in zip(a.get("cells", []), b.get("cells", [])): assert x == y
    assert a == b


# The same

SAME = {
    "every_kind_of_cell": {}, "displays_a_figure": dict(name="draws_a_figure"), "updates_its_displays": {},
    "widgets_keep_their_state": {}, "warns_and_logs": {}, "prints_many_lines": {}, "has_no_parameters_cell": {},
    "raises_far_below": {}, "has_a_syntax_error": {}, "raises_where_it_may": {}, "interrupts_itself": {},
    "raises_an_error_of_ours": {}, "asks_a_person": {}, "leaves_with_a_code": {},
    "parameters": dict(name="every_kind_of_cell", parameters=dict(n=-5,
                                                                   word="it's \"x\"\n{y} 🎬", items=[None, True, {"a": 1.5}])),
    "unknown_parameter": dict(name="has_no_parameters_cell", parameters=dict(n=5)),
    "two_parameters_cells": dict(name="has_two_parameters_cells", parameters=dict(n=5)),
    "leaves_with_1": dict(name="leaves_with_a_code", parameters=dict(code=1)),
    "leaves_with_a_message": dict(name="leaves_with_a_code", parameters=dict(code="enough")),
    "leaves_with_nothing": dict(name="leaves_with_a_code", parameters=dict(code=None)),
    "leaves_with_true": dict(name="leaves_with_a_code", parameters=dict(code=True)),
    "leaves_with_false": dict(name="leaves_with_a_code", parameters=dict(code=False)),
    "leaves_with_text_0": dict(name="leaves_with_a_code", parameters=dict(code="0")),
    "bash": dict(name="speaks_bash", parameters=dict(word="two words"), cwd=str),
    "another_kernel_than_the_notebooks": dict(name="wants_an_unknown_kernel", kernel_name="python3"),
    "prepared_only": dict(name="every_kind_of_cell", parameters=dict(n=2), prepare_only=True),
    "report_mode": dict(name="has_no_parameters_cell", report_mode=True),
    "no_save_before_the_end": dict(name="has_no_parameters_cell", request_save_on_cell_execute=False),
    "errors_allowed": dict(name="raises_far_below", parameters=dict(n=0), allow_errors=True),
    "this_error_allowed": dict(name="raises_far_below", allow_error_names=["ValueError"]),
    "no_error_allowed": dict(name="raises_where_it_may", force_raise_errors=True),
    "without_timing": dict(name="has_no_parameters_cell", record_timing=False, store_widget_state=False),
    "another_tag_skips": dict(name="every_kind_of_cell", skip_cells_with_tag="hide-input"),
    "output_folder_missing": dict(name="has_no_parameters_cell", output_path=lambda f: str(f / "none" / "out.ipynb")),
    "time_limit_not_reached": dict(name="has_no_parameters_cell", execution_timeout=50, start_timeout=50),
}
SAME["updates_its_displays"] = dict(name="displays_and_updates")


@pytest.mark.parametrize("situation", SAME)
def test_same_notebook_and_same_exception(run, situation: str):
    kw = dict(name=situation) | SAME[situation]
    ours, theirs = run("ours", **kw), run("theirs", **kw)
    if situation == "updates_its_displays":  # see `test_pieces_of_a_stream_are_one_output_and_overwritten_text_is_dropped`
        for o in joined(theirs.cells()[9].outputs): assert o["text"].endswith("step 4\n")
        theirs.cells()[9].outputs = ours.cells()[9].outputs
    assert_same(ours, theirs)


def test_notebook_finds_its_paths_folder_environment_and_history(run, monkeypatch: pytest.MonkeyPatch):
    for word in ("one", "two"):  # the second time in another kernel
        monkeypatch.setenv("SPIN_PARITY", word)
        kw = dict(name="shows_where_it_is", parameters=dict(PAPERMILL_INPUT_PATH=f"in {word}"), cwd=str)
        ours, theirs = run("ours", **kw), run("theirs", **kw)
        assert_same(ours, theirs)
        assert f"OUT {word}\n" in masked(ours.printed(), ours)
    monkeypatch.delenv("SPIN_PARITY")
    assert "None" in run("ours", again=True, **kw).printed()


def test_relative_output_path_is_not_below_the_notebooks_folder(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    for who in ENGINES:
        assert run(who, "has_no_parameters_cell", output_path=f"{who}.ipynb", cwd=str(tmp_path / "work")).error is None
    assert sorted(o.name for o in tmp_path.rglob("*.ipynb")) == ["ours.ipynb", "theirs.ipynb"]
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("name", ["every_kind_of_cell", "raises_far_below", "warns_and_logs"])
def test_same_log(run, name: str):
    def said(who: str) -> list[str]:
        r, found = run(who, name, log_output=True), [""]
        for o in r.log:  # what a cell says, in one piece for each level: where a stream is cut is chance
            level, _, text = masked(o, r).partition(" ")
            cell = re.match("(Executing|Ending) Cell", text)
            if not cell and found[-1].startswith(f"{level}: "): found[-1] += text
            else: found.append(f"{level}{'' if cell else ':'} {text}")
        return found
    assert said("ours") == said("theirs") and len(said("ours")) > 8


def test_same_stdout_and_stderr_files(tmp_path: Path):
    found = {}
    for who, engine in ENGINES.items():
        with open(tmp_path / f"{who}.out", "w") as out, open(tmp_path / f"{who}.err", "w") as err:
            papermill.execute_notebook(NOTEBOOKS / "displays_and_updates.ipynb", None, engine_name=engine, progress_bar=False,
                                       stdout_file=out, stderr_file=err)
        found[who] = (tmp_path / f"{who}.out").read_text(), (tmp_path / f"{who}.err").read_text()
    assert found["ours"] == found["theirs"] and all(found["ours"])


@pytest.mark.parametrize("seen, kw, found", [("first cell", {}, True), ("in mid-cell", dict(autosave_cell_every=1), True),
                                             ("first cell", dict(request_save_on_cell_execute=False), False)])
def test_file_can_be_watched_while_the_notebook_runs(tmp_path: Path, seen: str, kw: dict, found: bool):
    for who, engine in ENGINES.items():
        out = str(tmp_path / f"{who}.ipynb")
        nb = papermill.execute_notebook(NOTEBOOKS / "watches_its_file.ipynb", out, dict(seen=seen, PAPERMILL_OUTPUT_PATH=out),
                                        engine_name=engine, progress_bar=False, **kw)
        assert f"found {found}" in "".join(o.text for o in nb.cells[-1].outputs), who


def test_what_the_notebook_left_to_its_end_has_happened(run, tmp_path: Path):
    for who in ENGINES:
        (tmp_path / who).mkdir()
        run(who, "writes_files", dict(folder=str(tmp_path / who)))
        assert (tmp_path / who / "buffered.txt").read_text() == "not flushed by hand"
        assert (tmp_path / who / "at_exit.txt").read_text() == "ran"


# The command

def papermill_command(who: str, *args: str, **kw: Any) -> subprocess.CompletedProcess:
    engine = ["--engine", "spin"] if who == "ours" else []
    return subprocess.run([sys.executable, "-m", "papermill", *engine, *args], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=120, **kw)


@pytest.mark.parametrize("name, args, code", [
    ("shows_where_it_is", ["--inject-paths", "-p", "unknown", "1", "--no-progress-bar"], 0),
    ("raises_far_below", ["--log-output"], 1), ("dies", [], 138), ("takes_too_long", ["--execution-timeout", "1"], 1),
    ("leaves_with_a_code", ["-p", "code", "0"], 0), ("wants_an_unknown_kernel", [], 1)])
def test_same_exit_code_and_last_words(tmp_path: Path, name: str, args: list[str], code: int):
    said = {}
    for who in ENGINES:
        done = papermill_command(who, str(NOTEBOOKS / f"{name}.ipynb"), "out.ipynb", *args, cwd=tmp_path)
        assert done.returncode == code, done.stderr[-2000:]
        nb = nbformat.read(tmp_path / "out.ipynb", 4)
        said[who] = [o.get("text") for c in nb.cells for o in joined(c.get("outputs", [])) if o["output_type"] == "stream"]
        said[who].append(done.stderr.strip().splitlines()[-1].replace("Kernel died: The kernel ended by SIGKILL. Often memory: "
                         "lower the size, or give it more.", "Kernel died") if code else "")
        if "--log-output" not in args and "--no-progress-bar" not in args: assert "Executing:" in done.stderr
    assert said["ours"] == said["theirs"]


def test_notebook_comes_out_of_stdout(tmp_path: Path):
    found = {}
    for who in ENGINES:
        done = papermill_command(who, str(NOTEBOOKS / "every_kind_of_cell.ipynb"), "-", "-p", "n", "4", cwd=tmp_path)
        r = Run(nb=nbformat.reads(done.stdout, 4), out=tmp_path / "-")
        found[who] = document(r)
    assert found["ours"] == found["theirs"] and not list(tmp_path.iterdir())


# Where we differ on purpose: the table in the notebook of the engine

def states(r: Run) -> list[tuple[str, bool | None]]:
    return [(c.metadata.papermill.status, c.metadata.papermill.exception) for c in r.cells()]


def test_notebook_of_a_dead_kernel_says_so_and_why(run):
    ours, theirs = run("ours", "dies"), run("theirs", "dies")
    assert type(ours.error) is type(theirs.error) is DeadKernelError
    assert str(theirs.error) == "Kernel died" and str(ours.error).startswith("Kernel died: The kernel ended by SIGKILL.")
    assert states(theirs)[1:] == [("completed", False), ("completed", None)]
    assert states(ours)[1:] == [("failed", True), ("pending", None)]
    assert (ours.nb.metadata.papermill.exception, theirs.nb.metadata.papermill.exception) == (True, None)
    assert "SIGKILL" in ours.cells()[1].outputs[-1].evalue and not theirs.cells()[1].outputs
    assert ours.printed() == theirs.printed() == "before\n"
    assert "language_info" in ours.nb.metadata and "language_info" not in theirs.nb.metadata


def test_notebook_of_a_cell_beyond_its_time_says_so_and_where_it_was(run):
    kw = dict(name="takes_too_long", execution_timeout=1)
    ours, theirs = run("ours", **kw), run("theirs", **kw)
    assert failure(ours) == failure(theirs) and type(ours.error) is CellTimeoutError
    assert states(theirs)[1:] == [("completed", False), ("completed", None)]
    assert states(ours)[1:] == [("failed", True), ("pending", None)]
    assert "time.sleep(20)" in masked("".join(ours.cells()[1].outputs[-1].traceback), ours)


def test_time_limit_may_be_a_part_of_a_second_or_depend_on_the_cell(run):
    assert type(run("ours", "takes_too_long", execution_timeout=0.4).error) is CellTimeoutError
    assert type(run("theirs", "takes_too_long", execution_timeout=0.4).error).__name__ == "TraitError"
    r = run("ours", "takes_too_long", execution_timeout=None, timeout_func=lambda cell: 0.5 if "slow" in cell.source else None)
    assert type(r.error) is CellTimeoutError and states(r)[0] == ("completed", False)


def test_notebook_without_a_kernel_is_not_completed(run):
    ours, theirs = run("ours", "wants_an_unknown_kernel"), run("theirs", "wants_an_unknown_kernel")
    assert failure(ours) == failure(theirs) and type(ours.error) is NoSuchKernel
    assert states(theirs) == [("completed", None)] and states(ours) == [("pending", None)]
    assert ours.nb.metadata.papermill.exception is True


def test_kernel_that_is_slow_to_start_is_the_same_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = tmp_path / "kernels" / "sleeper"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps(dict(argv=["sleep", "60"], display_name="Sleeper", language="python")))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    for engine in ENGINES.values():
        with pytest.raises(RuntimeError, match="Kernel didn't respond in 1 seconds"):
            papermill.execute_notebook(NOTEBOOKS / "has_no_parameters_cell.ipynb", None, engine_name=engine, progress_bar=False,
                                       kernel_name="sleeper", start_timeout=1)


def test_exit_ends_the_notebook_and_not_its_kernel(run):
    ours, theirs = run("ours", "calls_exit"), run("theirs", "calls_exit")
    assert type(theirs.error) is DeadKernelError and ours.error is None  # theirs goes on until the kernel happens to end
    assert ours.printed() == "before\n" and [s for s, _ in states(ours)] == ["completed", "pending", "pending", "pending"]


def test_text_that_broke_the_kernel_is_shown(run):
    ours, theirs = run("ours", "speaks_brokenly"), run("theirs", "speaks_brokenly")
    assert type(ours.error) is type(theirs.error) is PapermillExecutionError
    assert (ours.error.ename, ours.error.evalue) == ("ValueError", "bad \ufffd text")
    assert "surrogates not allowed" in theirs.printed() and not [o for o in theirs.cells()[-1].outputs if o.output_type == "error"]
    assert ours.printed() == "half \ufffd\n\0nul \x1b[31mred\x1b[0m\n"
    assert ours.cells()[1].outputs == theirs.cells()[1].outputs != []


def test_output_that_no_notebook_holds_is_a_note(run):
    ours, theirs = run("ours", "shows_what_no_notebook_holds"), run("theirs", "shows_what_no_notebook_holds")
    assert type(theirs.error).__name__ == "NotebookValidationError" and ours.error is None
    assert ours.printed() == "[an output was left out: text/plain holds a dict, not text]\nafter\n"


# A worker's verdict

@pytest.mark.parametrize("name, parameters", [
    *(("leaves_with_a_code", dict(code=c)) for c in (0, None, 1, True, False, "0", "enough")), ("dies", None),
    ("interrupts_itself", None), ("has_a_syntax_error", None), ("speaks_brokenly", None), ("raises_far_below", None)])
def test_verdict_of_a_worker_is_papermills(run, tmp_path: Path, name: str, parameters: dict | None):
    theirs = run("theirs", name, **(dict(parameters=parameters) if parameters else {}))
    done = run_notebook(NOTEBOOKS / f"{name}.ipynb", tmp_path / "out.ipynb", parameters, cwd=tmp_path)
    assert done.ok is (theirs.error is None)
    nb = nbformat.read(tmp_path / "out.ipynb", 4)
    ours = Run(nb=nb, out=tmp_path / "out.ipynb")
    if name in ("dies", "speaks_brokenly"): return  # differ on purpose
    assert states(ours) == states(theirs) and nb.metadata.papermill.exception == theirs.nb.metadata.papermill.exception
    assert [c.get("outputs") for c in document(ours)["cells"]] == [c.get("outputs") for c in document(theirs)["cells"]]


def test_pieces_of_a_stream_are_one_output_and_overwritten_text_is_dropped(run):
    ours, theirs = run("ours", "prints_a_carriage_return"), run("theirs", "prints_a_carriage_return")
    assert [len(c.outputs) for c in ours.cells()] == [1, 1] and len(theirs.cells()[0].outputs) > 1
    assert ours.cells()[0].outputs[0].text == theirs.printed().split("\r")[0]
    assert ours.cells()[1].outputs[0].text == "whole\n" and "half" in theirs.printed()


def test_what_a_child_process_prints_is_always_there(run):
    ours = run("ours", "lets_a_child_print")
    assert [o.text for c in ours.cells() for o in c.outputs] == ["from a child\n"] * 8  # theirs: now and then fewer


def test_arguments_of_the_process_are_not_the_kernels(run):
    assert run("ours", "parses_its_arguments").error is None
    assert "unrecognized arguments: -f" in run("theirs", "parses_its_arguments").printed()


def test_each_notebook_of_a_process_has_a_kernel_of_its_own_and_soon(run):
    first, again = run("ours", "is_left_behind"), run("ours", "is_left_behind", again=True)
    assert first.printed() != again.printed()
    kw = dict(name="shows_where_it_is", parameters=dict(PAPERMILL_INPUT_PATH="x"))
    assert "'left'" not in run("ours", again=True, **kw).printed()
    began = time.monotonic()
    for _ in range(3): run("ours", "has_no_parameters_cell", again=True)
    assert (time.monotonic() - began) / 3 < (run("theirs", "has_no_parameters_cell").seconds) / 2


def test_dash_from_python_writes_one_document(tmp_path: Path):
    code = ("import sys, papermill; papermill.execute_notebook(sys.argv[1], '-', engine_name=sys.argv[2] or None,"
            "progress_bar=False)")
    count = {}
    for who, engine in ENGINES.items():
        done = subprocess.run([sys.executable, "-c", code, str(NOTEBOOKS / "has_no_parameters_cell.ipynb"), engine or ""],
                              capture_output=True, text=True, cwd=tmp_path, timeout=120)
        count[who] = done.stdout.count('"nbformat_minor"')
    assert count["ours"] == 1 < count["theirs"] and not list(tmp_path.iterdir())


def test_settings_without_a_meaning_here_are_named(run):
    r = run("ours", "has_no_parameters_cell", kernel_manager_class=None, coalesce_streams=True)
    assert r.error is None
    assert "WARNING Not used by the engine spin: coalesce_streams, kernel_manager_class" in r.log


def test_killed_papermill_leaves_a_whole_notebook_and_no_kernel(tmp_path: Path):
    out = tmp_path / "out.ipynb"
    p = subprocess.Popen([sys.executable, "-m", "papermill", "--engine", "spin", str(NOTEBOOKS / "takes_too_long.ipynb"),
                          str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    def running() -> bool:
        return out.exists() and [c.metadata.papermill.status for c in nbformat.read(out, 4).cells][1] == "running"
    end = time.monotonic() + 60
    while not running(): assert time.monotonic() < end and p.poll() is None
    family = psutil.Process(p.pid).children(recursive=True)
    assert len(family) == 4  # launcher, parent, guard and kernel
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not psutil.wait_procs(family, timeout=10)[1]
    nb = nbformat.read(out, 4)
    assert nb.cells[0].outputs[0].text == "quick\n" and nb.cells[1].metadata.papermill.status == "running"


def test_existing_output_keeps_its_name_and_a_link_its_target(tmp_path: Path):
    target = tmp_path / "real.ipynb"
    (tmp_path / "link.ipynb").symlink_to(target)
    papermill.execute_notebook(NOTEBOOKS / "has_no_parameters_cell.ipynb", tmp_path / "link.ipynb", engine_name="spin",
                               progress_bar=False)
    assert (tmp_path / "link.ipynb").is_symlink() and nbformat.read(target, 4).cells[-1].outputs[0].text == "1\n"
