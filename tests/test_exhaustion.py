"""What one caller may cost: values, bytes, seconds, connections, disk; and that the conductor does not notice."""
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from conftest import free_port
from farm import Farm, http_of, wait_for
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from myspinbot.api.client import Client
from myspinbot.core import InputError
from myspinbot.api.doors import authorization
from myspinbot.store.retention import sweep_store, unreferenced
from myspinbot.schema import Artifact, Graph, Node, Port

TOYS = Path(__file__).parent / "pipelines"
JSON = {"Content-Type": "application/json"}
LISTS = b'{"pipeline": "fan", "params": {"names": [' + b",".join([b"[]"] * 2_600_000) + b"]}}"  # 7.8 MB


@pytest.fixture
def served(farm: Callable[..., Farm], request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    "`myspinbot api` in a process of its own; what its command line begins with as a parameter."
    f, port = farm(TOYS), free_port()
    before = getattr(request, "param", [])
    p = f.start("api", [*before, sys.executable, "-m", "myspinbot"], SPIN_CONTROL_PORT=str(port))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=authorization(f.cfg), timeout=30) as http:
        yield SimpleNamespace(farm=f, port=port, http=http, process=psutil.Process(p.pid))


def half_sent(port: int, held: ExitStack, how_many: int) -> list[socket.socket]:
    "Connections with half of a request's head."
    made = []
    for _ in range(how_many):
        try: s = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        except OSError: continue  # the server's queue is full just now
        s.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
        made.append(s)
    return made


def ended(s: socket.socket) -> bool:
    "Has the other end closed it?"
    s.setblocking(False)
    try: return s.recv(4096) == b""
    except BlockingIOError: return False
    except OSError: return True


def test_millions_of_values_are_refused_before_they_are_parsed(served: SimpleNamespace) -> None:
    post = lambda _: served.http.post("/jobs", content=LISTS, headers=JSON)
    served.http.get("/health")
    before, spent, began = served.process.memory_info().rss, served.process.cpu_times(), time.monotonic()
    with ThreadPoolExecutor(4) as pool: got = list(pool.map(post, range(4)))
    assert [r.status_code for r in got] == [413] * 4 and "more than 100,000 values" in got[0].json()["message"], got[0].text
    cpu = served.process.cpu_times()
    assert cpu.user + cpu.system - spent.user - spent.system < 4, "was 12 s for one"
    assert served.process.memory_info().rss - before < 120 * 2**20, "was 956 MB"
    assert time.monotonic() - began < 20
    assert served.farm.client.jobs() == []


def test_the_same_limit_holds_without_http(farm: Callable[..., Farm]) -> None:
    f = farm(TOYS)
    lists = Graph(name="g", params=(Port(name="values", type="list"),), nodes=(Node(id="a", step="toy.mark"),))
    with pytest.raises(InputError, match="values.*100,000 values"): f.client.submit(lists, dict(values=[[]] * 100_001))
    near = json.dumps(dict(graph=lists.to_json(), params=dict(values=[[]] * 99_000)))
    assert http_of(f.client).post("/jobs", content=near, headers=JSON).status_code == 201


def test_large_requests_take_turns(api: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, most, lock = [0], [0], threading.Lock()
    submit = Client.submit

    def counted(*args: Any, **kw: Any) -> Any:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.2)  # time for the others to come in, if they could
        try: return submit(*args, **kw)
        finally:
            with lock: at_once[0] -= 1
    monkeypatch.setattr(Client, "submit", counted)
    body = json.dumps(dict(pipeline="fan", params=dict(names=["x" * 400_000])))
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda _: api.http.post("/jobs", content=body, headers=JSON).status_code, range(8)))
    assert got == [201] * 8 and most == [2]


@pytest.mark.parametrize("served", [["prlimit", "--nofile=512:512"]], indirect=True)
def test_half_sent_requests_exhaust_neither_files_nor_disk(served: SimpleNamespace) -> None:
    with ExitStack() as held:
        made = half_sent(served.port, held, 1100)
        for _ in range(20):
            assert served.http.get("/health").status_code == 200
            assert httpx.get(f"http://127.0.0.1:{served.port}/health", timeout=10).status_code == 200, "a new connection, too"
        assert served.process.num_fds() < 400
        wait_for("the rest of each head is waited for ten seconds", lambda: all(ended(s) for s in made), 20)
    assert len(served.farm.log("api")) < 20_000, served.farm.log("api")[-2000:]


