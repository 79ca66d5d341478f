"""What compose.yaml starts exists: settings, commands, files; and no secret stands in it."""
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from myspinbot.core import Settings, settings

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "compose.yaml").read_text()
SERVICES = yaml.safe_load(TEXT)["services"]
SECRETS = yaml.safe_load(TEXT)["secrets"]
OURS = {k: v for k, v in SERVICES.items() if v["image"].startswith("myspinbot:")}
ROOTS = {"postgres_root_password": {"postgres"}, "minio_root_password": {"minio", "minio-setup"}}
VARIABLE = re.compile(r"(?<!\$)\$\{?(\w+)")
PASSWORD = re.compile(r"(?i)password|secret|token|api_key|url=|:[^/@\s]+@")


def filled(values: dict[str, str]) -> dict[str, str]:
    "The environment as it is with every variable at its default."
    return {k: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", v) for k, v in values.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "infra/secrets as its script makes it, in a copy of the checkout's infra."
    copy = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "infra", copy / "infra", ignore=shutil.ignore_patterns("secrets"))
    subprocess.run(["sh", copy / "infra/make-secrets.sh"], check=True)
    return copy / "infra/secrets"


def test_control_api_worker_and_studio_share_one_image() -> None:
    assert {"control", "api", "worker", "studio"} <= set(OURS)
    assert len({str(v["build"]) + v["image"] for v in OURS.values()}) == 1


