"""Odd parameters by `papermill -p`, with our engine and with a pipeline in the notebook."""
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

HERE = Path(__file__).parent
PRINTS = HERE.parent / "notebooks" / "prints_its_parameter.ipynb"
TOYS = HERE.parent / "pipelines"


def papermill(tmp_path: Path, notebook: Path, *args: str, code: int = 0) -> tuple[str, Path]:
    out = tmp_path / "out.ipynb"
    env = os.environ | dict(SPIN_HOME=str(tmp_path / "home"), SPIN_PIPELINES_DIR=str(TOYS), SPIN_WITNESS=str(tmp_path / "w"))
    r = subprocess.run([sys.executable, "-m", "papermill", "--engine", "spin", str(notebook), str(out), *args], env=env,
                       capture_output=True, text=True, timeout=200, check=False)
    assert r.returncode == code, (args, r.returncode, r.stdout[-2000:], r.stderr[-3000:])
    return r.stdout + r.stderr, out


def test_texts_that_look_like_code_arrive_as_text(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    texts = [f"__import__('os').system('touch {trap}')",
             f"'''+str(open('{trap}','w'))+'''", '"""', "\\", "a\nb\r\t", f"$(touch {trap})",
             "{{ 7 * 7 }} {0} %s ${HOME}", f"!touch {trap}", "\u2028\x85\x7f", "ünï 😀 مرحبا", "\\N{BULLET}", "#'\""]
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(dict(n=texts), allow_unicode=True))
    _, out = papermill(tmp_path, PRINTS, "-f", str(file))
    assert json.loads(nbformat.read(out, 4).cells[-1].outputs[0].text) == texts and not trap.exists()
    _, out = papermill(tmp_path, PRINTS, "-r", "n", texts[0])
    assert json.loads(nbformat.read(out, 4).cells[-1].outputs[0].text) == texts[0] and not trap.exists()


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    "The toy pipeline with a cell that runs it on its parameters."
    nb = nbformat.read(TOYS / "fan.ipynb", 4)
    nb.cells += [nbformat.v4.new_code_cell("import myspinbot.api.run\nrun = p.run(names=names)\nprint(run.outputs)")]
    nbformat.write(nb, tmp_path / "fan.ipynb")
    return tmp_path / "fan.ipynb"


def test_bad_parameter_of_a_pipeline_is_in_the_error_and_in_the_saved_notebook(pipeline: Path, tmp_path: Path) -> None:
    for args, words in ((("-p", "names", "abc"), ("names takes list", "'abc' (str)", "Give a list")),
                        (("-y", "names: [.nan]"), ("names[0] is NaN",))):
        said, out = papermill(tmp_path, pipeline, *args, code=1)
        assert "InputError" in said and all(w in said for w in words), said[-2000:]
        last = nbformat.read(out, 4).cells[-1].outputs[-1]
        assert last.ename == "InputError" and all(w in last.evalue for w in words)
    assert not (tmp_path / "w").exists(), "no step has run"
