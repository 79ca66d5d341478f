"""Steps and pipelines read from notebooks as people write, break and change them."""
import json
import os
from pathlib import Path
from typing import Any

import pytest

from myspinbot.graph.catalogue import Catalogue, Declined, approve, catalogue, control_step, using
from myspinbot.core import ConfigError, GraphError, NotFound, SpinError
from myspinbot.schema import Image
from myspinbot.source import NotebookError, package_dir
from myspinbot.graph.spec import load_step, parse_parameters, source_hash


def write(path: Path, *cells: Any, meta: Any = None, **info: Any) -> Path:
    "A notebook of (tag, source) code cells and str Markdown cells; keyword arguments are its `myspinbot` metadata."
    def cell(c: Any) -> dict[str, Any]:
        if isinstance(c, str): return dict(cell_type="markdown", metadata={}, source=c)
        tags = dict(tags=[c[0]]) if c[0] else {}
        return dict(cell_type="code", metadata=tags, source=c[1].splitlines(True), outputs=[], execution_count=None)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = dict(meta or {}, **({"myspinbot": info} if info else {}))
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=metadata, cells=[cell(c) for c in cells])))
    return path


def add_step(root: Path, id: str = "demo.shout", *more: Any, params: str = 'text: str = "hi"', **info: Any) -> Path:
    return write(root / "steps" / f"{id.replace('.', '_')}.ipynb", "# Shout\n\nLoud.", ("parameters", params), *more,
                 **{"id": id, "outputs": {"text": "str"}, **info})


@pytest.mark.parametrize(("src", "said"), [
    ("a: int = f()", "line 1: The default of 'a', 'f()', is not a literal"),
    ("a: int = 1\nb: int", "line 2: 'b' has no default"),
    ("a: Picture = ''", "Unknown type 'Picture'"),
    ("a: int = 1.5", "which is not int"),
    ("a: bool = 1", "which is not bool"),
    ("import os", "'import os' is not a parameter"),
    ("a = b = 1", "is not a parameter"),
    ("a, b = 1, 2", "is not a parameter"),
    ("a: int = 1\na: int = 2", "line 2: 'a' is set twice"),
    ("a: int = (1", "line 1: '(' was never closed"),
    ("%time a = 1", "line 1: invalid syntax"),
    ("BIG: int = 1", "'BIG' is no name"),
    ("a: list[int] = [1, 'x']", "which is not list[int]"),
])
def test_bad_parameters_cell_is_told_by_line(src: str, said: str) -> None:
    with pytest.raises(NotebookError) as e: parse_parameters(src, "x.ipynb, cell 3")
    assert str(e.value).startswith("x.ipynb, cell 3, ") and said in str(e.value)


def test_parameters_of_every_type_keep_default_and_help() -> None:
    ports = parse_parameters('''"""Inputs"""
image: Image = ""  # a face
n: int = -3
x: float = 1  # a # b
on: bool = True
names: list[str] = ["a"]
more: dict = {"a": {"b": None}}
pair: list = (1, 2)
# a long
# explanation
text: str = """two
lines"""  # of text
free = None
''')
    assert [(p.name, p.type, p.default, p.help) for p in ports] == [
        ("image", "Image", "", "a face"), ("n", "int", -3, ""), ("x", "float", 1.0, "a # b"), ("on", "bool", True, ""),
        ("names", "list[str]", ["a"], ""), ("more", "dict", {"a": {"b": None}}, ""), ("pair", "list", [1, 2], ""),
        ("text", "str", "two\nlines", "of text"), ("free", "any", None, "")]
    assert not any(p.required for p in ports)


def test_step_notebook_gives_its_spec(tmp_path: Path) -> None:
    path = add_step(tmp_path, version="2", queue="gpu", needs={"vram_gb": 8, "models": ["wan"]}, kernel="resident",
                    timeout_s=30)
    spec = load_step(path)
    assert (spec.id, spec.version, spec.queue, spec.kernel, spec.title, spec.description) == (
        "demo.shout", "2", "gpu", "resident", "Shout", "Loud.")
    assert spec.needs.models == ("wan",) and spec.kind == "notebook" and len(spec.source_hash) == 64


