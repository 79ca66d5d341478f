"""Strangers at the doors of API, studio and data folder: other pages in the owner's browser, other users of the machine."""
import contextlib
import functools
import http.server
import os
import pwd
import re
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import nbformat
import psutil
import pytest
from browser import BROWSER, FLAGS
from farm import Farm, wait_for
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from myspinbot.core import ConfigError
from myspinbot.api.doors import ensure_token
from myspinbot.schema import Graph, Node, PortRef

TOYS = Path(__file__).parent / "pipelines"
JOB, KERNEL = "job_0000000000000000", "00000000-0000-0000-0000-000000000000"
API_PATHS = ("/jobs", f"/jobs/{JOB}", "/docs", "/openapi.json", "/pipelines", "/steps", f"/artifacts/{'0' * 64}", "/", "/none")
STUDIO_PATHS = ("/", "/?job=x", "/voila/static/voila.js", "/voila/files/studio.ipynb", f"/api/kernels/{KERNEL}", "/none")


def told(r: httpx.Response) -> tuple[int, str]: return r.status_code, r.json()["type"]


# --- the API

def test_nothing_of_the_api_is_shown_without_the_token(api: SimpleNamespace) -> None:
    base = str(api.http.base_url)
    wrong = dict(Authorization=f"Bearer {'x' * 43}"), dict(Authorization=f"Basic {api.token}"), dict(Cookie=f"spin={api.token}")
    for own in ({}, *wrong):
        for path in API_PATHS:
            assert told(httpx.get(f"{base}{path}", headers=own)) == (401, "AccessDenied"), (path, own)
        for path in ("/jobs", "/artifacts", f"/jobs/{JOB}/cancel"):
            assert told(httpx.post(f"{base}{path}", headers=own, content=b"{}")) == (401, "AccessDenied"), (path, own)
        with pytest.raises(InvalidStatus, match="401"): connect(f"{api.ws}/jobs/{JOB}/ws", additional_headers=own)
    assert list(api.farm.client.store.list()) == []


def test_health_and_metrics_are_open_here_and_a_page_asks_for_the_token(api: SimpleNamespace) -> None:
    base = str(api.http.base_url)
    assert [httpx.get(f"{base}{o}").status_code for o in ("/health", "/metrics")] == [200, 200]
    page = httpx.get(f"{base}/docs", headers=dict(Accept="text/html"))
    assert page.status_code == 401 and 'name="token"' in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    with httpx.Client(base_url=base, headers=dict(Accept="text/html")) as browser:
        sent_on = browser.get("/docs", params=dict(token=api.token, x="1"))
        assert (sent_on.status_code, sent_on.headers["location"]) == (303, "/docs?x=1")
        cookie = sent_on.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and api.token not in cookie
        assert browser.get("/docs").status_code == 200, "by the cookie"
    for path in ("//evil.example/x", "/\\evil.example", "/%5Cevil.example"):
        at = httpx.Client(base_url=base).get(f"{path}?token={api.token}", headers=dict(Accept="text/html")).headers["location"]
        assert re.match(r"/[^/\\]", at), f"{path} leads to {at}"


