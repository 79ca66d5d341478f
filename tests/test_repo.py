"""The checkout agrees with itself: notebooks are clean, package and README are what they export, the layers hold."""
import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDERS = ("nbs", "pipelines", "dashboards")
HEAVY = ("torch", "ai_edge_litert", "av", "cv2", "onnx", "onnxruntime", "piper", "ncnn", "skimage", "scipy", "matplotlib",
         "psycopg", "redis", "minio", "langgraph", "papermill", "fastapi", "uvicorn", "boto3", "playwright", "numpy", "PIL",
         "zmq", "nbclient", "ipykernel")


def notebooks(*folders: str) -> list[Path]:
    return sorted(p for f in folders for p in (ROOT / f).rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def tool(name: str, *args: str, cwd: Path = ROOT) -> str:
    command = [str(Path(sys.executable).parent / name), *args]
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{name}: {run.stdout[-4000:]}{run.stderr[-4000:]}"
    return run.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    "A copy of what nbdev reads and writes, so that a check never changes the checkout."
    skip = shutil.ignore_patterns("__pycache__", ".ipynb*", "spin-steps")
    for f in (*FOLDERS, "myspinbot"): shutil.copytree(ROOT / f, tmp_path / f, ignore=skip)
    for f in ("pyproject.toml", "settings.ini", "setup.py", "README.md", "LICENSE"): shutil.copy(ROOT / f, tmp_path / f)
    return tmp_path


def differing(copy: Path, *folders: str) -> list[str]:
    "Files that are not the same in the copy and in the checkout."
    seen = {p.relative_to(top) for top in (ROOT, copy) for f in folders for p in (top / f).rglob("*")
            if p.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)}
    read = lambda p: p.read_bytes() if p.is_file() else None
    return sorted(str(p) for p in seen if read(ROOT / p) != read(copy / p))


def test_notebooks_are_clean(copy: Path) -> None:
    for f in FOLDERS: tool("nbdev-clean", "--fname", str(copy / f), cwd=copy)
    assert differing(copy, *FOLDERS) == [], "run: make check"


def test_notebooks_carry_no_state_of_widgets() -> None:
    for p in notebooks(*FOLDERS):
        assert set(json.loads(p.read_text())["metadata"]) <= {"kernelspec", "language_info", "myspinbot", "title"}, p


def test_cleaning_keeps_the_tags_that_papermill_and_the_catalogue_read(copy: Path) -> None:
    def tags() -> dict[str, list[list[str]]]:
        return {p.name: [c["metadata"].get("tags", []) for c in json.loads(p.read_text())["cells"]]
                for p in (copy / "pipelines").rglob("*.ipynb")}
    before = tags()
    tool("nbdev-clean", "--fname", str(copy / "pipelines"), cwd=copy)
    assert before == tags()
    for name, cells in before.items(): assert ["parameters"] in cells, f"{name} has no cell tagged parameters"


def test_the_package_is_what_the_notebooks_export(copy: Path) -> None:
    for p in (copy / "myspinbot").rglob("*.py"):
        if not p.name.startswith("__"): p.unlink()
    tool("nbdev-export", cwd=copy)
    assert differing(copy, "myspinbot") == [], "run: nbdev-export"


def test_readme_is_what_the_index_notebook_says() -> None:
    from myspinbot.dev import build_readme
    assert build_readme(ROOT, check=True) == [], "run: make readme"


def test_the_drawings_show_the_pipeline_as_it_is() -> None:
    from myspinbot.graph.catalogue import Catalogue
    drawn = Catalogue(ROOT / "pipelines").pipeline("talking_portrait")._repr_html_()
    assert (ROOT / "nbs/images/pipeline.svg").read_text() == drawn
    cells = json.loads((ROOT / "pipelines/talking_portrait.ipynb").read_text())["cells"]
    shown = [o["data"]["text/html"] for c in cells for o in c.get("outputs", ()) if "text/html" in o.get("data", {})]
    assert ["".join(o) for o in shown] == [drawn]


def settings() -> dict[str, str]:
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(ini["DEFAULT"])


def pins() -> list[Requirement]:
    lines = (ROOT / "infra/constraints.txt").read_text().splitlines()
    return [Requirement(o) for o in lines if not o.startswith("#")]