@pytest.mark.parametrize("name", OURS)
def test_every_setting_is_one_that_the_program_reads(name: str, files: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    given, secrets = filled(OURS[name]["environment"]), OURS[name]["secrets"]
    assert given["SPIN_SECRETS_DIR"] == "/run/secrets"
    names = {*given, *secrets} - {"SPIN_SECRETS_DIR"}
    assert {k for k in names if k.lower().removeprefix("spin_") not in Settings.model_fields} == set()
    for k, v in given.items(): monkeypatch.setenv(k, v)
    for o in secrets: shutil.copy(files / o, tmp_path)
    monkeypatch.setenv("SPIN_SECRETS_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    settings.cache_clear()
    try: cfg = settings()
    finally: settings.cache_clear()
    for field in ("redis_url", "postgres_url", "store_url", *(["token"] if "spin_token" in secrets else [])):
        assert getattr(cfg, field).get_secret_value() == (files / f"spin_{field}").read_text().strip()


@pytest.mark.parametrize("name", OURS)
def test_every_command_is_one_of_ours(name: str) -> None:
    program, *args = OURS[name]["command"]
    assert program == "myspinbot"
    command = [sys.executable, "-m", "myspinbot", *args, "--help"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def test_servers_are_waited_for_and_checked() -> None:
    healthy = dict.fromkeys(("redis", "postgres", "minio"), "service_healthy")
    waited = healthy | {"minio-setup": "service_completed_successfully"}
    for v in OURS.values(): assert {k: c["condition"] for k, c in v["depends_on"].items()} == waited
    for server in healthy: assert SERVICES[server]["healthcheck"]["test"]
    assert SERVICES["minio-setup"]["depends_on"] == {"minio": {"condition": "service_healthy"}}
    assert SERVICES["minio-setup"]["restart"] == "no" and SERVICES["minio-setup"]["image"] == SERVICES["minio"]["image"]
    assert all(re.search(r":(?!latest)[\w.-]+$", v["image"]) for k, v in SERVICES.items() if k not in OURS)


def test_nothing_must_be_filled_in_and_no_variable_holds_a_secret() -> None:
    lines = dict(o.split("=", 1) for o in (ROOT / "infra/env.example").read_text().splitlines() if re.match(r"\w+=", o))
    assert ":?" not in TEXT, "a variable without a default"
    for name in {*VARIABLE.findall(TEXT), *lines} - {"SPIN_LLM_BASE_URL"}: assert not PASSWORD.search(f"{name}="), name
    assert set(lines) <= set(VARIABLE.findall(TEXT)), "the example names what compose.yaml reads"


@pytest.mark.parametrize("name", SERVICES)
def test_no_secret_stands_in_an_environment_or_on_a_command_line(name: str) -> None:
    v = SERVICES[name]
    for k, value in v.get("environment", {}).items():
        is_path = k.endswith(("_FILE", "_DIR")) and value.startswith("/run/secrets")
        assert is_path or k == "SPIN_LLM_BASE_URL" or not PASSWORD.search(f"{k}={filled({k: value})[k]}"), k
    check = " ".join(v.get("healthcheck", {}).get("test", []))
    check = check.replace('REDISCLI_AUTH="$$(cat /run/secrets/redis_password)" ', "")  # the shell in the container reads it
    seen = json.dumps([v.get("command"), v.get("entrypoint"), check])
    assert not re.search(r"(?i)password|requirepass|token|/run/secrets", seen)


def test_every_secret_is_a_file_that_the_script_makes_and_git_and_the_image_do_not_see(files: Path) -> None:
    for name, source in SECRETS.items(): assert source == {"file": f"infra/secrets/{name}"}, "an owner of its own would be ignored"
    assert {p.name for p in files.iterdir()} == set(SECRETS)
    ignored = subprocess.run(["git", "check-ignore", "infra/secrets/spin_token"], cwd=ROOT, capture_output=True, text=True)
    assert ignored.returncode == 0
    assert (ROOT / "infra/Dockerfile.dockerignore").read_text().startswith("*\n")
    assert not any("secrets" in o for o in (ROOT / "infra/Dockerfile.dockerignore").read_text().splitlines())


def test_each_service_has_only_the_secrets_that_it_needs() -> None:
    holders = {o: {k for k, v in SERVICES.items() if o in v.get("secrets", [])} for o in SECRETS}
    assert {o: holders[o] for o in ROOTS} == ROOTS, "a superuser's password stays with its server"
    assert all(holders.values())
    for k, v in OURS.items(): assert all(o.startswith("spin_") for o in v["secrets"]), k
    for name in ("control", "worker"): assert "spin_token" not in OURS[name]["secrets"]
    assert holders["redis_password"] == {"redis"} and holders["postgres_password"] == {"postgres"}
    assert holders["minio_password"] == {"minio-setup"}
    assert not {"POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB", "MINIO_ROOT_PASSWORD"} & {
        k for v in SERVICES.values() for k in v.get("environment", {})}


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_closed_and_its_log_has_an_end(name: str) -> None:
    v = SERVICES[name]
    assert v["cap_drop"] == ["ALL"] and v["security_opt"] == ["no-new-privileges:true"] and "cap_add" not in v
    assert v["logging"] == {"driver": "json-file", "options": {"max-size": "10m", "max-file": "5"}}
    assert name in OURS or name == "minio" or v["user"] not in ("root", "0"), "MinIO's volumes belong to root"
    if name in {*OURS, "redis", "minio-setup"}: assert v["read_only"] is True and (v.get("volumes") or v.get("tmpfs"))


def test_what_is_mounted_from_the_checkout_is_there_and_read_only() -> None:
    mounted = [o for v in SERVICES.values() for o in v.get("volumes", []) if o.startswith(".")]
    assert len(mounted) == 4
    for o in mounted:
        source, _, mode = o.split(":")
        assert (ROOT / source).is_file() and mode == "ro", o


def test_the_scripts_pass_shellcheck() -> None:
    scripts = sorted((ROOT / "infra").glob("*.sh"))
    assert len(scripts) == 3
    subprocess.run([Path(sys.executable).parent / "shellcheck", *scripts], check=True)


def test_ports_are_published_to_this_machine_only() -> None:
    for v in SERVICES.values():
        for p in v.get("ports", []): assert p.startswith("127.0.0.1:")


def test_the_image_is_built_from_files_that_are_there_and_runs_without_root() -> None:
    text = (ROOT / OURS["control"]["build"]["dockerfile"]).read_text()
    lines = [o for o in text.splitlines() if o.startswith("COPY ") and "--from" not in o]
    copied = [source for o in lines for source in shlex.split(o)[1:-1]]
    for source in copied: assert (ROOT / source).exists(), source
    ignored = (ROOT / "infra/Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{s.rstrip('/')}" for s in copied} <= set(ignored)
    assert re.search(r"^USER (?!root|0)\S+", text, re.M)
    subprocess.run([str(Path(sys.executable).parent / "hadolint"), ROOT / "infra/Dockerfile"], check=True)