@pytest.mark.parametrize("door", ["api", "voila"])
def test_rebound_host_and_foreign_pages_do_not_get_in_with_the_token(door: str, request: pytest.FixtureRequest) -> None:
    it = request.getfixturevalue(door)
    base = str(it.http.base_url) if door == "api" else it.url
    path = "/jobs" if door == "api" else "/"
    port = base.rsplit(":", 1)[1].strip("/")
    hosts = f"evil.example:{port}", "evil.example", f"127.0.0.1.evil.example:{port}", "10.0.0.1", f"a@127.0.0.1:{port}", "", "["
    for host in hosts:
        got = httpx.get(f"{base}{path}", headers=it.own | dict(Host=host))
        assert got.status_code in (400, 421), (host, got.status_code)
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{int(port) + 1}", f"http://localhost:{port}"):
        assert told(httpx.post(f"{base}{path}", headers=it.own | dict(Origin=origin))) == (403, "AccessDenied"), origin
    for site in ("cross-site", "same-site"):
        assert told(httpx.post(f"{base}{path}", headers=it.own | {"Sec-Fetch-Site": site})) == (403, "AccessDenied")
        image = it.own | {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
        assert told(httpx.get(f"{base}{path}", headers=image)) == (403, "AccessDenied")
    where = f"/jobs/{JOB}/ws" if door == "api" else f"/api/kernels/{KERNEL}/channels"
    with pytest.raises(InvalidStatus, match="403"):
        connect(f"ws://127.0.0.1:{port}{where}", origin="http://evil.example", additional_headers=it.own)


def test_auth_none_is_refused_where_others_can_reach_it(farm: Callable[..., Farm]) -> None:
    f = farm(TOYS)
    with pytest.raises(AssertionError, match=r"SPIN_AUTH=none would open 0\.0\.0\.0"):
        f.start("api", SPIN_AUTH="none", SPIN_CONTROL_HOST="0.0.0.0")
    command = [sys.executable, "-m", "myspinbot", "dashboards", "--host=0.0.0.0", "--port=0"]
    r = subprocess.run(command, env=f.env | dict(SPIN_AUTH="none"), capture_output=True, text=True, timeout=60, check=False)
    assert r.returncode == 2 and "SPIN_AUTH=none would open 0.0.0.0" in r.stderr


# --- the studio

def kernels(voila: SimpleNamespace) -> list[psutil.Process]:
    "Processes that the studio's server started."
    def serves(p: psutil.Process) -> bool:
        try: return "ipykernel" in " ".join(p.cmdline())
        except psutil.Error: return False  # it is ending
    return [p for p in psutil.Process(voila.pid).children(recursive=True) if serves(p)]


def test_studio_starts_no_kernel_for_a_stranger(voila: SimpleNamespace) -> None:
    for path in STUDIO_PATHS:
        assert told(httpx.get(f"{voila.url}{path}")) == (401, "AccessDenied"), path
        assert told(httpx.post(f"{voila.url}{path}")) == (401, "AccessDenied"), path
    frame = voila.own | {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}
    assert told(httpx.get(voila.url, headers=frame)) == (403, "AccessDenied")
    assert httpx.get(f"{voila.url}/health").json() == dict(ok=True)
    assert kernels(voila) == []


@pytest.mark.parametrize("voila", [dict(SPIN_STUDIO_KERNELS="2")], indirect=True)
def test_studio_has_so_many_kernels_and_says_so(voila: SimpleNamespace) -> None:
    got = []
    pages = [threading.Thread(target=lambda: got.append(httpx.get(voila.url, headers=voila.own, timeout=120))) for _ in range(4)]
    for p in pages: p.start()
    for p in pages: p.join(130)
    assert sorted(r.status_code for r in got) == [200, 200, 503, 503] and len(kernels(voila)) == 2
    busy = next(r for r in got if r.status_code == 503)
    assert "SPIN_STUDIO_KERNELS" in busy.text and busy.headers["retry-after"]


# --- a browser that shows other pages, too

ATTACK = """<!doctype html><title>attack</title><body><script>
const api = "API", job = "JOB", seen = {};
const wait = ms => new Promise(r => setTimeout(r, ms));
async function tried(name, go) { try { seen[name] = await go() } catch (e) { seen[name] = "failed" } }
function form(action, type, field) {
  const frame = document.createElement("iframe"), f = document.createElement("form");
  frame.name = "f" + Math.random();
  Object.assign(f, {action, method: "post", enctype: type, target: frame.name});
  if (field) { const i = document.createElement("input"); i.name = field; i.value = "x"; f.append(i) }
  document.body.append(frame, f);
  return new Promise(r => { frame.onload = () => r("answered"); setTimeout(() => r("no answer"), 3000); f.submit() });
}
function socket(url) {
  return new Promise(r => {
    const s = new WebSocket(url); s.onmessage = () => r("a message"); s.onopen = () => r("open"); s.onclose = () => r("closed");
    setTimeout(() => r("no answer"), 5000) });
}
(async () => {
  await tried("cancel", () => form(api + "/jobs/" + job + "/cancel", "application/x-www-form-urlencoded"));
  await tried("upload", () => form(api + "/artifacts?name=x.svg", "multipart/form-data", "file"));
  const blind = {method: "POST", mode: "no-cors", credentials: "include"};
  await tried("fetch", async () => (await fetch(api + "/jobs/" + job + "/cancel", blind)).type);
  await tried("beacon", async () => { navigator.sendBeacon(api + "/artifacts", "stolen"); await wait(500); return "sent" });
  await tried("read", async () => (await fetch(api + "/jobs", {credentials: "include"})).status);
  await tried("socket", () => socket(api.replace("http", "ws") + "/jobs/" + job + "/ws"));
  await tried("studio", () => socket("STUDIO".replace("http", "ws") + "/api/kernels/KERNEL/channels"));
  const i = document.createElement("iframe"); i.src = "STUDIO/"; document.body.append(i);
  const p = new Image(); p.src = "STUDIO/"; await wait(3000);
  document.title = "done"; window.seen = seen;
})();
</script>"""


@contextlib.contextmanager
def site_of(folder: Path) -> Iterator[int]:
    "A stranger's web server."
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), dict(log_message=lambda *a: None))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