@pytest.mark.parametrize(("info", "said"), [
    ({}, "no `myspinbot` entry"),
    ({"outputs": {}}, "no `id`"),
    ({"id": "Shout"}, "id='Shout'"),
    ({"id": "a.b", "outputs": {"v": "movie"}}, "output 'v': Unknown type 'movie'"),
    ({"id": "a.b", "retrys": 3}, "Did you mean retries?"),
    ({"id": "a.b", "timeout_s": -1}, "timeout_s=-1"),
    ({"id": "a.b", "title": "x"}, "title cannot be set there"),
])
def test_bad_metadata_is_told_by_field(tmp_path: Path, info: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "bad.ipynb", ("parameters", "a: int = 1"), **info)
    with pytest.raises(NotebookError, match="bad.ipynb") as e: load_step(path)
    assert said in str(e.value)


def test_two_parameters_cells_none_or_an_empty_one(tmp_path: Path) -> None:
    two = write(tmp_path / "two.ipynb", ("parameters", "a: int = 1"), "text", ("parameters", "b: int = 1"), id="a.b")
    with pytest.raises(NotebookError, match="cells 1, 3 are tagged"): load_step(two)
    with pytest.raises(NotebookError, match="no cell is tagged"):
        load_step(write(tmp_path / "none.ipynb", (None, ""), id="a.b"))
    assert load_step(write(tmp_path / "empty.ipynb", ("parameters", ""), id="a.b")).inputs == ()


def test_other_language_and_no_notebook_at_all(tmp_path: Path) -> None:
    path = write(tmp_path / "r.ipynb", ("parameters", "a <- 1"), meta={"kernelspec": {"language": "R"}}, id="a.b")
    with pytest.raises(NotebookError, match="its kernel speaks R"): load_step(path)
    (tmp_path / "half.ipynb").write_text('{"cells": [')
    with pytest.raises(NotebookError, match="is no notebook"): load_step(tmp_path / "half.ipynb")
    (tmp_path / "old.ipynb").write_text('{"nbformat": 3, "worksheets": []}')
    with pytest.raises(NotebookError, match="format 3, not 4"): load_step(tmp_path / "old.ipynb")
    with pytest.raises(NotFound, match="No notebook"): load_step(tmp_path / "gone.ipynb")


def test_source_hash_follows_code_and_imported_modules_only(tmp_path: Path) -> None:
    def of(*cells: Any) -> str:
        return source_hash(write(tmp_path / f"{len(list(tmp_path.iterdir()))}.ipynb", *cells, id="a.b"))
    base = of((None, "x = 1"), (None, "from myspinbot.graph.builder import Pipeline"))
    assert base == of("# Title", (None, "x = 1  # better said\n\n"), (None, "from myspinbot.graph.builder import Pipeline"))
    assert base != of((None, "x = 2"), (None, "from myspinbot.graph.builder import Pipeline"))
    assert of((None, "x = '#1'")) != of((None, "x = '#2'"))
    assert of((None, "import myspinbot.core")) != of((None, "import os"))


def test_source_hash_sees_a_change_two_imports_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "myspinbot"
    package.mkdir()
    for name, src in dict(__init__="", near="from .far import f", far="f = 1", core="version = 1").items():
        (package / f"{name}.py").write_text(src)
    monkeypatch.syspath_prepend(str(tmp_path))
    def change(name: str, src: str) -> str:
        (package / f"{name}.py").write_text(src)
        return source_hash(nb)
    nb = write(tmp_path / "a.ipynb",
               (None, "if True:\n    from myspinbot import near\nfrom myspinbot.core import version"), id="a.b")
    first = source_hash(nb)
    assert change("core", "version = 22") == first
    assert change("far", "f = 1  # one") == first
    assert change("far", "f = 22") != first


def test_catalogue_follows_the_files(tmp_path: Path) -> None:
    cat = Catalogue(tmp_path)
    assert "demo.shout" not in cat.steps()
    path = add_step(tmp_path)
    assert cat.step("demo.shout").inputs[0].default == "hi" and cat.notebook("demo.shout") == path
    add_step(tmp_path, params='text: str = "hello"')
    assert cat.step("demo.shout").inputs[0].default == "hello"
    path.unlink()
    with pytest.raises(NotFound, match=r"Unknown step 'demo.shout'\."): cat.step("demo.shout")


def test_one_broken_notebook_does_not_hide_the_others(tmp_path: Path) -> None:
    add_step(tmp_path)
    add_step(tmp_path, "demo.cut", params="x: int = ")
    add_step(tmp_path, "demo.copy").rename(tmp_path / "steps" / "other.ipynb")
    write(tmp_path / "steps" / "zz.ipynb", ("parameters", ""), id="demo.shout")
    (tmp_path / "steps" / ".ipynb_checkpoints").mkdir()
    cat = Catalogue(tmp_path)
    assert {"demo.shout", "demo.copy"} <= set(cat.steps()) and "demo.cut" not in cat.steps()
    errors = {Path(k).name: str(v) for k, v in cat.errors().items() if k.endswith(".ipynb")}
    assert "its id 'demo.shout' is that of demo_shout.ipynb" in errors["zz.ipynb"]
    with pytest.raises(NotebookError, match=r"demo_cut.ipynb, cell 2, line 1: invalid syntax"): cat.step("demo.cut")


