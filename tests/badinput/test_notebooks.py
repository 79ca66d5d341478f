"""Broken notebooks in the pipelines folder: each is named with the reason, and all the others work."""
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from farm import Farm, http_of, wait_for

from myspinbot.graph.catalogue import Catalogue, NotebookError
from myspinbot.graph.check import validate_graph
from myspinbot.core import GraphError, NotFound, SpinError
from myspinbot.schema import Graph, Node

TOYS = Path(__file__).parents[1] / "pipelines"
META = dict(myspinbot=dict(id="bad.one", outputs={}), kernelspec=dict(name="python3", language="python", display_name="Python 3"))


def code(source: Any, *tags: str, **kw: Any) -> dict[str, Any]:
    return dict(cell_type="code", metadata=dict(tags=list(tags)), source=source, outputs=[], execution_count=None) | kw


def book(*cells: Any, **kw: Any) -> bytes:
    return json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=META, cells=list(cells)) | kw).encode()


def about(**info: Any) -> dict[str, Any]: return META | dict(myspinbot=dict(id="bad.one") | info)


PARAMS = code("x: int = 1", "parameters")
BAD: dict[str, tuple[bytes, tuple[str, ...]]] = {  # content of steps/bad_one.ipynb -> words of message and hint
    "empty": (b"", ("is empty", "Save it again")),
    "no JSON": (b"hello", ("is no notebook", "line 1")),
    "torn in the middle": (book(PARAMS)[:-40], ("is no notebook",)),
    "not UTF-8": (b'{"cells": "\xff"}', ("is no notebook", "utf-8")),
    "100 000 levels": (b"[" * 100_000, ("is no notebook",)),
    "a list": (b"[]", ("no notebook",)),
    "nbformat 3": (b'{"nbformat": 3, "worksheets": [{"cells": []}]}', ("format 3, not 4", "JupyterLab")),
    "no metadata": (book(PARAMS, metadata={}), ("no `myspinbot` entry", '"id": "bad.one"')),
    "metadata is null": (book(PARAMS, metadata=None), ("metadata are None",)),
    "cells is an object": (book(cells={}), ("cells are {}",)),
    "cell is null": (book(None), ("cell 1", "None")),
    "source is a number": (book(PARAMS, code(5)), ("cell 2", "source is 5")),
    "tags is a number": (book(dict(PARAMS, metadata=dict(tags=5))), ("cell 1", "list of tags is 5")),
    "no parameters cell": (book(code("x = 1")), ("no cell is tagged `parameters`", "Tag one")),
    "two parameters cells": (book(PARAMS, PARAMS), ("cells 1, 2 are tagged `parameters`", "Tag one")),
    "syntax error in parameters": (book(code("x: int = 1\ny: int =", "parameters")),
                                   ("cell 1, line 2", "invalid syntax", "'y: int ='")),
    "code in parameters": (book(code("x = 1\nimport os", "parameters")), ("cell 1, line 2", "'import os' is not a parameter")),
    "a call as default": (book(code("x = __import__('os').system('true')", "parameters")), ("cell 1, line 1", "not a literal")),
    "bytes as default": (book(code("x = b'a'", "parameters")), ("'x' is b'a' (bytes)",)),
    "infinite default": (book(code("x = 1e999", "parameters")), ("'x' is inf", "finite")),
    "NUL in parameters": (book(code("x = 'a\0'", "parameters")), ("cell 1", "null bytes")),
    "syntax error in a cell": (book(PARAMS, code("a = 1\ndef f(:\n  pass")), ("cell 2, line 2", "invalid syntax", "def f(:")),
    "another kernel": (book(PARAMS, metadata=dict(META, kernelspec=dict(name="ir", language="R"))), ("speaks R", "Python kernel")),
    "kernel is a number": (book(PARAMS, metadata=dict(META, kernelspec=dict(language=5))), ("speaks 5",)),
    "kernel of another machine": (book(PARAMS, metadata=dict(META, kernelspec=dict(name="conda-env-foo-py", language="python"))),
                                  ("its kernel 'conda-env-foo-py' is not installed", "Choose the kernel Python 3 (ipykernel)")),
    "kernel is a virtual environment": (book(PARAMS, metadata=dict(META, kernelspec=dict(name=".venv", language="python"))),
                                        ("its kernel '.venv'", "install this kernel on the workers")),
    "name of the kernel is a number": (book(PARAMS, metadata=dict(META, kernelspec=dict(name=5))), ("its kernel 5",)),
    "no id": (book(PARAMS, metadata=dict(myspinbot={})), ("no `id`",)),
    "id with a blank": (book(PARAMS, metadata=about(id="Bad one")), ("id='Bad one'",)),
    "unknown field": (book(PARAMS, metadata=about(timeot_s=5)), ("timeot_s=5", "Did you mean timeout_s?")),
    "field named where": (book(PARAMS, metadata=about(where="x")), ("where='x'",)),
    "outputs is a list": (book(PARAMS, metadata=about(outputs=[])), ("outputs=[]",)),
    "output of no type": (book(PARAMS, metadata=about(outputs=dict(v="Picture"))), ("output 'v'", "Unknown type 'Picture'")),
    "output named like a path": (book(PARAMS, metadata=about(outputs={"../x": "str"})), ("outputs",)),
    "negative timeout": (book(PARAMS, metadata=about(timeout_s=-1)), ("timeout_s=-1", "greater than 0")),
    "id of another step": (book(PARAMS, metadata=about(id="toy.mark")), ("its id 'toy.mark' is that of", "another id")),
    "id of a control step": (book(PARAMS, metadata=about(id="flow.approve")), ("a control step", "another id")),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path: return shutil.copytree(TOYS, tmp_path / "pipelines")


@pytest.mark.parametrize("name", BAD)
def test_broken_step_is_named_and_the_others_are_there(name: str, folder: Path) -> None:
    content, words = BAD[name]
    (folder / "steps" / "zz_bad_one.ipynb").write_bytes(content)
    cat = Catalogue(folder)
    assert "toy.mark" in cat.steps() and "bad.one" not in cat.steps() and set(cat.graphs()[0]) == {"branches", "fan"}
    (where, e), = ((w, e) for w, e in cat.errors().items() if w.endswith(".ipynb"))
    assert where.endswith("zz_bad_one.ipynb") and isinstance(e, NotebookError) and e.hint
    assert all(w in str(e).replace("zz.bad_one", "bad.one") for w in ("zz_bad_one.ipynb", *words)), str(e)
    assert len(str(e)) < 500
    (folder / "steps" / "zz_bad_one.ipynb").unlink()
    assert not [w for w in cat.errors() if w.endswith(".ipynb")]


def test_things_that_are_no_files_do_not_hide_the_others(folder: Path) -> None:
    steps = folder / "steps"
    (steps / "a_folder.ipynb").mkdir()
    (steps / "a_link.ipynb").symlink_to("/nowhere/x.ipynb")
    (steps / "a_circle.ipynb").symlink_to(steps / "a_circle.ipynb")
    os.mkfifo(steps / "a_pipe.ipynb")
    cat = Catalogue(folder)
    assert "toy.mark" in cat.steps()
    named = {Path(w).name for w in cat.errors() if w.endswith(".ipynb")}
    assert named == {f"a_{k}.ipynb" for k in ("folder", "link", "circle", "pipe")}
    assert all(e.hint for w, e in cat.errors().items() if w.endswith(".ipynb"))


def test_sound_but_unusual_notebooks_are_steps(folder: Path) -> None:
    good = {"magics": book(PARAMS, code("%matplotlib inline\n!true\nfiles = !ls\nx?"), metadata=about()),
            "await": book(PARAMS, code("import asyncio\nawait asyncio.sleep(0)"), metadata=about()),
            "outputs of unknown types": book(dict(PARAMS, outputs=[dict(output_type="hologram"), 7, None]), metadata=about()),
            "no ids, no tags": book(PARAMS, dict(cell_type="code", source=["y = 2\n", "z = 3"]), metadata=about()),
            "cell of an unknown type": book(PARAMS, dict(cell_type="poem", source="x"), metadata=about())}
    for name, content in good.items():
        (folder / "steps" / "bad_one.ipynb").write_bytes(content)
        cat = Catalogue(folder)
        assert "bad.one" in cat.steps(), (name, cat.errors())


def test_kernel_that_is_installed_later_makes_its_notebook_a_step(folder: Path, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dict(name="mine", language="python", display_name="Mine")
    (folder / "steps" / "bad_one.ipynb").write_bytes(book(PARAMS, metadata=dict(META, kernelspec=spec)))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    cat, graph = Catalogue(folder), Graph(name="g", nodes=(Node(id="a", step="bad.one"),))
    with pytest.raises(GraphError, match="kernel 'mine' is not installed here"): validate_graph(graph, cat)
    (place := tmp_path / "jupyter" / "kernels" / "mine").mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (place / "kernel.json").write_text(json.dumps(dict(argv=argv, display_name="Mine", language="python")))
    validate_graph(graph, cat)
    assert not [w for w in cat.errors() if w.endswith(".ipynb")]


def test_asking_for_a_broken_step_gives_its_reason_and_for_another_the_list(folder: Path) -> None:
    (folder / "steps" / "bad_one.ipynb").write_bytes(b"")
    cat = Catalogue(folder)
    with pytest.raises(NotebookError, match="bad_one.ipynb is empty"): cat.step("bad.one")
    with pytest.raises(NotFound, match="Unknown step 'bad.two'.*Not readable: bad_one.ipynb"): cat.step("bad.two")


PIPELINES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("is empty",)),
    "no cell tagged": (book(code("x = 1")), ("no cell is tagged `pipeline`",)),
    "syntax error": (book(code("p = = 1", "pipeline")), ("cell 1, line 1", "SyntaxError")),
    "NUL": (book(code("p = '\0'", "pipeline")), ("cell 1, line 1", "null bytes")),
    "raises": (book(code("\n1 / 0", "pipeline")), ("cell 1, line 2", "ZeroDivisionError")),
    "leaves": (book(code("import sys\nsys.exit(3)", "pipeline")), ("cell 1, line 2", "SystemExit: 3")),
    "without end": (book(code("def f(): f()\nf()", "pipeline")), ("cell 1, line", "RecursionError")),
    "builds nothing": (book(code("x = 1", "pipeline")), ("no object has a `to_graph()`",)),
    "unknown step": (book(code("from myspinbot import Pipeline\np = Pipeline('p')\np.step('no.such')", "pipeline")),
                     ("no.such",)),
    "too many steps": (book(code("from myspinbot import Pipeline\np = Pipeline('p')\n"
                                 "for i in range(1001): p.step('toy.mark', id=f'n{i}')", "pipeline")), ("1001 items", "1000")),
    "to_graph gives a number": (book(code("class P:\n    def to_graph(self): return 5\np = P()", "pipeline")), ("5",)),
    "to_graph raises": (book(code("class P:\n    def to_graph(self): return 1 / 0\np = P()", "pipeline")),
                        ("ZeroDivisionError",)),
}


