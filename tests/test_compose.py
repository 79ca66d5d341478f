"""What compose.yaml starts exists: settings, commands, files; and no secret stands in it."""
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from myspinbot.core import Settings

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "compose.yaml").read_text()
SERVICES = yaml.safe_load(TEXT)["services"]
OURS = {k: v for k, v in SERVICES.items() if v["image"].startswith("myspinbot:")}
REQUIRED = re.compile(r"\$\{(\w+):\?([^}]+)\}")


def filled(values: dict[str, str]) -> dict[str, str]:
    "The environment as it is with every variable at its default or, without one, at `x7`."
    plain = {k: REQUIRED.sub("x7", v) for k, v in values.items()}
    return {k: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", v) for k, v in plain.items()}


def test_control_api_worker_and_studio_share_one_image() -> None:
    assert {"control", "api", "worker", "studio"} <= set(OURS)
    assert len({str(v["build"]) + v["image"] for v in OURS.values()}) == 1


@pytest.mark.parametrize("name", OURS)
def test_every_setting_is_one_that_the_program_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = filled(OURS[name]["environment"])
    unknown = {k for k in given if k.removeprefix("SPIN_").lower() not in Settings.model_fields}
    assert unknown == set()
    for k, v in given.items(): monkeypatch.setenv(k, v)
    cfg = Settings(_env_file=None)
    assert cfg.redis_url.get_secret_value() == "redis://:x7@redis:6379/0" and cfg.store_url.get_secret_value().startswith("s3://x7:x7@minio:9000/spin?")


@pytest.mark.parametrize("name", OURS)
def test_every_command_is_one_of_ours(name: str) -> None:
    program, *args = OURS[name]["command"]
    assert program == "myspinbot"
    command = [sys.executable, "-m", "myspinbot.cli", *args, "--help"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def test_servers_are_waited_for_and_checked() -> None:
    for v in OURS.values(): assert {k: c["condition"] for k, c in v["depends_on"].items()} == dict.fromkeys(
        ("redis", "postgres", "minio"), "service_healthy")
    for server in ("redis", "postgres", "minio"): assert SERVICES[server]["healthcheck"]["test"]


def test_every_required_variable_is_in_the_example_and_has_no_value_there() -> None:
    lines = dict(o.split("=", 1) for o in (ROOT / "infra/env.example").read_text().splitlines() if re.match(r"\w+=", o))
    for name, told in REQUIRED.findall(TEXT):
        assert lines[name] == "", f"{name} has a value in the example"
        assert name in told, "the message names the variable"
    assert not re.findall(r"(?i)(password|secret|key): (?!\$\{)\S", TEXT)


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
