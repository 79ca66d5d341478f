"""The command line against a real installation: every command, its JSON, and what it says when something is wrong."""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from conftest import SERVERS, free_port
from farm import wait_for

from myspinbot.core import Settings
from myspinbot.embedded import Embedded, RedisServer
from myspinbot.cli.services import Stack

ROOT = Path(__file__).parent.parent
TOYS = ROOT / "tests" / "pipelines"


def run(env, *args, code=0, timeout=120):
    r = subprocess.run([sys.executable, "-m", "myspinbot", *args], env=env, capture_output=True, text=True,
        timeout=timeout, check=False, cwd=env.get("SPIN_HOME", "."))
    assert r.returncode == code, f"{args} ended with {r.returncode}\n{r.stdout}\n{r.stderr}"
    return r


def last_json(r): return json.loads(r.stdout.strip().splitlines()[-1])


@pytest.fixture
def up(farm):
    f = farm(TOYS)
    f.start("control")
    f.start("w1")
    return f


def test_submit_wait_show_jobs_logs(up):
    done = last_json(run(up.env, "submit", "fan", "-p", 'names=["a","b"]', "--wait", "--json"))
    assert done["status"] == "succeeded" and [s["status"] for s in done["steps"]] == ["succeeded"] * 2
    assert all(Path(s["notebook"]).is_file() for s in done["steps"])
    id = done["job"]
    assert last_json(run(up.env, "show", id, "--json"))["steps"][0]["worker"] == "w1"
    assert last_json(run(up.env, "jobs", "--json"))[0]["id"] == id
    assert id in run(up.env, "jobs").stdout
    kinds = [json.loads(line)["kind"] for line in run(up.env, "logs", "-f", id, "--json").stdout.splitlines()]
    assert kinds[0] == "job" and "step" in kinds
    shown = run(up.env, "show", id[:10]).stdout
    assert "marks[0]" in shown and "values: ['ok', 'ok']" in shown
    assert run(up.env, "submit", "fan", "-p", 'names=["a","b"]', "--wait").stdout == "values: ['ok', 'ok']\n"


def test_rerun_cancel_retry(up, tmp_path):
    first = last_json(run(up.env, "submit", "branches", "--wait", "--json"))["job"]
    again = last_json(run(up.env, "rerun", first, "--from", "fast", "--json"))["id"]
    up.done(again)
    assert {r.key: r.status for r in up.client.steps(again)} == {"slow": "cached", "fast": "succeeded",
        "after": "succeeded"}
    held = last_json(run(up.env, "submit", "branches", "-p", f"gate={tmp_path / 'gate'}", "--json"))["job"]
    wait_for("the slow step at work", lambda: (r := up.step(held, "slow")) and r.status == "running")
    assert last_json(run(up.env, "cancel", held, "--json"))["status"] == "cancelled"
    (tmp_path / "gate").touch()
    assert last_json(run(up.env, "retry", held, "--json"))["status"] == "queued"
    assert up.done(held).status == "succeeded"


def test_batch_checks_every_row_before_the_first_is_submitted(up, tmp_path):
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    for path, rows in ((good, ['["a"]', '["b"]']), (bad, ['["a"]', "nonsense"])):
        with open(path, "w", newline="") as f: csv.writer(f).writerows([["names"], *([r] for r in rows)])
    done = last_json(run(up.env, "batch", "fan", str(good), "--wait", "--json"))
    assert [j["status"] for j in done["jobs"]] == ["succeeded"] * 2
    before = len(up.client.jobs())
    r = run(up.env, "batch", "fan", str(bad), code=2)
    assert "Row 2" in r.stderr and "names" in r.stderr and len(up.client.jobs()) == before


def test_batch_takes_a_table_with_semicolons(up, tmp_path):
    for path in (tmp_path / "rows.csv", tmp_path / "rows.tsv"):
        path.write_text('names;seconds\n"[""a, b""]";0\n[];\n')
        done = last_json(run(up.env, "batch", "fan", str(path), "--json"))["jobs"]
        assert [up.client.job(j["job"]).params["names"] for j in done] == [["a, b"], []]


def test_same_key_is_one_job(up):
    ids = {last_json(run(up.env, "submit", "fan", "--key", "k1", "--json"))["job"] for _ in range(2)}
    assert len(ids) == 1