def test_broken_pipelines_are_named_and_the_others_work(folder: Path) -> None:
    for i, (content, _) in enumerate(PIPELINES.values()): (folder / f"bad{i}.ipynb").write_bytes(content)
    (folder / "folder.ipynb").mkdir()
    graphs, errors = Catalogue(folder).graphs()
    assert set(graphs) == {"branches", "fan"} and len(errors) == len(PIPELINES) + 1
    for i, (name, (_, words)) in enumerate(PIPELINES.items()):
        e = errors[f"bad{i}"]
        assert isinstance(e, SpinError) and e.message and e.hint and all(w in str(e) for w in words), (name, str(e))


def cli(f: Farm, *args: str, code: int = 0) -> tuple[str, str]:
    r = subprocess.run([sys.executable, "-m", "myspinbot", *args], env=f.env, capture_output=True, text=True, timeout=120,
                       check=False)
    assert r.returncode == code and "Traceback" not in r.stderr, (args, r.returncode, r.stdout, r.stderr)
    return r.stdout, r.stderr


def test_a_whole_installation_works_beside_broken_notebooks(farm: Callable[..., Farm], folder: Path) -> None:
    (folder / "steps" / "bad_one.ipynb").write_bytes(b"[" * 100_000)
    (folder / "steps" / "bad_two.ipynb").mkdir()
    (folder / "steps" / "bad_three.ipynb").write_bytes(BAD["kernel of another machine"][0].replace(b"bad.one", b"bad.three"))
    (folder / "broken.ipynb").write_bytes(PIPELINES["leaves"][0])
    up = farm(folder)
    up.start("control")
    up.start("w1")
    assert up.done(up.client.submit("fan").id).status == "succeeded" and set(up.client.pipelines()) == {"branches", "fan"}
    with pytest.raises(NotebookError, match="broken.ipynb, cell 1"): up.client.submit("broken")
    with pytest.raises(SpinError, match="bad_one.ipynb is no notebook"):
        up.client.submit(dict(name="g", nodes=[dict(id="a", step="bad.one")]))
    with pytest.raises(SpinError, match="bad_three.ipynb: its kernel 'conda-env-foo-py' is not installed"):
        up.client.submit(dict(name="g", nodes=[dict(id="a", step="bad.three")]))
    assert len(up.client.jobs()) == 1
    for args in (("pipelines",), ("pipelines", "--json"), ("steps",), ("steps", "--json")):
        said, told = cli(up, *args)
        assert ("fan" in said or "toy.mark" in said) and ("bad_one.ipynb" in told or "broken.ipynb" in told)
    said, _ = cli(up, "doctor", code=1)
    assert all(w in said for w in ("bad_one.ipynb", "bad_two.ipynb", "bad_three.ipynb", "broken.ipynb", "is no notebook",
                                   "conda-env-foo-py", "SystemExit"))
    http = http_of(up.client)
    assert http.get("/pipelines").json()["broken"]["error"]["type"] == "NotebookError"
    assert "toy.mark" in {s["id"] for s in http.get("/steps").json()}
    assert all(p.poll() is None for p in up.procs.values())


