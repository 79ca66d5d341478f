"""Each step notebook gives the same result by Run All in a plain kernel, by the papermill command, and on a worker."""
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from myspinbot.catalogue import Catalogue
from myspinbot.core import hash_file
from myspinbot.schema import Artifact, Graph, Node, PortRef

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
    return {k: {"sha256": hash_file(folder / spec.id / v)} if "/" in spec.outputs[k] else v for k, v in out.items()}


def run_all(path: Path, cwd: Path) -> None:
    nb = nbformat.read(path, 4)
    NotebookClient(nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(cwd)}}).execute()


def papermill_command(path: Path, cwd: Path) -> None:
    subprocess.run([sys.executable, "-m", "papermill", str(path), "out.ipynb", "-k", "python3", "--no-progress-bar"],
        cwd=cwd, check=True,
                   capture_output=True, timeout=300)


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