@pytest.mark.parametrize(("args", "words"), [
    (("submit", "fam"), ("fam", "fan")),
    (("submit", "fan", "-p", "nmes=[]"), ("nmes", "names")),
    (("submit", "fan", "-p", "names=5"), ("names", "list")),
    (("submit", "fan", "-p", "names"), ("name=value",)),
    (("show", "job_nothing"), ("job_nothing",)),
    (("rerun", "job_nothing"), ("job_nothing",)),
])
def test_wrong_calls_say_what_and_how_to_mend(up, args, words):
    r = run(up.env, *args, code=2)
    assert all(w in r.stderr for w in words) and "Traceback" not in r.stderr, r.stderr


def test_catalogue_commands_need_no_services(tmp_path):
    env = os.environ | dict(SPIN_HOME=str(tmp_path))
    names = [g["name"] for g in last_json(run(env, "pipelines", "--json"))]
    ids = {s["id"] for s in last_json(run(env, "steps", "--json"))}
    assert "talking_portrait" in names
    assert {"script.write", "speech.piper", "portrait.prepare", "portrait.talk", "video.check"} <= ids
    assert "talking_portrait" in run(env, "pipelines").stdout and "portrait.talk" in run(env, "steps").stdout


def test_without_services_the_error_says_how_to_start_them(tmp_path):
    r = run(os.environ | dict(SPIN_HOME=str(tmp_path)), "jobs", code=2)
    assert "myspinbot up" in r.stderr


def test_doctor_is_content_and_names_what_is_missing(tmp_path):
    env = os.environ | dict(SPIN_HOME=str(tmp_path))
    assert all(c["ok"] for c in last_json(run(env, "doctor", "--json")))
    r = run(env | dict(SPIN_PIPELINES_DIR=str(tmp_path / "nowhere")), "doctor", code=1)
    assert "SPIN_PIPELINES_DIR" in r.stdout


@pytest.mark.parametrize("name", SERVERS)
def test_doctor_names_a_server_of_the_users_own_and_what_is_known_against_it(tmp_path, flushed_server, name):
    env = os.environ | dict(SPIN_HOME=str(tmp_path), SPIN_REDIS_URL=flushed_server(name))
    row, = (c for c in last_json(run(env, "doctor", "--json")) if c["name"] == "redis-server")
    said = subprocess.check_output([SERVERS[name], "--version"], text=True)
    kind, version = re.match(r"(\w+) server v=([\d.]+)", said).groups()
    assert row["ok"] and row["found"].startswith(f"SPIN_REDIS_URL: {kind} {version}")
    known = RedisServer(kind, tuple(map(int, version.split(".")))).fault
    assert row["found"].endswith(known) and (known == "") == ("CVE" not in row["found"])


def test_doctor_says_that_a_server_of_the_users_own_does_not_answer(tmp_path):
    env = os.environ | dict(SPIN_HOME=str(tmp_path), SPIN_REDIS_URL=f"redis://:secret@127.0.0.1:{free_port()}/0")
    row, = (c for c in last_json(run(env, "doctor", "--json", code=1)) if c["name"] == "redis-server")
    assert not row["ok"] and "no answer" in row["found"] and "SPIN_REDIS_URL" in row["mend"] and "secret" not in str(row)


