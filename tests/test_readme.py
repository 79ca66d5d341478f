"""The README's lines run as they stand: its bash blocks in a copy of the checkout, its Python blocks beside `myspinbot up`."""
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return os.environ | dict(SPIN_HOME=str(tmp_path / "home"), SPIN_CONTROL_PORT="0", SPIN_DASHBOARDS_PORT="0",
                             PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def checkout(tmp_path: Path) -> Path:
    for d in ("pipelines", "dashboards"): shutil.copytree(ROOT / d, tmp_path / "copy" / d)
    return tmp_path / "copy"


def test_there_are_blocks_for_every_way() -> None:
    text = "\n".join(b for _, b in BLOCKS)
    for word in ("p.run(", "papermill ", "myspinbot batch", "myspinbot up", "Client()"): assert word in text, word


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [i for i, (kind, _) in enumerate(BLOCKS) if kind == "bash"])
def test_bash_block_runs(number: int, env: dict[str, str], tmp_path: Path) -> None:
    script = "set -euo pipefail\n" + BLOCKS[number][1]
    try: r = subprocess.run(["bash", "-c", script], cwd=checkout(tmp_path), env=env, capture_output=True, text=True,
                            timeout=580, check=False)
    finally: subprocess.run([sys.executable, "-m", "myspinbot", "down"], env=env, capture_output=True, check=False)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [i for i, (kind, _) in enumerate(BLOCKS) if kind == "python"])
def test_python_block_runs(number: int, env: dict[str, str], tmp_path: Path) -> None:
    me, code = [sys.executable, "-m", "myspinbot"], BLOCKS[number][1]
    up = None
    if "Client(" in code:
        with open(tmp_path / "up.log", "w") as log:
            up = subprocess.Popen([*me, "up", "--no-dashboards"], env=env, stdout=log, stderr=log)
        end = time.monotonic() + 90
        while subprocess.run([*me, "status"], env=env, capture_output=True, check=False).returncode:
            assert up.poll() is None and time.monotonic() < end, (tmp_path / "up.log").read_text()
            time.sleep(0.5)
    try:
        r = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True,
                           timeout=400, check=False)
        assert r.returncode == 0, r.stderr[-3000:]
        if up: assert r.stdout.startswith("succeeded") and Path(r.stdout.split()[-1]).is_file()
    finally:
        if up:
            up.terminate()
            assert up.wait(60) == 0