if BROWSER or os.environ.get("CI"):
    @pytest.mark.parametrize("host", ["attacker.example", "127.0.0.1"])
    def test_pages_of_strangers_do_nothing_in_the_owners_browser(api: SimpleNamespace, voila: SimpleNamespace, tmp_path: Path,
                                                                 host: str) -> None:
        """Another site, and another user's server on this machine, to which the browser sends our cookies."""
        from playwright.sync_api import sync_playwright
        client, base = api.farm.client, str(api.http.base_url)
        job = client.submit("branches", dict(gate=str(tmp_path / "gate")))
        (folder := tmp_path / "site").mkdir()
        (folder / "index.html").write_text(ATTACK.replace("API", base).replace("JOB", job.id).replace("STUDIO", voila.url)
                                           .replace("KERNEL", KERNEL))
        with site_of(folder) as port, sync_playwright() as p:
            rule = "--host-resolver-rules=MAP *.example 127.0.0.1"
            with p.chromium.launch(executable_path=BROWSER, args=[*FLAGS, rule]) as browser:
                context = browser.new_context()
                page = context.new_page()
                page.goto(f"{base}/health?token={api.token}")
                assert page.evaluate("fetch('/jobs').then(r => r.status)") == 200, "the owner's page works"
                opened = context.new_page()
                opened.goto(f"{voila.url}/health?token={voila.token}")
                ours = [c for c in context.cookies() if c["name"].startswith("spin-")]
                assert len(ours) == 2 and all(c["httpOnly"] and c["sameSite"] == "Strict" for c in ours)
                page.goto(f"http://{host}:{port}/")
                page.wait_for_function("document.title == 'done'", timeout=60_000)
                seen = page.evaluate("seen")
                rebound = page.goto(f"http://evil.example:{base.rsplit(':', 1)[1]}/jobs")
                assert rebound and rebound.status == 421
        state = client.job(job.id).status
        (tmp_path / "gate").touch()  # the worker need not wait for it any longer
        assert seen["socket"] == seen["studio"] == "closed", seen
        assert seen["read"] == "failed", seen
        assert state in ("queued", "running")
        assert list(client.store.list()) == [] and kernels(voila) == []

    @pytest.mark.parametrize("voila", [dict(SPIN_STUDIO_KERNELS="2")], indirect=True)
    def test_page_is_reloaded_more_often_than_there_may_be_kernels(voila: SimpleNamespace) -> None:
        from playwright.sync_api import sync_playwright
        with sync_playwright() as p, p.chromium.launch(executable_path=BROWSER, args=[*FLAGS]) as browser:
            page = browser.new_page()
            page.goto(f"{voila.url}/?token={voila.token}")
            for _ in range(5):
                page.locator("button.spin-go").wait_for(timeout=90_000)
                assert len(kernels(voila)) <= 2
                page.reload()
            page.locator("button.spin-go").wait_for(timeout=90_000)

    def test_kernel_ends_soon_after_its_page_has_gone(voila: SimpleNamespace) -> None:
        from playwright.sync_api import sync_playwright
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path=BROWSER, args=[*FLAGS])
            page = browser.new_page()
            page.goto(f"{voila.url}/?token={voila.token}")
            page.locator("button.spin-go").wait_for(timeout=90_000)
            assert len(kernels(voila)) == 1
            for o in psutil.Process(browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"][0]["id"]
                                    ).children(recursive=True): o.kill()  # as a crash: no page says goodbye
            began = time.monotonic()
            wait_for("the kernel has gone", lambda: not kernels(voila), 40)
            assert time.monotonic() - began < 40
            with contextlib.suppress(Exception): browser.close()


