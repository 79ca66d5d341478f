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
from papermill.exceptions import PapermillExecutionError

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
        kw = dict(progress_bar=False, execution_timeout=60) | {k: v(folder) if callable(v) and k != "timeout_func" else v for k, v in kw.items()}
        out = kw.pop("output_path", str(r.out))
        logger, handler = logging.getLogger("papermill"), Lines()
        before, was = logger.level, os.environ.pop("PYTEST_CURRENT_TEST", "")  # under which ipykernel captures less
        logger.setLevel("INFO")
        logger.addHandler(handler)
        try: papermill.execute_notebook(NOTEBOOKS / f"{name}.ipynb", out, parameters, engine_name=ENGINES[who], **kw)
        except (Exception, SystemExit) as e: r.error = e
        finally:
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


def joined(outputs: list[dict]) -> list[dict]:
    "Streams in one piece: where they are cut is chance."
    found: list[dict] = []
    for o in outputs:
        last = found[-1] if found else {}
        if o["output_type"] == last.get("output_type") == "stream" and o["name"] == last["name"]: last["text"] += o["text"]
        else: found.append(dict(o))
    return found


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
    "parameters": dict(name="every_kind_of_cell", parameters=dict(n=-5, word="it's \"x\"\n{y} 🎬", items=[None, True, {"a": 1.5}])),
    "unknown_parameter": dict(name="has_no_parameters_cell", parameters=dict(n=5)),
    "two_parameters_cells": dict(name="has_two_parameters_cells", parameters=dict(n=5)),
    "leaves_with_1": dict(name="leaves_with_a_code", parameters=dict(code=1)),
    "leaves_with_a_message": dict(name="leaves_with_a_code", parameters=dict(code="enough")),
    "leaves_with_nothing": dict(name="leaves_with_a_code", parameters=dict(code=None)),
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
    "time_limit_not_reached": dict(name="has_no_parameters_cell", execution_timeout=60, start_timeout=60),
}
SAME["updates_its_displays"] = dict(name="displays_and_updates")


@pytest.mark.parametrize("situation", SAME)
def test_same_notebook_and_same_exception(run, situation: str):
    kw = dict(name=situation) | SAME[situation]
    ours, theirs = run("ours", **kw), run("theirs", **kw)
    if situation == "updates_its_displays":  # see `test_overwritten_text_is_dropped`
        for o in joined(theirs.cells()[9].outputs): assert o["text"].endswith("step 4\n")
        theirs.cells()[9].outputs = ours.cells()[9].outputs
    assert_same(ours, theirs)


def test_notebook_finds_its_paths_folder_environment_and_history(run, monkeypatch: pytest.MonkeyPatch):
    for word in ("one", "two"):  # the second time in a warm kernel
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
        r = run(who, name, log_output=True)
        return [masked(o, r) for o in r.log]
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
