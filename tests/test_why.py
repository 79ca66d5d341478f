"""What a stored result depends on, and why a step ran: edits as people make them, by `Pipeline.run` and on real workers."""
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import nbformat
import pytest
from farm import http_of
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from myspinbot.graph.catalogue import Catalogue
from myspinbot.executor.attempt import completed
from myspinbot.api.run import run_html
from myspinbot.jobs.local import LocalJob, LocalRunner
from myspinbot.schema import Graph, Node, ParamRef, Port, PortRef
from myspinbot.graph.spec import NotebookError

USES = "import helper\nstep.output(value=f'{text} {helper.VALUE}')"


def write_step(folder: Path, *cells: str, id: str = "toy.helped", **info: Any) -> Path:
    "A step with the parameter `text` and the output `value`."
    made = [new_markdown_cell("# Toy\n\nA toy."), new_code_cell("text: str = 'a'  # said", metadata=dict(tags=["parameters"])),
            new_code_cell(f"from myspinbot import Step\nstep = Step({id!r})"), *map(new_code_cell, cells)]
    about = {"id": id, "outputs": dict(value="any"), **info}
    kernel = dict(name="python3", display_name="p", language="python")
    nb = new_notebook(cells=made, metadata=dict(myspinbot=about, kernelspec=kernel))
    path = folder / "steps" / f"{id.replace('.', '_')}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


def graph(id: str = "toy.helped", name: str = "toy") -> Graph:
    return Graph(name=name, params=[Port(name="text", type="str", default="a")], nodes=[Node(id="it", step=id,
        inputs=dict(text=ParamRef(name="text")))], outputs=dict(value=PortRef(node="it", port="value")))


class Runs:
    "Runs of one pipeline here."
    def __init__(self, folder: Path):
        self.folder, self.steps = folder, folder / "pipelines" / "steps"
        self.runner = LocalRunner(Catalogue(folder / "pipelines"), folder / "home")

    def __call__(self, text: str = "a", no_cache: tuple[str, ...] = (), id: str = "toy.helped") -> LocalJob:
        lj = self.runner.run(graph(id), dict(text=text), no_cache=no_cache)
        assert lj.job.status == "succeeded", lj.job.error
        return lj


def ran(lj: LocalJob) -> tuple[str, Any]: return lj.rows["it"].status, lj.job.outputs["value"]


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    r = Runs(tmp_path)
    yield r
    r.runner.close()


def test_an_edited_helper_module_makes_new_results(runs: Runs) -> None:
    write_step(runs.folder / "pipelines", USES)
    (runs.steps / "helper.py").write_text("VALUE = 1\n")
    assert ran(runs()) == ("succeeded", "a 1") and ran(runs()) == ("cached", "a 1")
    (runs.steps / "helper.py").write_text("VALUE = 222\n")
    again = runs()
    assert ran(again) == ("succeeded", "a 222") and again.why["it"] == ["module helper changed"]
    new = runs("b")
    assert ran(new) == ("succeeded", "b 222") and new.why["it"] == ["parameter text changed: 'a' -> 'b'"]
    (runs.steps / "helper.py").write_text("VALUE = 222  # better said\n\n")
    same = runs()
    assert ran(same) == ("cached", "a 222") and same.why["it"] == [f"cached: same key as job {again.job.id}, step it"]