# --- another user of the machine

LOOK = """
import os, re, socket, sys
from pathlib import Path
home, socks, found = Path(sys.argv[1]), sys.argv[2:], []
def tried(what, fn):
    try: fn()
    except OSError: return
    found.append(what)
tried("list", lambda: os.listdir(home))
for o in ("token", "up.json", "logs/control.log", "logs/api.log", "store", "embedded/postgres", "embedded/redis", "logs",
          "results", "scratch"):
    tried(o, lambda: os.listdir(home / o) if (home / o).is_dir() else open(home / o).read())
for o in socks:
    s = socket.socket(socket.AF_UNIX)
    tried(o, lambda: s.connect(o))
print(os.geteuid(), found)
"""


@pytest.fixture(scope="module")
def stack() -> Iterator[SimpleNamespace]:
    "`myspinbot up` in a folder to which anybody may go, with an earlier umask that lets everybody read."
    place = Path(tempfile.mkdtemp(prefix="spins"))
    place.chmod(0o755)
    home = place / "home"
    home.mkdir(mode=0o755)  # as earlier versions left it
    pipelines = place / "pipelines"
    (pipelines / "steps").mkdir(parents=True)
    told = nbformat.v4.new_code_cell("import os\nfrom myspinbot import Step\nstep = Step('toy.told')\n"
                                     "print(dict(os.environ))\nstep.output(value=sorted(os.environ))")
    given = nbformat.v4.new_code_cell("word: str = ''  # a word", metadata=dict(tags=["parameters"]))
    about = dict(id="toy.told", outputs=dict(value="any"))
    kernel = dict(name="python3", display_name="p", language="python")
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Told\n\nTells its environment."), given, told],
                                  metadata=dict(myspinbot=about, kernelspec=kernel))
    nbformat.write(nb, pipelines / "steps" / "toy_told.ipynb")
    env = os.environ | dict(SPIN_HOME=str(home), SPIN_PIPELINES_DIR=str(pipelines), SPIN_CONTROL_PORT="0", spin_token_file="",
                            JUPYTER_TOKEN="token-of-jupyterlab",  # as `myspinbot lab` sets it
                            SPIN_LLM_API_KEY="key-of-a-model", SPIN_LLM_BASE_URL="http://me:password-of-a-model@127.0.0.1:9/v1")
    log = open(place / "up.log", "wb")
    command = [sys.executable, "-m", "myspinbot", "up", "--no-dashboards"]
    p = subprocess.Popen(command, env=env, stdout=log, stderr=log, umask=0o022)
    wait_for("up", lambda: "Ctrl-C" in (place / "up.log").read_text() or p.poll() is not None, 120)
    assert p.poll() is None, (place / "up.log").read_text()
    yield SimpleNamespace(home=home, place=place, env=env, up=(place / "up.log").read_text())
    p.terminate()
    p.wait(60)
    log.close()
    subprocess.run(["rm", "-rf", str(place)], check=True)