def test_constraints_are_names_and_versions() -> None:
    for line in (ROOT / "infra/constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"# {1,4}[\w .]+:?|[a-z0-9-]+==[\w.]+( ; [\w .'=<>!*]+)?", line), line


def test_every_requirement_allows_its_pin_and_has_one() -> None:
    cfg = settings()
    groups = {k: [Requirement(o) for o in v.splitlines() if o.strip()] for k, v in cfg.items() if k.endswith("requirements")}
    assert set(groups) == {"requirements", "media_requirements", "embedded_requirements", "dev_requirements"}
    for need in (o for held in groups.values() for o in held):
        held = [str(p.specifier).removeprefix("==") for p in pins() if p.name == canonicalize_name(need.name)]
        assert held and all(need.specifier.contains(v) for v in held), f"{need}: {held}"


def test_every_install_takes_the_constraints() -> None:
    for name in ("Makefile", "infra/Dockerfile"):
        installs = [o for o in (ROOT / name).read_text().splitlines() if "pip install" in o and "apt-get" not in o]
        assert installs and all("-c infra/constraints.txt" in o for o in installs), name
    meta = re.search(r"^META .*", (ROOT / "Makefile").read_text(), re.M).group()
    assert "infra/constraints.txt" in meta, "a changed version is installed by the next make"


def test_metadata_makefile_and_ci_name_the_same_pythons() -> None:
    wanted = SpecifierSet(settings()["python"])
    for name in ("Makefile", ".ci/run"):
        low, high = re.search(r"not \((3, \d+)\) <= sys\.version_info\[:2\] <= \((3, \d+)\)", (ROOT / name).read_text()).groups()
        minors = range(int(low.split()[-1]), int(high.split()[-1]) + 1)
        assert [n for n in range(30) if wanted.contains(f"3.{n}.9")] == list(minors), name
    asks = (ROOT / "myspinbot/cli/doctor.py").read_text()
    low, high = re.search(r"\((3, \d+)\) <= sys\.version_info\[:2\] <= \((3, \d+)\)", asks).groups()
    assert wanted == SpecifierSet(f">={low.replace(', ', '.')},<3.{int(high.split()[-1]) + 1}"), "what doctor asks for"
    image = re.findall(r"^FROM python:(\d+\.\d+)-", (ROOT / "infra/Dockerfile").read_text(), re.M)
    assert image and all(wanted.contains(o) for o in image)


def test_the_list_of_third_party_software_is_whole_and_current() -> None:
    from myspinbot.dev import build_third_party
    assert build_third_party(ROOT, check=True) == [], "run: make third-party"


def test_ffmpeg_calls_itself_lgpl_and_is_linked_to_x264() -> None:
    said = tool("python", "-m", "av", "--version")
    assert "library license: LGPL version 3 or later" in said
    assert "--enable-libx264" in said and "--enable-gpl" not in said
    codecs = next(o for o in distribution("av").files if o.name.startswith("libavcodec"))
    assert re.search(rb"libx264[-.][\w.]*(so|dylib)", codecs.locate().read_bytes()), "the file that the loader is asked for"


def test_pyproject_has_no_project_table() -> None:
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "project" not in tables, "metadata and requirements belong in settings.ini"


def test_layers_hold() -> None:
    tool("lint-imports", "--no-cache")


CHAPTERS = ("graph", "bridge", "store", "executor", "jobs", "language", "media", "control", "api", "ui", "cli")


def exported() -> dict[str, Path]:
    "Module, such as `graph.spec` -> its notebook, in the order of their names."
    first = {p: next(iter(json.loads(p.read_text())["cells"]), {}) for p in notebooks("nbs")}
    named = {p: re.match(r"#\| default_exp ([\w.]+)$", "".join(c.get("source", ""))) for p, c in first.items()}
    return {m[1]: p for p, m in named.items() if m}


def test_every_notebook_has_its_place_and_every_module_its_notebook() -> None:
    nbs = ROOT / "nbs"
    assert {p.name for p in nbs.iterdir() if p.is_dir() and p.name[0] not in "._"} == {"images", *CHAPTERS}
    for folder in (nbs, *(nbs / o for o in CHAPTERS)):
        numbers = [p.name[:2] for p in folder.glob("*.ipynb") if p.name != "index.ipynb"]
        assert len(numbers) == len(set(numbers)) and all(o.isdigit() for o in numbers), f"{folder.name}: {sorted(numbers)}"
        if folder != nbs: assert sorted(map(int, numbers)) == list(range(len(numbers))), folder.name
    for module, path in ((m, p.relative_to(nbs)) for m, p in exported().items()):
        assert module == ".".join((*path.parent.parts, path.stem[3:])), f"{path} exports {module}"
    made = {p.relative_to(ROOT / "myspinbot").with_suffix("") for p in (ROOT / "myspinbot").rglob("*.py")}
    assert {".".join(o.parts) for o in made if o.name[0] != "_"} == set(exported()) != set()


def test_tests_look_into_every_chapter() -> None:
    from test_lessons import NOTEBOOKS
    find = ["find", "nbs", "-name", "*.ipynb", "-not", "-path", "*/.ipynb_checkpoints/*"]
    held = sorted(subprocess.run(find, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())
    for seen in (NOTEBOOKS, notebooks("nbs")): assert held == sorted(str(p.relative_to(ROOT)) for p in seen)
    assert {p.split("/")[1] for p in held if p.count("/") > 1} == set(CHAPTERS)


def test_a_chapter_is_read_without_looking_ahead() -> None:
    "A module imports from its chapter only what stands in notebooks before its own."
    order = {module: i for i, module in enumerate(exported())}
    for module, place in order.items():
        package = module.rpartition(".")[0]
        tree = ast.parse((ROOT / "myspinbot" / f"{module.replace('.', '/')}.py").read_text())
        for n in tree.body:
            if not isinstance(n, ast.ImportFrom) or n.level != 1: continue
            for near in [n.module] if n.module else [a.name for a in n.names]:
                near = f"{package}.{near}".strip(".")
                assert order.get(near, -1) < place, f"{module} imports {near}, which comes later"


def late_attributes() -> list[str]:
    "Attributes of classes that neither `__init__` nor what it calls gives them."
    born: dict[str, set[str]] = {}
    later: list[tuple[str, str, set[str]]] = []
    def own(fn: ast.AST, context: type) -> set[str]:
        me = fn.args.args[0].arg if fn.args.args else ""
        return {n.attr for n in ast.walk(fn) if isinstance(n, ast.Attribute) and isinstance(n.ctx, context)
                and isinstance(n.value, ast.Name) and n.value.id == me}
    for p in sorted((ROOT / "myspinbot").rglob("*.py")):
        for n in ast.parse(p.read_text()).body:
            if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and any(ast.unparse(o) == "patch" for o in n.decorator_list):
                later.append((ast.unparse(n.args.args[0].annotation), n.name, own(n, ast.Store)))
            if not isinstance(n, ast.ClassDef): continue
            methods = {o.name: o for o in n.body if isinstance(o, ast.FunctionDef | ast.AsyncFunctionDef)}
            first = [methods[o] for o in ("__new__", "__init__", "initialize") if o in methods]  # tornado calls `initialize`
            called = {a for o in first for a in own(o, ast.Load)}
            names = {t.id for o in n.body if isinstance(o, ast.Assign | ast.AnnAssign)
                     for t in ast.walk(o) if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store)}
            names |= {a for o in first for a in own(o, ast.Store)}
            born[n.name] = names.union(*(born.get(ast.unparse(b), set()) for b in n.bases))
            later += [(n.name, k, own(o, ast.Store)) for k, o in methods.items() if k not in called]
    return [f"{c}.{a} in {m}" for c, m, found in later for a in sorted(found - born.get(c, set()))]


def test_every_attribute_is_born_in_init() -> None:
    assert late_attributes() == []


def test_chapters_offer_what_they_have() -> None:
    for name in ("", *CHAPTERS):
        package = importlib.import_module(f"myspinbot.{name}".strip("."))
        for o in getattr(package, "_HOME", {}): assert getattr(package, o).__name__ == o, f"{name}.{o}"


def test_old_names_of_modules_work_with_a_warning() -> None:
    import myspinbot
    for old in myspinbot._MOVED:
        places = myspinbot._parts(f"myspinbot.{old}")
        parts = [*map(importlib.import_module, places)]
        sys.modules.pop(f"myspinbot.{old}", None)
        with pytest.warns(DeprecationWarning, match=f"myspinbot.{old} is {places[0]}"):
            found = importlib.import_module(f"myspinbot.{old}")
        if len(parts) == 1: assert found is parts[0]
        for p in parts: assert not [o for o in p.__all__ if getattr(found, o) is not getattr(p, o) and o != "log"]
    with pytest.raises(ModuleNotFoundError, match="No module named 'myspinbot.nothing'"):
        importlib.import_module("myspinbot.nothing")


CHEAP = ["myspinbot", "myspinbot.schema", "myspinbot.graph.catalogue", "myspinbot.graph.plan", "myspinbot.media",
         "myspinbot.ui.page", "myspinbot.api.client", "myspinbot.jobs.worker", "myspinbot.cli.app"]


@pytest.mark.parametrize("module", CHEAP)
def test_import_loads_nothing_heavy(module: str) -> None:
    code = (f"import sys, time; t = time.perf_counter(); import {module}; dt = time.perf_counter() - t; "
            f"print(sorted(set({HEAVY!r}) & set(sys.modules)), dt)")
    runs = [tool("python", "-c", code).strip().rsplit(" ", 1) for _ in range(3)]
    assert runs[0][0] == "[]", f"import {module} loads {runs[0][0]}"
    assert module != "myspinbot" or min(float(dt) for _, dt in runs) < 0.3


def test_an_installed_package_brings_its_pipelines_and_dashboards(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "wheels"
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    out.mkdir()
    tool("python", "-c", build, str(out), cwd=copy)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as z: held = set(z.namelist())
    wanted = {f"myspinbot/{p.relative_to(ROOT)}" for p in notebooks("pipelines", "dashboards")}
    wanted.add("myspinbot/dashboards/voila/templates/spin/index.html.j2")
    assert wanted <= held
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "myspinbot").rglob("*.py")} <= held
    assert not any(n.startswith(("tests/", "nbs/")) for n in held)


def test_no_file_of_a_local_tool_is_tracked() -> None:
    if not (ROOT / ".git").exists(): return
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    banned = ("uv.lock", ".env", ".ipynb_checkpoints", "__pycache__")
    assert [t for t in tracked if any(os.path.basename(t) == b or f"{b}/" in t for b in banned)] == []