def test_every_other_part_of_a_key_is_seen_and_named(runs: Runs) -> None:
    path = write_step(runs.folder / "pipelines", "%run script.py", USES, files=["prompts/*.txt"])
    (runs.steps / "helper.py").write_text("import deep\nVALUE = deep.VALUE\n")
    (runs.steps / "deep.py").write_text("VALUE = 1\n")
    (runs.steps / "script.py").write_text("SAID = 1\n")
    (runs.steps / "prompts").mkdir()
    (runs.steps / "prompts" / "a.txt").write_text("one")
    assert runs().why["it"] == ["first run of this step"]
    for file, text, said in (
            ("deep.py", "VALUE = 2", "module deep changed"), ("script.py", "SAID = 22", "script script.py changed"),
            ("prompts/a.txt", "two", "file prompts/a.txt changed"), ("prompts/b.txt", "three", "file prompts/b.txt is new")):
        (runs.steps / file).write_text(text)
        lj = runs()
        assert lj.rows["it"].status == "succeeded" and lj.why["it"] == [said]
        assert runs().rows["it"].status == "cached"
    (runs.steps / "prompts" / "b.txt").unlink()
    assert runs().rows["it"].status == "cached"  # as it was before
    path.write_text(path.read_text().replace("helper.VALUE}", "helper.VALUE}!"))
    assert runs().why["it"] == ["the notebook's cells changed", "file prompts/b.txt is gone"]
    assert runs(no_cache=("it",)).why["it"] == ["no_cache: the job asked for this step to run again"]
    write_step(runs.folder / "pipelines", USES, id="toy.never", cache=False)
    runs(id="toy.never")
    assert runs(id="toy.never").why["it"] == ["cache: false in the step's metadata"]
    assert "cache: false in the step&#x27;s metadata" in run_html((lj := runs(id="toy.never")).job, list(lj.rows.values()), lj.why)


def test_a_declared_file_must_be_there_and_stay_below_the_notebook(runs: Runs) -> None:
    catalogue = runs.runner.catalogue
    (runs.folder / "secret.txt").write_text("secret")
    for pattern, said in (("none.txt", "no such file"), ("*.md", "no such file"), ("../secret.txt", "leads out of"),
                          ("/etc/passwd", "leads out of"), ("link.txt", "link out of"),
                          ("outputs.json", "a run writes that file")):
        path = write_step(runs.folder / "pipelines", USES, files=[pattern])
        for name in ("link.txt", "outputs.json"): (path.parent / name).unlink(missing_ok=True)
        (path.parent / "link.txt").symlink_to(runs.folder / "secret.txt")
        (path.parent / "outputs.json").write_text("{}")
        with pytest.raises(NotebookError, match=said) as e: catalogue.step("toy.helped")
        assert repr(pattern) in str(e.value)
    write_step(runs.folder / "pipelines", USES, files=["late/*.txt"])
    with pytest.raises(NotebookError, match="no such file"): catalogue.step("toy.helped")
    (runs.steps / "late").mkdir()
    (runs.steps / "late" / "a.txt").write_text("here")
    assert catalogue.step("toy.helped").files == ("late/*.txt",)


def test_what_a_run_imported_by_a_computed_name_counts_from_then_on(runs: Runs) -> None:
    write_step(runs.folder / "pipelines", "import importlib\nm = importlib.import_module('hel' + 'per2')",
               "step.output(value=m.VALUE)")
    (runs.steps / "helper2.py").write_text("VALUE = 1\n")
    first = runs()
    assert ran(first) == ("succeeded", 1)
    found_out = "it imported helper2, which its key did not know: counted from the next run on"
    assert first.why["it"] == ["first run of this step", found_out]
    assert first.rows["it"].record["imported_more"] == dict(modules=["helper2"], packages=[])
    assert ran(runs()) == ("cached", 1)
    (runs.steps / "helper2.py").write_text("VALUE = 222\n")
    again = runs()
    assert ran(again) == ("succeeded", 222) and again.why["it"] == ["module helper2 changed"]
    assert "imported_more" not in again.rows["it"].record and ran(runs()) == ("cached", 222)


def test_a_package_imported_by_a_computed_name_is_learned_and_what_it_needs_is_not(runs: Runs) -> None:
    write_step(runs.folder / "pipelines", "import pydantic", "m = __import__('structl' + 'og')\nstep.output(value=1)")
    more = runs().rows["it"].record["imported_more"]
    assert more["modules"] == [] and "structlog" in more["packages"]
    assert not {"pydantic", "pydantic-core", "typing-extensions", "ipykernel", "pyzmq"} & set(more["packages"])
    assert runs().rows["it"].status == "cached" and "imported_more" not in runs("b").rows["it"].record


def test_a_source_that_changes_while_it_runs_is_not_reused(runs: Runs) -> None:
    write_step(runs.folder / "pipelines", USES,
               "import pathlib\npathlib.Path(helper.__file__).write_text('VALUE = 3333\\n')")
    (runs.steps / "helper.py").write_text("VALUE = 1\n")
    lj = runs()
    assert lj.rows["it"].input_hash == "" and "module helper changed while it ran" in lj.why["it"][-1]
    assert runs().rows["it"].status == "succeeded"