def cli(stack: SimpleNamespace, *args: str) -> str:
    command = [sys.executable, "-m", "myspinbot", *args]
    return subprocess.run(command, env=stack.env, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def ran(stack: SimpleNamespace) -> Any:
    "A job of the notebook that tells its environment, ended; and its client."
    from myspinbot.graph.catalogue import Catalogue
    from myspinbot.api.client import Client
    from myspinbot.core import Settings
    graph = Graph(name="told", nodes=(Node(id="it", step="toy.told"),), outputs=dict(value=PortRef(node="it", port="value")))
    with Client(Settings(home=stack.home), Catalogue(stack.place / "pipelines")) as c:
        job = c.wait(c.submit(graph, {}).id, 120)
        assert job.status == "succeeded", job.error
        yield SimpleNamespace(job=job, record=c.store.open(c.steps(job.id)[0].notebook).read().decode())


def test_addresses_that_up_prints_open_the_doors(stack: SimpleNamespace) -> None:
    token = cli(stack, "token").strip()
    api = re.search(r"http://\S+/docs\?token=\S+", stack.up)[0]
    assert api.endswith(f"?token={token}") and httpx.get(api, follow_redirects=True).status_code == 200
    assert cli(stack, "status").count(token) == 0
    assert f"?token={token}" in cli(stack, "up"), "already up: the same addresses"


def test_folders_of_an_installation_are_closed(stack: SimpleNamespace, ran: SimpleNamespace) -> None:
    "To pass through is all that others may, where PostgreSQL's user has to."
    open_ones = {}
    for p in (stack.home, *stack.home.rglob("*")):
        mode = p.lstat().st_mode
        if stat.S_ISLNK(mode) or stat.S_ISSOCK(mode): continue
        if mode & 0o077: open_ones[str(p.relative_to(stack.home))] = oct(mode & 0o777)
    own = {".": "0o711", "embedded": "0o711", "embedded/run": "0o711"} if os.geteuid() == 0 else {}
    assert open_ones == own
    assert oct(stack.place.stat().st_mode & 0o777) == "0o755", "what is above it stays as it was"


def test_step_notebooks_inherit_no_address_no_token_and_no_key(stack: SimpleNamespace, ran: SimpleNamespace) -> None:
    token = (stack.home / "token").read_text().strip()
    assert "SPIN_HOME" in ran.job.outputs["value"], "the environment was told"
    assert [o for o in ran.job.outputs["value"] if re.search(r"(?i)^spin_.*(url|token|key)", o)] == []
    secrets = token, "token-of-jupyterlab", "key-of-a-model", "password-of-a-model", "postgresql://", "unix:/"
    assert [o for o in secrets if o in ran.record] == []
    for p in stack.home.rglob("*"):
        if p.is_file() and p.name != "token" and token.encode() in p.read_bytes(): pytest.fail(f"the token stands in {p}")


if os.geteuid() == 0:
    def test_another_user_of_the_machine_sees_and_reaches_nothing(stack: SimpleNamespace, ran: SimpleNamespace) -> None:
        nobody = pwd.getpwnam("nobody")
        sockets = [str(p) for p in stack.home.rglob("*") if p.is_socket()]
        assert len(sockets) >= 2
        python = "/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK) else sys.executable
        r = subprocess.run([python, "-c", LOOK, str(stack.home), *sockets], user=nobody.pw_uid, group=nobody.pw_gid,
                           extra_groups=[], cwd="/", capture_output=True, text=True, check=True)
        assert r.stdout.split(maxsplit=1) == [str(nobody.pw_uid), "[]\n"]

    def test_root_leaves_closed_folders_above_the_data_folder_closed() -> None:
        from myspinbot.embedded import Embedded
        with tempfile.TemporaryDirectory(prefix="spinc") as d:
            closed = Path(d) / "private"
            closed.mkdir(mode=0o700)
            Path(d).chmod(0o700)
            e = Embedded(closed / "home")
            try:
                e.start()
                assert e.running() and not e.pgdata.is_relative_to(d)
                assert [oct(o.stat().st_mode & 0o777) for o in (Path(d), closed, e.home)] == ["0o700"] * 3
            finally:
                e.stop()
                subprocess.run(["rm", "-rf", str(e.postgres_folder)], check=True)


def test_processes_that_start_at_once_have_one_token(tmp_path: Path) -> None:
    code = ("import sys; from myspinbot.core import Settings; from myspinbot.api.doors import ensure_token; sys.stdin.read(1);"
            "print(ensure_token(Settings(home=sys.argv[1])))")
    for n in range(3):
        command = [sys.executable, "-c", code, str(tmp_path / str(n))]
        procs = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(6)]
        for p in procs: p.stdin.write("go")
        assert len({p.communicate(timeout=60)[0] for p in procs}) == 1


def test_token_of_an_open_file_is_replaced_and_a_bad_one_refused(tmp_path: Path) -> None:
    from myspinbot.core import Settings
    cfg = Settings(home=tmp_path / "home")
    first = ensure_token(cfg)
    (cfg.home / "token").chmod(0o640)
    assert ensure_token(cfg) != first
    for bad in ("short", "with space in the middle of it", "ü" * 40):
        (cfg.home / "token").write_text(bad)
        (cfg.home / "token").chmod(0o600)
        with pytest.raises(ConfigError) as e: ensure_token(cfg)
        assert bad not in str(e.value)