@pytest.mark.parametrize("meets", ["worker", "conductor"])
def test_notebook_that_breaks_after_the_submit_fails_its_step_with_the_reason(meets: str, farm: Callable[..., Farm],
                                                                               folder: Path) -> None:
    up, step = farm(folder), folder / "steps" / "toy_mark.ipynb"
    if meets == "worker": up.start("control")
    job = up.client.submit("fan", dict(names=["a"])).id
    if meets == "worker": wait_for("the step is queued", lambda: (s := up.step(job, "marks[0]")) and s.status == "queued")
    good = step.read_bytes()
    step.write_bytes(b"" if meets == "worker" else good.replace(b'"parameters"', b'"parametres"'))
    if meets == "conductor": up.start("control")
    up.start("w1")
    ended = up.done(job)
    words = "toy_mark.ipynb is empty" if meets == "worker" else "toy_mark.ipynb: no cell is tagged `parameters`"
    assert ended.status == "failed" and words in ended.error["message"] and ended.error["hint"], ended.error
    step.write_bytes(good)
    up.client.retry(job)
    assert up.done(job).status == "succeeded" and all(p.poll() is None for p in up.procs.values())


def test_50_mb_of_outputs_in_the_file_cost_no_memory_and_no_time_per_run(farm: Callable[..., Farm], folder: Path) -> None:
    step = folder / "steps" / "toy_mark.ipynb"
    nb = json.loads(step.read_bytes())
    nb["cells"][-1]["outputs"] = [dict(output_type="stream", name="stdout", text="x" * 1_000_000) for _ in range(50)]
    step.write_text(json.dumps(nb))
    assert step.stat().st_size > 50_000_000
    cat = Catalogue(folder)
    assert "toy.mark" in cat.steps()
    tracemalloc.start()
    kept = Catalogue(folder)
    kept.steps()
    assert tracemalloc.get_traced_memory()[0] < 5 * 2**20
    tracemalloc.stop()
    up = farm(folder)
    up.start("control")
    up.start("w1")
    job = up.done(up.client.submit("fan").id)
    assert job.status == "succeeded", job.error
    assert up.client.store.fetch(up.step(job.id, "marks[0]").notebook, folder, "done.ipynb").stat().st_size < 1_000_000


