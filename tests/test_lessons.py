"""Every notebook in nbs/ runs from top to bottom, each in a process of its own; its asserts are the lessons."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
LIMIT_S = 240
RUN = "import sys; from nbdev.test import test_nb; sys.exit(not test_nb(sys.argv[1])[0])"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: str(p.relative_to(NBS).with_suffix("")))
def test_lessons_hold(notebook: Path, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SPIN_")} | dict(SPIN_HOME=str(tmp_path / "home"))
    run = subprocess.Popen([sys.executable, "-c", RUN, str(notebook)], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)
    try: told, _ = run.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, 9)
        told, _ = run.communicate()
        pytest.fail(f"{notebook.name} ran longer than {LIMIT_S} s:\n{told[-4000:]}")
    assert run.returncode == 0, f"{notebook.name}:\n{told[-6000:]}"