def test_up_joins_drains_and_recovers_from_a_crash(tmp_path):
    env = os.environ | dict(SPIN_HOME=str(tmp_path / "spin"), SPIN_PIPELINES_DIR=str(TOYS), SPIN_CONTROL_PORT="0",
        SPIN_WITNESS=str(tmp_path / "w"))
    (tmp_path / "spin").mkdir()

    def up():
        p = subprocess.Popen([sys.executable, "-m", "myspinbot", "up", "--json", "--no-dashboards"], env=env,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return p, json.loads(p.stdout.readline())

    p, _ = up()
    assert last_json(run(env, "up", "--json"))["joined"] and "Already up" in run(env, "up").stdout
    assert last_json(run(env, "submit", "fan", "--wait", "--json"))["status"] == "succeeded"
    api = lambda: next(k["pid"] for k in json.loads((tmp_path / "spin" / "up.json").read_text())["children"] if k["name"] == "api")
    psutil.Process(old := api()).kill()
    wait_for("another API is there", lambda: api() != old)
    kids = psutil.Process(p.pid).children(recursive=True)
    p.send_signal(signal.SIGKILL)
    p.wait()
    q, _ = up()
    assert not [k for k in kids if k.is_running() and "-m myspinbot" in " ".join(k.cmdline())]
    assert last_json(run(env, "jobs", "--json"))[0]["status"] == "succeeded"
    assert last_json(run(env, "status", "--json"))["health"]["ok"]
    mine = psutil.Process(q.pid).children(recursive=True)
    q.send_signal(signal.SIGINT)
    assert q.wait(60) == 0
    _, alive = psutil.wait_procs(mine, timeout=10)
    assert not alive, alive
    assert "Nothing was up" in run(env, "down").stdout


def test_files_that_no_job_names_are_pruned(farm):
    f = farm(TOYS)
    a, b = f.client.store.put_bytes(b"old"), f.client.store.put_bytes(b"new")
    os.utime(f.client.store.path(a.sha256), (0, 0))
    assert last_json(run(f.env, "prune", "--dry-run", "--json")) == dict(removed=[a.sha256], dry=True)
    assert run(f.env, "prune").stdout.split("\n")[:2] == [a.sha256, "Files removed: 1."]
    assert list(f.client.store.list()) == [b.sha256]
    assert "greater than or equal to 1" in run(f.env, "prune", "--days", "0.5", code=2).stderr
    f.client.store.path(b.sha256).parents[1].joinpath("journal").write_text("another")
    assert "belongs to the another" in run(f.env, "prune", code=2).stderr


def test_a_supervisor_starts_long_logs_again(tmp_path, redis_url, postgres_url):
    cfg = Settings(home=tmp_path, redis_url=redis_url, postgres_url=postgres_url)
    stack, stop, log = Stack(cfg), threading.Event(), tmp_path / "logs" / "worker-0.log"
    log.parent.mkdir()
    with open(log, "ab", buffering=0) as writer:
        for n in range(250_000): writer.write(b"%099d\n" % n)
        t = threading.Thread(target=stack.watch, args=(stop,))
        t.start()
        wait_for("it is short again", lambda: log.stat().st_size == 0)
        writer.write(b"goes on\n")
        stop.set()
        t.join()
    assert log.read_bytes() == b"goes on\n" and log.with_suffix(".old.log").read_bytes().endswith(b"%099d\n" % 249_999)
    assert log.with_suffix(".old.log").stat().st_size <= 20_000_000


def test_up_starts_a_killed_redis_and_postgres_again(tmp_path):
    env = os.environ | dict(SPIN_HOME=str(tmp_path / "spin"), SPIN_PIPELINES_DIR=str(TOYS), SPIN_CONTROL_PORT="0",
        SPIN_WITNESS=str(tmp_path / "w"))
    p = subprocess.Popen([sys.executable, "-m", "myspinbot", "up", "--json", "--no-dashboards"], env=env,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    servers = Embedded(tmp_path / "spin")
    try:
        json.loads(p.stdout.readline())
        for which in (servers.redis_process, servers.postgres_process):
            (old := which()).kill()
            wait_for("the servers are back", lambda which=which, old=old: (new := which()) and new.pid != old.pid
                     and servers.running(), 90)
            ask = [sys.executable, "-m", "myspinbot", "jobs"]  # PostgreSQL answers before it has replayed its log
            wait_for("the journal answers", lambda ask=ask: subprocess.run(ask, env=env, capture_output=True).returncode == 0, 90)
            assert last_json(run(env, "submit", "fan", "--wait", "--json"))["status"] == "succeeded"
    finally:
        p.send_signal(signal.SIGINT)
        assert p.wait(90) == 0
    assert servers.running() is None and not servers.redis_process() and not servers.postgres_process()


def test_demo_leaves_no_service_and_makes_a_video(tmp_path):
    env = os.environ | dict(SPIN_HOME=str(tmp_path), SPIN_CONTROL_PORT="0")
    r = last_json(run(env, "demo", "--text", "Hello there. This is a demo.", "--json", timeout=300))
    assert r["status"] == "succeeded" and Path(r["video"]).stat().st_size > 10_000
    assert {"script", "speech", "prepare", "talk", "check"} <= {s["id"] for s in r["steps"]}
    assert all(Path(s["notebook"]).is_file() for s in r["steps"])
    assert "Nothing was up" in run(env, "down").stdout
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    assert not left, left


def test_demo_refuses_a_file_that_is_no_picture(tmp_path):
    env = os.environ | dict(SPIN_HOME=str(tmp_path), SPIN_CONTROL_PORT="0")
    (tmp_path / "face.jpg").write_text("not a picture")
    r = run(env, "demo", "--portrait", str(tmp_path / "face.jpg"), code=2, timeout=120)
    assert "face.jpg" in r.stderr and "Traceback" not in r.stderr
