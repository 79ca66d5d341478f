"What a worker holds in memory before it looks for work: its servers' clients, and nothing that only a running notebook needs."
import os
import subprocess
import sys
from pathlib import Path

LATER = ("papermill", "nbclient", "ipykernel", "zmq", "IPython", "langgraph", "numpy", "PIL", "cv2", "torch", "av", "minio",
         "matplotlib", "fastapi", "uvicorn")
CONNECT = f"""
import sys
from myspinbot.api.client import Client, migrate_journal
from myspinbot.jobs.worker import Worker
migrate_journal()
with Client() as c:
    w = Worker(c.journal, c.bridge, c.events, c.store, c.catalogue, "weight:0", c.cfg)
    assert w.pending(__import__("threading").Event()) == []
    print(sorted(set({LATER!r}) & set(sys.modules)))
"""


def test_a_connected_worker_loads_nothing_that_only_a_running_notebook_needs(tmp_path: Path, redis_url: str, postgres_url: str):
    env = os.environ | dict(SPIN_HOME=str(tmp_path), SPIN_REDIS_URL=redis_url, SPIN_POSTGRES_URL=postgres_url)
    done = subprocess.run([sys.executable, "-c", CONNECT], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"