def test_a_second_head_on_one_connection_has_a_deadline_too(api: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("myspinbot.api.limits.HEAD_S", 1.0)
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as s:
        s.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert s.recv(65536).startswith(b"HTTP/1.1 200")
        s.sendall(b"GET /health HTTP/1.1\r\nHost: ")
        wait_for("the connection ends", lambda: ended(s), 10)


def test_a_body_that_does_not_come_is_not_waited_for(api: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("myspinbot.api.limits.BODY_S", 1.0)
    monkeypatch.setattr("myspinbot.api.limits.IDLE_S", 1.0)
    for path in ("/jobs", "/artifacts"):
        with socket.create_connection(("127.0.0.1", api.port), timeout=60) as s:
            own = "".join(f"{k}: {v}\r\n" for k, v in api.own.items())
            s.sendall(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{own}Content-Length: 50\r\n\r\n{{".encode())
            assert b" 408 " in (head := s.recv(65536))[:30], head


def test_websockets_are_counted(api: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("myspinbot.api.limits.SOCKETS", 2)
    f = api.farm
    jobs = [f.client.submit("branches", {}).id for _ in range(2)]
    with ExitStack() as held:
        for id in jobs: held.enter_context(connect(f"{api.ws}/jobs/{id}/ws", additional_headers=api.own)).recv(timeout=10)
        with pytest.raises(InvalidStatus): connect(f"{api.ws}/jobs/{jobs[0]}/ws", additional_headers=api.own)
    wait_for("their places are free again", lambda: reaches(f"{api.ws}/jobs/{jobs[0]}/ws", api.own))
    wait_for("no thread follows the jobs", lambda: not [t for t in threading.enumerate() if t.name.startswith("ws-")])


def reaches(url: str, headers: dict[str, str]) -> bool:
    try:
        with connect(url, additional_headers=headers): return True
    except InvalidStatus: return False


def test_half_sent_requests_do_not_stop_the_studio(voila: SimpleNamespace) -> None:
    port = int(voila.url.rpartition(":")[2])
    with ExitStack() as held:
        made = half_sent(port, held, 900)
        assert httpx.get(f"{voila.url}/health", timeout=20).status_code == 200
        wait_for("the rest of each head is waited for ten seconds", lambda: all(ended(s) for s in made), 30)
    assert len(voila.site.log("voila")) < 20_000


def test_a_busy_api_never_delays_a_lease(served: SimpleNamespace, tmp_path: Path) -> None:
    f, gate = served.farm, tmp_path / "gate"
    f.start("control")
    f.start("w1")
    job = f.client.submit("branches", dict(gate=str(gate)))
    query = "SELECT epoch, extract(epoch FROM lease_until - clock_timestamp()) AS left FROM job WHERE id = %(id)s"
    lease = lambda: f.client.journal.row(query, id=job.id)
    wait_for("the job is leased", lambda: lease()["left"])
    stop, least, answered = time.monotonic() + 12, [99.0], set()
    near = json.dumps(dict(pipeline="fan", params=dict(names=[["x"]] * 45_000))).encode()
    bodies = LISTS, near, near + b" ", b'{"pipeline": "no"}'

    def attack(body: bytes) -> None:
        while time.monotonic() < stop:
            with httpx.Client(base_url=str(served.http.base_url), headers=served.http.headers, timeout=60) as http:
                http.post("/jobs", content=body, headers=JSON)
                answered.add(body)
    with ExitStack() as held:
        half_sent(served.port, held, 900)
        attackers = [threading.Thread(target=attack, args=(body,)) for body in bodies]
        for t in attackers: t.start()
        while time.monotonic() < stop:
            least[0] = min(least[0], float(lease()["left"]))
            time.sleep(0.1)
        for t in attackers: t.join(60)
    gate.touch()
    assert answered == set(bodies) and least[0] > 0, (len(answered), least)
    assert f.done(job.id).status == "succeeded" and lease()["epoch"] == 1, "another conductor never took it"


# --- uploads

def nothing_left(f: Farm, *artifacts: Artifact) -> bool:
    return list(f.client.store.list()) == sorted(a.sha256 for a in artifacts)


def test_an_upload_that_is_too_large_is_refused(api: SimpleNamespace) -> None:
    f = api.farm
    f.client.cfg = f.cfg.changed(upload_max_mb=3)
    pieces = lambda n: iter([b"x" * 2**16] * n)
    for kw in (dict(content=b"x" * 3_000_001), dict(content=pieces(60)), dict(content=b"x" * 90_000_000)):
        e = (r := api.http.post("/artifacts", **kw)).json()
        assert r.status_code == 413 and "the limit is 3 MB" in e["message"] and "SPIN_UPLOAD_MAX_MB" in e["hint"], r.text
    assert nothing_left(f)
    assert api.http.post("/artifacts", content=b"x" * 3_000_000).status_code == 201


def test_an_upload_leaves_room_on_the_disk(api: SimpleNamespace) -> None:
    f = api.farm
    free = psutil.disk_usage(str(f.home)).free
    f.client.cfg = f.cfg.changed(upload_max_mb=10**7)
    own = "".join(f"{k}: {v}\r\n" for k, v in api.own.items())
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as s:
        s.sendall(f"POST /artifacts HTTP/1.1\r\nHost: 127.0.0.1\r\n{own}Content-Length: {free}\r\n\r\n".encode())
        assert b" 507 " in s.recv(65536)[:30], "as soon as it says its size"
    f.client.cfg = f.cfg.changed(disk_floor_mb=free // 1_000_000 + 1000)
    r = api.http.post("/artifacts", content=b"x" * 1000)
    assert (r.status_code, "MB free" in r.json()["message"], "SPIN_DISK_FLOOR_MB" in r.json()["hint"]) == (507, True, True), r.text
    assert nothing_left(f)


def test_a_form_is_refused_with_the_line_that_works(api: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"the content itself")
    r = api.http.post("/artifacts", files=dict(file=("photo.jpg", b"wrapped")))
    assert r.status_code == 415 and nothing_left(api.farm)
    line = r.json()["hint"].partition(": ")[2].replace("TOKEN", api.token)
    told = subprocess.run(f"{line} -s", shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    a = Artifact.model_validate_json(told)
    assert api.http.get(f"/artifacts/{a.sha256}").content == b"the content itself" and a.name == "photo.jpg"


def staged(p: psutil.Process) -> int:
    "Bytes of the largest plain file that a process has open."
    sizes = [0]
    for fd in Path(f"/proc/{p.pid}/fd").iterdir():
        with suppress(OSError): sizes.append(fd.stat().st_size * fd.is_file())
    return max(sizes)


def test_a_killed_upload_leaves_nothing(served: SimpleNamespace) -> None:
    f, own = served.farm, "".join(f"{k}: {v}\r\n" for k, v in authorization(served.farm.cfg).items())
    with socket.create_connection(("127.0.0.1", served.port)) as s:
        s.sendall(f"POST /artifacts HTTP/1.1\r\nHost: 127.0.0.1\r\n{own}Content-Length: 90000000\r\n\r\n".encode())
        for _ in range(40): s.sendall(b"x" * 2**20)
        wait_for("a part of it is on the disk", lambda: staged(served.process) > 30 * 2**20)
        f.kill("api")
    assert [p for p in f.home.rglob("*") if p.is_file() and p.stat().st_size > 2**20] == []


# --- blobs without a use

LOOK = Graph(name="look", params=(Port(name="picture", type="Data"),), nodes=(Node(id="a", step="toy.mark"),))


def aged(f: Farm, data: bytes) -> Artifact:
    "A blob that was stored long ago."
    a = f.client.store.put_bytes(data, "application/json", "a.json")
    os.utime(f.client.store.path(a.sha256), (0, 0))
    return a


def test_every_place_that_names_a_blob_keeps_it(farm: Callable[..., Farm]) -> None:
    f = farm(TOYS)
    f.start("control")
    f.start("w1")
    c = f.client
    as_param, in_graph, free = (aged(f, json.dumps(o).encode()) for o in ("param", "graph", "free"))
    graph = LOOK.model_copy(update=dict(nodes=(Node(id="a", step="toy.mark", inputs=dict(value="x")),)))
    graph = graph.model_copy(update=dict(params=(Port(name="picture", type="Data", default=in_graph),)))
    job = c.submit(graph, dict(picture=as_param))
    done = f.done(job.id)
    assert done.status == "succeeded", done.error
    notebook = f.step(job.id, "a").notebook
    shas = [a.sha256 for a in (as_param, in_graph, free, notebook)]
    assert unreferenced(c.journal, shas) == [free.sha256]
    for sha in shas: os.utime(c.store.path(sha), (0, 0))
    assert sweep_store(c.journal, c.store, 7) == [free.sha256]
    c.journal.delete_job(job.id)
    assert notebook.sha256 in sweep_store(c.journal, c.store, 7), "a deleted job needs nothing"


def test_a_request_in_flight_wins_against_the_sweeper(farm: Callable[..., Farm]) -> None:
    "Old blobs are swept without pause, while requests name them: what was accepted is there."
    f = farm(TOYS)
    c, stop, refused = f.client, threading.Event(), [0]
    blobs = [aged(f, json.dumps(n).encode()) for n in range(300)]

    def sweep() -> None:
        while not stop.is_set(): sweep_store(c.journal, c.store, 7)
    sweeper = threading.Thread(target=sweep)

    def ask(a: Artifact) -> str | None:
        try: return c.submit(LOOK, dict(picture=a)).params["picture"].sha256
        except InputError as e: assert "not stored" in str(e) and "Upload it first" in str(e)
        refused[0] += 1
        return None
    with ThreadPoolExecutor(4) as pool:
        half = pool.map(ask, blobs[:150])
        accepted = [next(half)]  # one is through when the sweeper begins: it may be faster than all others
        sweeper.start()
        accepted += [*half, *pool.map(ask, blobs[150:])]
    stop.set()
    sweeper.join(60)
    sweep_store(c.journal, c.store, 7)
    there = [sha for sha in accepted if sha]
    assert all(c.store.exists(sha) for sha in there) and len(there) >= 1
    assert len(there) + refused[0] == 300


def test_storing_a_blob_again_makes_it_new(farm: Callable[..., Farm]) -> None:
    f = farm(TOYS)
    a = aged(f, b"[1]")
    assert f.client.store.put_bytes(b"[1]", "application/json", "again.json").sha256 == a.sha256
    assert sweep_store(f.client.journal, f.client.store, 7) == []
