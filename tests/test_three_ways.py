"""Each step notebook gives the same result by Run All in a plain kernel, by the papermill command, and on a worker."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from myspinbot.graph.catalogue import Catalogue
from myspinbot.core import hash_file
from myspinbot.jobs.local import LocalRunner
from myspinbot.schema import MEDIA, Artifact, Graph, Node, PortRef

ROOT = Path(__file__).parent.parent
CATALOGUE = Catalogue(ROOT / "pipelines")
BEFORE = {  # what the worker runs first, in the same kernel if that is a resident one
    "portrait.prepare": dict(size=256, upscaler="none"), "speech.piper": dict(text="Quite another sentence.", seed=3),
    "portrait.talk": dict(seed=1, motion=0.5), "video.check": dict(min_sync=0.1),
}
NOTEBOOKS = sorted(p.stem for p in (ROOT / "pipelines" / "steps").glob("*.ipynb"))


def plain(value): return {"sha256": value.sha256} if isinstance(value, Artifact) else value


def left_in(folder: Path, spec) -> dict:
    "The outputs that a notebook run by hand left: files as their hashes."
    out = json.loads((folder / spec.id / "outputs.json").read_text())
    kept = {k for k, form in spec.outputs.items() if "/" in form or form in MEDIA}
    return {k: {"sha256": hash_file(folder / spec.id / v)} if k in kept else v for k, v in out.items()}


def run_all(path: Path, cwd: Path) -> None:
    nb = nbformat.read(path, 4)
    NotebookClient(nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(cwd)}}).execute()


def papermill_command(path: Path, cwd: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "papermill", str(path), "out.ipynb", "-k", "python3", "--no-progress-bar"],
                          cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory): return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_step_notebook_gives_one_result_three_ways(stem, farm, tmp_path, monkeypatch):
    path = ROOT / "pipelines" / "steps" / f"{stem}.ipynb"
    spec = next(s for s in CATALOGUE.steps().values() if s.kind == "notebook" and CATALOGUE.notebook(s.id) == path)
    monkeypatch.delenv("SPIN_STEP_DIR", raising=False)
    results = {}
    for name, way in dict(run_all=run_all, papermill=papermill_command).items():
        cwd = tmp_path / name
        cwd.mkdir()
        way(path, cwd)
        results[name] = left_in(cwd / "spin-steps", spec)

    f = farm(ROOT / "pipelines")
    f.start("control")
    f.start("w1")
    before = Node(id="before", step=spec.id, inputs=BEFORE[spec.id])
    g = Graph(name="one", nodes=(before, Node(id="it", step=spec.id, after=("before",))),
              outputs={k: PortRef(node="it", port=k) for k in spec.outputs})
    job = f.done(f.client.submit(g).id)
    assert job.status == "succeeded", job.error
    results["worker"] = {k: plain(v) for k, v in job.outputs.items()}

    assert set(results["worker"]) == set(spec.outputs)
    assert results["run_all"] == results["papermill"] == results["worker"]
    kernel = f.step(job.id, "it").record["kernel"]
    assert (kernel["kind"], kernel["runs"]) == (spec.kernel, 2 if spec.kernel == "resident" else 1)


def test_pipeline_notebook_runs_by_papermill_and_plays_its_video(tmp_path):
    out = tmp_path / "out.ipynb"
    env = os.environ | dict(SPIN_HOME=str(tmp_path / "home"))
    subprocess.run([sys.executable, "-m", "papermill", str(ROOT / "pipelines" / "talking_portrait.ipynb"), str(out),
        "-k", "python3", "-p", "text",
                    "Papermill says hello.", "-p", "size", "256", "--no-progress-bar"], cwd=tmp_path, env=env, check=True,
                   capture_output=True, timeout=400)
    nb = nbformat.read(out, 4)
    html = "".join(str(o.get("data", {}).get("text/html", "")) for c in nb.cells if c.cell_type == "code" for o in c.outputs)
    assert "<video" in html and "data:video/mp4;base64," in html
    assert "Papermill says hello." in next(c.source for c in nb.cells if "injected-parameters" in c.metadata.get("tags", []))


BESIDE = {
    "helper.py": "import near\nVALUE = near.VALUE\n", "near.py": "VALUE = 1\n",
    "script.py": "import near\nSCRIPTED = near.VALUE * 10\n",
    "tools/deep.py": "import only_there\nDEEP = only_there.VALUE\n", "tools/only_there.py": "VALUE = 7\n",
    "prompt.txt": "Speak slowly.", "prompts/a.txt": "And clearly."}
CELLS = ["from myspinbot import Step\nstep = Step('toy.beside')", "import helper\n%run script.py", "%run -i tools/deep.py",
         "said = [open('prompt.txt').read(), step.file('prompts/a.txt').read_text()]",
         "values = [helper.VALUE, SCRIPTED, DEEP]",
         "step.path('all.json').write_text(f'{{\"said\": \"{said}\", \"values\": {values}}}')",
         "step.output(all=step.path('all.json'))"]


def beside(root: Path, *cells: str, files: tuple[str, ...] = ("prompt.txt", "prompts/*.txt")) -> Path:
    "A pipelines folder with a step that uses all kinds of things that lie beside its notebook."
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
    for name, text in BESIDE.items():
        (root / "steps" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "steps" / name).write_text(text)
    parameters = new_code_cell("text: str = ''  # said", metadata=dict(tags=["parameters"]))
    about = dict(id="toy.beside", outputs=dict(all="application/json"), files=list(files))
    nb = new_notebook(cells=[new_markdown_cell("# Toy\n\nA toy."), parameters, *map(new_code_cell, cells or CELLS)],
        metadata=dict(myspinbot=about, kernelspec=dict(name="python3", display_name="p", language="python")))
    nbformat.write(nb, root / "steps" / "toy_beside.ipynb")
    return root


def one(id: str) -> Graph:
    return Graph(name="one", nodes=(Node(id="it", step=id),), outputs=dict(all=PortRef(node="it", port="all")))


def test_what_lies_beside_a_notebook_is_there_in_all_ways(farm, tmp_path, monkeypatch):
    monkeypatch.delenv("SPIN_STEP_DIR", raising=False)
    pipelines, results = beside(tmp_path / "pipelines"), {}
    path = pipelines / "steps" / "toy_beside.ipynb"
    for name, way in dict(run_all=run_all, papermill=papermill_command).items():
        cwd = tmp_path / name
        shutil.copytree(path.parent, cwd)
        monkeypatch.setenv("SPIN_PIPELINES_DIR", str(pipelines))
        way(cwd / path.name, cwd)
        results[name] = (cwd / "spin-steps" / "toy.beside" / "all.json").read_bytes()
    monkeypatch.delenv("SPIN_PIPELINES_DIR")
    runner = LocalRunner(Catalogue(pipelines), tmp_path / "home")
    try: run = runner.run(one("toy.beside"), {})
    finally: runner.close()
    assert run.job.status == "succeeded", run.job.error
    results["here"] = runner.store.open(run.job.outputs["all"]).read()
    f = farm(pipelines)
    f.start("control")
    f.start("w1")
    def submitted() -> bytes:
        job = f.done(f.client.submit(one("toy.beside"), {}).id)
        assert job.status == "succeeded", job.error
        return f.client.store.open(job.outputs["all"]).read()
    results["worker"] = submitted()
    assert b"Speak slowly" in results["worker"] and b"[1, 10, 7]" in results["worker"]
    assert len(set(results.values())) == 1, results
    (pipelines / "steps" / "near.py").write_text("VALUE = 222\n")
    (pipelines / "steps" / "prompt.txt").write_text("Speak fast, please.")
    assert b"[222, 2220, 7]" in (again := submitted()) and b"Speak fast" in again


def test_a_run_cannot_harm_the_files_beside_its_notebook_and_is_told_how_to_declare_one(tmp_path):
    ruin = "import os\nfor o in ('prompt.txt', 'script.py'):\n    os.chmod(o, 0o600)\n    open(o, 'w').write('ruined')"
    end = "step.path('all.json').write_text('{}')\nstep.output(all=step.path('all.json'))"
    pipelines = beside(tmp_path / "pipelines", CELLS[0], "%run script.py", ruin, end)
    runner = LocalRunner(Catalogue(pipelines), tmp_path / "home")
    def failure(*cells: str) -> dict:
        beside(tmp_path / "pipelines", CELLS[0], *cells, end, files=("prompts/*.txt",))
        return runner.run(one("toy.beside"), {}).job.error
    try:
        assert runner.run(one("toy.beside"), {}).job.status == "succeeded"
        for name in ("prompt.txt", "script.py"): assert (pipelines / "steps" / name).read_text() == BESIDE[name]
        said = 'Declare it: add "prompt.txt" to `files` in the notebook\'s metadata `myspinbot`.'
        assert failure("open('prompt.txt').read()")["hint"] == said
        assert failure("from pathlib import Path\nPath('prompt.txt').absolute().read_text()")["hint"] == said
        assert failure("step.file('prompt.txt')")["hint"] == said
        assert failure("name = 'script.py'\n%run $name")["hint"] == said.replace("prompt.txt", "script.py")
        assert "Declare" not in failure("open('nowhere.txt')")["hint"]
    finally: runner.close()