def test_worker_ends_what_its_steps_say_and_how_they_leave_as_by_hand(farm: Callable[..., Farm], folder: Path) -> None:
    for name in ("leaves", "mumbles"):
        shutil.copy(Path(__file__).parents[1] / "notebooks" / f"step_{name}.ipynb", folder / "steps" / f"toy_{name}.ipynb")
    up = farm(folder)
    up.start("control")
    up.start("w1")
    def run(step: str, *outputs: str, **inputs: Any) -> Any:
        out = {k: dict(kind="port", node="it", port=k) for k in outputs}
        return up.done(up.client.submit(dict(name="one", nodes=[dict(id="it", step=step, inputs=inputs)], outputs=out)).id)
    left = run("toy.leaves", "word")
    assert left.status == "succeeded" and left.outputs == dict(word="published")
    mumbled = run("toy.mumbles", "word", "table")
    assert mumbled.status == "succeeded" and mumbled.outputs == dict(word="a 😀 \ufffd \ufffd b", table={"k\ufffd": ["\ufffd"]})
    failed = run("toy.mumbles", fail=True)
    row = up.step(failed.id, "it")
    assert failed.status == "failed" and row.attempt == 1
    assert row.error["type"] == "GateFailed" and row.error["message"] == "bad \ufffd \ufffd", "as PostgreSQL can hold it"
    said = [e.body.get("text") for _, e in up.client.events.read(mumbled.id) if e.kind == "log"]
    assert "logs \ufffd and \0" in said and "escaped \ufffd" in said
    assert all(p.poll() is None for p in up.procs.values()) and "Traceback" not in up.log("w1")
