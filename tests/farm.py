"""A small installation of real processes for the scenario tests: control and workers against the test run's servers."""
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from myspinbot.api.client import Client, migrate_journal
from myspinbot.core import Settings

HERE = Path(__file__).parent


def wait_for(what: str, fn: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    "The first true answer of `fn`; fails with `what` after the limit."
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if (answer := fn()): return answer
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s:g} s: {what}")


def http_of(client: Client, **options: Any) -> Any:
    "The HTTP API on a client, in this process, for a caller who has the token."
    from starlette.testclient import TestClient

    from myspinbot.api.http import create_app
    from myspinbot.api.doors import authorization
    app = create_app(client)
    return TestClient(app, base_url="http://127.0.0.1:8470", headers=authorization(client.cfg), **options)


class Farm:
    "Control and worker processes that a test starts, kills and looks into."
    def __init__(self, home: Path, redis_url: str, postgres_url: str, pipelines: Path, lease_s: float = 3.0,
        store_url: str = ""):
        from myspinbot.graph.catalogue import Catalogue
        self.home, self.procs, self.logs = home, {}, home / "logs"
        self.logs.mkdir(parents=True)
        self.witness = home / "witness.txt"
        self.cfg = Settings(home=home, redis_url=redis_url, postgres_url=postgres_url,
            store_url=store_url or (home / "store").as_uri(), pipelines_dir=str(pipelines),
                            lease_s=lease_s, scan_s=0.5, control_port=0)
        self.env = os.environ | dict(SPIN_HOME=str(home), SPIN_REDIS_URL=redis_url, SPIN_POSTGRES_URL=postgres_url,
            SPIN_STORE_URL=self.cfg.store_url.get_secret_value(),
                                     SPIN_PIPELINES_DIR=str(pipelines), SPIN_LEASE_S=str(lease_s), SPIN_SCAN_S="0.5",
                                     SPIN_CONTROL_PORT="0",
                                     SPIN_WITNESS=str(self.witness))
        migrate_journal(self.cfg)
        self.client = Client(self.cfg, Catalogue(pipelines))

    def start(self, name: str, program: Sequence[str] = (sys.executable, "-m", "myspinbot"),
              **env: str) -> subprocess.Popen:
        "Start `control`, `api`, or a worker under any other name; each life of a name appends to one log."
        args = ["api"] if name == "api" else ["control"] if name.startswith("control") else ["worker", "--name", name]
        said = len(self.log(name))
        with open(self.logs / f"{name}.log", "ab") as log:
            p = subprocess.Popen([*program, *args], env=self.env | env, stdout=log, stderr=log, start_new_session=True)
        self.procs[name] = p
        wait_for(f"{name} ready", lambda: "ready" in self.log(name)[said:] or p.poll() is not None)
        assert p.poll() is None, self.log(name)
        return p

    def log(self, name: str) -> str:
        f = self.logs / f"{name}.log"
        return f.read_text(errors="replace") if f.exists() else ""

    def kill(self, name: str) -> None:
        "SIGKILL: the process has no chance to say anything."
        p = self.procs.pop(name)
        p.send_signal(signal.SIGKILL)
        p.wait()

    def step(self, job: str, key: str) -> Any:
        return next((r for r in self.client.steps(job) if r.key == key), None)

    def done(self, job: str, timeout_s: float = 120.0) -> Any:
        "The ended job; the logs are in the failure's message."
        try: return self.client.wait(job, timeout_s)
        except TimeoutError as e:
            states = {r.key: (r.status, r.attempt) for r in self.client.steps(job)}
            raise AssertionError(f"{e} {states}\n" + "\n".join(f"--- {n}\n{self.log(n)[-3000:]}" for n in ["control",
                *self.procs])) from e

    def runs(self) -> list[list[str]]:
        "What the toy steps wrote: name, word, pid, time."
        return [line.split() for line in self.witness.read_text().splitlines()] if self.witness.exists() else []

    def close(self) -> None:
        for p in self.procs.values(): p.terminate()
        for p in self.procs.values():
            try: p.wait(30)
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()
        self.client.close()