def test_a_result_is_stored_under_the_versions_that_made_it(runs: Runs) -> None:
    write_step(runs.folder / "pipelines", "import numpy\nstep.output(value=1)")
    catalogue = runs.runner.catalogue
    code, parts = catalogue.code("toy.helped")
    planned = parts | dict(packages=parts["packages"] | dict(numpy="0.1"))
    _, here = catalogue.code("toy.helped", dict(packages=planned["packages"]), here=True)
    found = completed(catalogue, catalogue.step("toy.helped"), dict(text="a"), planned, here, {})
    assert found["code"] == code and found["notes"] == dict(other_versions=[f"package numpy 0.1 -> {parts['packages']['numpy']}"])
    assert catalogue.code("toy.helped", dict(packages=dict(not_here="3.1")))[1]["packages"]["not_here"] == "3.1"


def cli(farm: Any, *args: str) -> str:
    run = subprocess.run([sys.executable, "-m", "myspinbot", *args], env=farm.env, capture_output=True, text=True, check=True)
    return run.stdout


def test_workers_say_why_and_see_every_edit(farm, tmp_path: Path) -> None:
    pipelines = tmp_path / "pipelines"
    write_step(pipelines, USES, "importer = __import__\nimporter('helper' + '2')", files=["prompts/a.txt"])
    steps = pipelines / "steps"
    (steps / "prompts").mkdir()
    for name, text in {"helper.py": "VALUE = 1\n", "helper2.py": "", "prompts/a.txt": "one"}.items():
        (steps / name).write_text(text)
    f = farm(pipelines)
    f.start("control")
    f.start("w1")
    def job(text: str = "a", **kw: Any) -> Any: return f.done(f.client.submit(graph(), dict(text=text), **kw).id)
    def why(j: Any) -> list[str]: return f.client.why(j.id, "it")["reasons"]
    first = job()
    assert first.outputs == dict(value="a 1")
    found_out = "it imported helper2, which its key did not know: counted from the next run on"
    assert why(first) == ["first run of this step", found_out]
    second = job()
    assert f.client.steps(second.id)[0].status == "cached" and why(second) == [f"cached: same key as job {first.id}, step it"]
    (steps / "helper.py").write_text("VALUE = 222\n")
    third = job()
    assert third.outputs == dict(value="a 222")
    assert why(third) == ["module helper changed", found_out]  # another source, of which no run has told anything yet
    (steps / "helper2.py").write_text("x = 1\n")
    fourth = job("b")
    assert fourth.outputs == dict(value="b 222")
    assert why(fourth) == ["module helper2 changed", "parameter text changed: 'a' -> 'b'"]
    assert why(job("b", no_cache=("it",))) == ["no_cache: the job asked for this step to run again"]
    told = cli(f, "why", fourth.id, "it")
    assert "module helper2 changed" in told and f"compared with {third.id}/it" in told
    assert json.loads(cli(f, "why", fourth.id, "it", "--json"))["reasons"] == why(fourth)

    with http_of(f.client) as http:
        answer: httpx.Response = http.get(f"/jobs/{fourth.id}/steps/it/why")
        assert answer.status_code == 200 and answer.json()["against"] == f"{third.id}/it"
        assert http.get(f"/jobs/{fourth.id}/steps/no/why").status_code == 404


def test_a_worker_with_another_helper_refuses_and_names_it(farm, tmp_path: Path) -> None:
    pipelines, other = tmp_path / "pipelines", tmp_path / "other"
    write_step(pipelines, USES)
    (pipelines / "steps" / "helper.py").write_text("VALUE = 1\n")
    shutil.copytree(pipelines, other)
    (other / "steps" / "helper.py").write_text("VALUE = 2\n")
    f = farm(pipelines)
    f.start("control")
    f.start("w1", SPIN_PIPELINES_DIR=str(other))
    job = f.client.wait(f.client.submit(graph(), {}).id, timeout_s=60)
    assert job.status == "failed" and "module helper changed" in job.error["message"] and "same checkout" in job.error["hint"]