def test_control_step_ports_come_from_the_signature(tmp_path: Path) -> None:
    @control_step("test.ports", outputs={"video": "video/mp4"}, retries=2)
    async def ports(ctx: Any,
        image: Image,             # a face
        names: list[str] = ["a"],  # noqa: B006
        free=None,
    ) -> dict[str, Any]:
        "Do it."
        return {}
    cat = Catalogue(tmp_path)
    spec = cat.step("test.ports")
    assert [(p.name, p.type, p.required, p.default) for p in spec.inputs] == [
        ("image", "Image", True, None), ("names", "list[str]", False, ["a"]), ("free", "any", False, None)]
    assert (spec.inputs[0].help, spec.description, spec.title) == ("a face", "Do it.", "Ports") and spec.source_hash
    assert cat.control("test.ports") is ports
    with pytest.raises(NotFound, match="has no notebook"): cat.notebook("test.ports")
    with pytest.raises(GraphError, match="the id is that of"):
        @control_step("test.ports", outputs={})
        async def other(ctx: Any) -> dict[str, Any]: return {}
    with pytest.raises(NotebookError, match="retries=-1"): control_step("test.bad", {}, retries=-1)(ports)


def test_declined_approval_is_an_error() -> None:
    import asyncio

    class Context:
        def __init__(self, answer: bool): self.answer = answer
        async def wait_approval(self, prompt: str, show: Any) -> bool: return self.answer
    assert asyncio.run(approve(Context(True), "Go on?", "x")) == {"approved": True}
    with pytest.raises(Declined, match=r"Declined: Go on\?") as e: asyncio.run(approve(Context(False), "Go on?"))
    assert isinstance(e.value, SpinError) and not e.value.retryable


def test_pipeline_is_built_by_its_tagged_cells_only(tmp_path: Path) -> None:
    add_step(tmp_path)
    build = 'from myspinbot.graph.builder import Pipeline\np = Pipeline("loud")\np.step("demo.shout", text=p.param("text"))'
    write(tmp_path / "loud.ipynb", ("parameters", 'text: str = "hi"'), ("pipeline", build), (None, "raise SystemExit"))
    write(tmp_path / "wrong.ipynb", ("pipeline", build.replace("text=", "txt=")))
    cat = Catalogue(tmp_path)
    assert list(cat.pipelines()) == ["loud", "wrong"]
    assert [n.step for n in cat.pipeline("loud").to_graph().nodes] == ["demo.shout"]
    with pytest.raises(GraphError, match="Did you mean text"): cat.pipeline("wrong")
    with pytest.raises(NotFound, match="Did you mean loud"): cat.pipeline("lout")
    write(tmp_path / "late.ipynb", ("pipeline", "x = 1"), ("pipeline", "\nfrom nowhere_at_all import y"))
    with pytest.raises(NotebookError, match="late.ipynb, cell 2, line 2: ModuleNotFoundError"): cat.pipeline("late")
    write(tmp_path / "both.ipynb", ("pipeline", f"{build}\nq = Pipeline('other')"))
    with pytest.raises(NotebookError, match="p, q have a `to_graph"): cat.pipeline("both")


def test_default_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from myspinbot.core import settings
    assert catalogue().dir == package_dir().parent / "pipelines"
    with using(Catalogue(tmp_path)) as mine: assert catalogue() is mine
    monkeypatch.setenv("SPIN_PIPELINES_DIR", str(tmp_path / "gone"))
    settings.cache_clear()
    try:
        with pytest.raises(ConfigError, match="SPIN_PIPELINES_DIR"): catalogue()
    finally:
        monkeypatch.undo()
        settings.cache_clear()


def test_looking_again_is_cheap(tmp_path: Path) -> None:
    for i in range(30): add_step(tmp_path, f"demo.s{i}")
    cat = Catalogue(tmp_path)
    first = cat.steps()
    assert all(cat.steps()[k] is first[k] for k in first)
    os.utime(tmp_path / "steps" / "demo_s0.ipynb", ns=(1, 1))
    assert cat.steps()["demo.s0"] is not first["demo.s0"]
