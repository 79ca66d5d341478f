"""What a notebook is made of, found without running it: real notebooks, modules and packages in a folder."""
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from myspinbot.core import NotFound
from myspinbot.source import (
    CONTRACT, NotebookError, Sources, modules_hash, modules_of, owners, package_dir, settled, sources_of, without_comments,
)


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def notebook(path: Path, *cells: str) -> Path:
    made = [dict(cell_type="code", metadata={}, source=c, outputs=[], execution_count=None) for c in cells]
    return put(path, json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=made)))


def of(folder: Path, *cells: str) -> Sources: return sources_of(notebook(folder / "nb.ipynb", *cells))


def lead(folder: Path, *cells: str) -> tuple[str, ...]: return of(folder, *cells).leading


def old(*paths: Path) -> None:
    "Long written, so that what is read of them is kept."
    for p in paths: os.utime(p, ns=(10**18, 10**18))


def test_local_modules_are_found_wherever_the_import_stands(tmp_path: Path) -> None:
    for name in ("top", "inside", "literal", "dunder", "tried", "deep"): put(tmp_path / f"{name}.py", "")
    put(tmp_path / "top.py", "def f():\n    class A:\n        import deep\n")
    s = of(tmp_path, "import top, json, numpy", "def f():\n    if x:\n        import inside",
           "import importlib\nimportlib.import_module('literal')\n__import__('dunder')\nimportlib.import_module(name)",
           "try:\n    import tried\nexcept ImportError: import not_anywhere")
    assert list(s.modules) == ["deep", "dunder", "inside", "literal", "top", "tried"]
    assert s.modules["deep"] == str(tmp_path / "deep.py") and s.digests[s.modules["deep"]]
    assert s.distributions == {"not_anywhere": "", "numpy": owners()["numpy"]["numpy"]}


def test_packages_relative_imports_and_submodules(tmp_path: Path) -> None:
    put(tmp_path / "a" / "__init__.py", "")
    put(tmp_path / "a" / "b" / "__init__.py", "from . import near\nfrom .. import far\nfrom ..far2 import x")
    for name in ("b/c.py", "b/near.py", "far.py", "far2.py", "b/unused.py"): put(tmp_path / "a" / name, "x = 1")
    assert list(of(tmp_path, "import a.b.c").modules) == ["a", "a.b", "a.b.c", "a.b.near", "a.far", "a.far2"]
    assert list(of(tmp_path, "from a import far, not_a_module").modules) == ["a", "a.far"]
    put(tmp_path / "star" / "__init__.py", "__all__ = ['one']")
    put(tmp_path / "star" / "one.py", "")
    assert list(of(tmp_path, "from star import *").modules) == ["star", "star.one"]
    assert list(of(tmp_path, "from . import far\nfrom ...x import y").modules) == []


def test_namespace_packages_cycles_and_extensions(tmp_path: Path) -> None:
    put(tmp_path / "space" / "inner" / "mod.py", "import space.other")
    put(tmp_path / "space" / "other.py", "import space.inner.mod")
    (tmp_path / "fast.so").write_bytes(b"\x7fELF one")
    s = of(tmp_path, "import space.inner.mod, fast")
    assert list(s.modules) == ["fast", "space.inner.mod", "space.other"]
    (tmp_path / "fast.so").write_bytes(b"\x7fELF other")
    again = of(tmp_path, "import space.inner.mod, fast")
    assert again.digests[again.modules["fast"]] != s.digests[s.modules["fast"]]


def test_broken_unreadable_and_huge_files_count_by_their_bytes(tmp_path: Path) -> None:
    put(tmp_path / "broken.py", "def (")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nimport deep\nx = '\xe9'\n")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00import deep")
    put(tmp_path / "huge.py", "import deep\n" + "#" * (9 << 20))
    put(tmp_path / "deep.py", "")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    s = of(tmp_path, "import broken, binary, huge, gone")
    assert list(s.modules) == ["binary", "broken", "huge"] and all(s.digests.values())
    assert "gone" in s.distributions
    assert list(of(tmp_path, "import latin").modules) == ["deep", "latin"]


def test_a_file_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    put(tmp_path / "open.py", "")
    if os.geteuid(): put(tmp_path / "secret.py", "").chmod(0)
    else: (tmp_path / "secret.py").symlink_to("/proc/self/mem")  # root reads everything but this
    assert list(of(tmp_path, "import secret, open").modules) == ["open", "secret"]


def test_modules_in_an_archive_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "lib.zip", "w") as z:
        z.writestr("zipped/__init__.py", "from .part import x")
        z.writestr("zipped/part.py", "import wave\nx = 1")
    monkeypatch.syspath_prepend(str(tmp_path / "lib.zip"))
    s = of(tmp_path / "nbs", "import zipped")
    assert list(s.modules) == ["zipped", "zipped.part"] and len({s.digests[f] for f in s.modules.values()}) == 2
    assert s.leading == ("wave",)


def test_the_notebooks_folder_comes_before_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "lib" / "one.py", "")
    put(tmp_path / "lib" / "two.py", "")
    put(tmp_path / "nbs" / "one.py", "")
    put(tmp_path / "nbs" / "numpy.py", "")
    put(tmp_path / "nbs" / "sys.py", "")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    s = of(tmp_path / "nbs", "import one, two, sys, numpy")
    assert s.modules == {k: str(tmp_path / v) for k, v in dict(one="nbs/one.py", two="lib/two.py", numpy="nbs/numpy.py").items()}
    assert s.distributions == {} and s.leading == ("sys",)


def test_an_editable_install_is_local(tmp_path: Path) -> None:
    "As setuptools installs one: a finder on `sys.meta_path`, for a package in a folder of another name."
    put(tmp_path / "src" / "mypkg" / "__init__.py", "from . import part")
    put(tmp_path / "src" / "mypkg" / "part.py", "")
    finder = ("import sys\nfrom importlib.machinery import PathFinder\nfrom importlib.util import spec_from_file_location\n"
              f"class _EditableFinder:\n    @classmethod\n    def find_spec(cls, name, path=None, target=None):\n"
              f"        f = {str(tmp_path / 'src/mypkg/__init__.py')!r}\n"
              "        return spec_from_file_location(name, f) if name == 'mypkg' else None\n"
              "sys.meta_path.append(_EditableFinder)\n")
    nb = notebook(tmp_path / "nbs" / "nb.ipynb", "import mypkg")
    code = (f"{finder}\nfrom myspinbot.source import sources_of\ns = sources_of({str(nb)!r})\n"
            "print(list(s.modules), 'mypkg' in sys.modules)")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "['mypkg', 'mypkg.part'] False"


def test_ours_counts_but_for_the_contract(tmp_path: Path) -> None:
    s = of(tmp_path, "from myspinbot.media.talk import render\nfrom myspinbot.media.speech import speak\n"
           "from myspinbot import Step\n"
           "import myspinbot.core")
    assert {"myspinbot.media.talk", "myspinbot.media.sound"} < set(s.modules)
    assert not {f"myspinbot.{o}" for o in CONTRACT} & set(s.modules)
    for o in CONTRACT: assert (package_dir() / f"{o.replace('.', '/')}.py").is_file(), o
    assert "wave" in s.leading and "numpy" in s.leading
    assert modules_hash(["media.speech"]) == modules_hash(["media.speech", "media.sound"]) != modules_hash(["media.sound"])
    assert modules_of(["myspinbot.core"]).modules == {}


@pytest.mark.parametrize("written", [
    "from myspinbot.media import speak", "from myspinbot.speech import speak", "import myspinbot.speech",
    "from importlib import import_module\nimport_module('myspinbot.speech')"])
def test_a_name_of_ours_counts_as_the_module_that_it_comes_from(tmp_path: Path, written: str) -> None:
    s = of(tmp_path, f"{written}\nfrom myspinbot import Step, Image")
    assert set(s.modules) == set(of(tmp_path, "from myspinbot.media.speech import speak").modules)
    assert "myspinbot.media.talk" not in s.modules
    assert ("numpy" in s.leading) != ("import_module" in written)  # imports by a call are no leading ones


def test_magics_do_not_hide_imports(tmp_path: Path) -> None:
    for name in ("one", "two", "three", "four", "five"): put(tmp_path / f"{name}.py", "")
    s = of(tmp_path, "%matplotlib inline\nimport one\n!echo it's \\\n  'x\nif one:\n    %time import two\none.f?",
           "%%time\nimport three", "%%bash\nfor i in *; do import four; done",
           "x = !ls\nfor a in (1\n         % 2,):\n    import five",
           "%load_ext autoreload\n%autoreload 2\n?one\n'''\n%d items\n'''")
    assert list(s.modules) == ["five", "one", "three", "two"]
    assert of(tmp_path, "import one\nif (", "import two").modules.keys() == {"two"}


def test_scripts_are_sources_too(tmp_path: Path) -> None:
    put(tmp_path / "plain.py", "import beside")
    put(tmp_path / "beside.py", "")
    put(tmp_path / "sub" / "deep.py", "import near")
    put(tmp_path / "sub" / "near.py", "")
    put(tmp_path / "tools" / "__init__.py", "")
    put(tmp_path / "tools" / "__main__.py", "import beside")
    notebook(tmp_path / "other.ipynb", "import from_notebook")
    put(tmp_path / "from_notebook.py", "")
    s = of(tmp_path, "%run plain.py 3 --x", "%run -i sub/deep\n%run -m tools\n%run other.ipynb",
           "get_ipython().run_line_magic('run', 'plain.py')", "%run $name\n%run not_there.py\n%run '")
    assert s.scripts == {k: str(tmp_path / v) for k, v in
                         {"plain.py": "plain.py", "sub/deep": "sub/deep.py", "other.ipynb": "other.ipynb"}.items()}
    assert set(s.modules) == {"beside", "near", "tools", "tools.__main__", "from_notebook"}
    before = s.digests[s.scripts["sub/deep"]]
    put(tmp_path / "sub" / "deep.py", "import near\nx = 1")
    s = of(tmp_path, "%run sub/deep")
    assert s.digests[s.scripts["sub/deep"]] != before and set(s.modules) == {"near"}


def test_a_change_deep_in_the_closure_is_seen(tmp_path: Path) -> None:
    for i in range(20): put(tmp_path / f"m{i}.py", f"import m{i + 1}\n")
    last = put(tmp_path / "m20.py", "VALUE = 1\n")
    nb = notebook(tmp_path / "nb.ipynb", "import m0")
    old(*tmp_path.iterdir(), tmp_path)
    first = sources_of(nb)
    assert len(first.modules) == 21 and sources_of(nb) is first
    put(last, "VALUE = 222\n")
    second = sources_of(nb)
    assert second.digests[str(last)] != first.digests[str(last)]
    put(last, "VALUE = 333\n")  # the same size, perhaps in the same tick of the clock
    assert sources_of(nb).digests[str(last)] != second.digests[str(last)]
    put(last, "VALUE = 333  # a comment\n\n")
    assert sources_of(nb).digests[str(last)] != second.digests[str(last)]
    put(tmp_path / "m21.py", "")
    assert "m21" not in sources_of(nb).modules
    put(last, "import m21")
    assert "m21" in sources_of(nb).modules


def test_a_module_that_appears_or_goes_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "lib" / "late.py", "")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    nb = notebook(tmp_path / "nbs" / "nb.ipynb", "import late, later")
    old(*tmp_path.rglob("*"))
    first = sources_of(nb)
    assert first.modules == {"late": str(tmp_path / "lib/late.py")} and sources_of(nb) is first
    put(tmp_path / "nbs" / "late.py", "")
    assert sources_of(nb).modules["late"] == str(tmp_path / "nbs/late.py")
    put(tmp_path / "lib" / "later.py", "")
    assert list(sources_of(nb).modules) == ["late", "later"]
    (tmp_path / "nbs" / "late.py").unlink()
    assert sources_of(nb).modules["late"] == str(tmp_path / "lib/late.py")


def test_asking_again_is_cheap(tmp_path: Path) -> None:
    nb = notebook(tmp_path / "nb.ipynb", "from myspinbot.media.talk import render")
    old(nb, tmp_path)
    sources_of(nb)
    if not settled(sources_of(nb).watched): time.sleep(0.05)  # a file of the checkout was written just now
    sources_of(nb)
    times = []
    for _ in range(50):
        began = time.perf_counter()
        sources_of(nb)
        times.append(time.perf_counter() - began)
    assert sorted(times)[25] < 0.001


def test_versions_follow_what_is_installed(tmp_path: Path) -> None:
    "In a process whose site-packages hold a package that is upgraded meanwhile."
    home = tmp_path / "site-packages"
    put(home / "toylib" / "__init__.py", "")
    put(home / "toylib-1.0.dist-info" / "RECORD", "toylib/__init__.py,,\ntoylib-1.0.dist-info/METADATA,,\n")
    nb = notebook(tmp_path / "nb.ipynb", "def f():\n    from toylib import x")
    code = (f"import os, sys; sys.path.append({str(home)!r}); from myspinbot.source import sources_of\n"
            f"print(dict(sources_of({str(nb)!r}).distributions))\n"
            f"os.rename({str(home / 'toylib-1.0.dist-info')!r}, {str(home / 'toylib-1.1.dist-info')!r})\n"
            f"print(dict(sources_of({str(nb)!r}).distributions), dict(sources_of({str(nb)!r}).modules))")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == ["{'toylib': '1.0'}", "{'toylib': '1.1'} {}"]


def test_leading_imports_keep_their_order_and_take_submodules(tmp_path: Path) -> None:
    assert lead(tmp_path, '"A text."\nfrom __future__ import annotations\nimport json\nimport xml.dom.minidom',
                "size: int = 3\nnames: list[str] = ['a', -1]\nother = {'a': None}",
                "from PIL import Image, not_there\nimport json",
                "def f(x: int = 1) -> int:\n    import wave\nclass A(Base):\n    x = 1\n    def g(self): import wave",
                "from os import path\nimport decimal") == ("json", "xml.dom.minidom", "PIL", "PIL.Image", "os", "decimal")


@pytest.mark.parametrize("effect", [
    "import os\nos.environ['OMP_NUM_THREADS'] = '1'", "x = f()", "%matplotlib inline", "!pip list", "%%time\nx = 1", "if x: pass",
    "for a in b: pass", "with a: pass", "@f\ndef g(): pass", "def g(x=f()): pass", "class A(f()): pass", "class A:\n    f()",
    "class A(metaclass=M): pass", "x.y = 1", "x[0] = 1", "x += 1", "del x", "try: import a\nexcept E: pass", "x = y",
    "f'{x}'", "(",
    "import not_anywhere_at_all", "raise SystemExit", "print(1)", "a: f() = 1"])
def test_a_notebooks_leading_imports_end_at_the_first_effect(tmp_path: Path, effect: str) -> None:
    assert lead(tmp_path, "import json", effect, "import numpy") == (("json", "os") if "environ" in effect else ("json",))
    assert "numpy" not in lead(tmp_path, f"import json\n{effect}\nimport numpy")


@pytest.mark.parametrize(("source", "found"), [
    ("import wave\nlog = get('x')\nX: int = f(1)\n@patch\ndef g(): pass\nimport decimal", ("wave", "decimal", "numpy")),
    ("KNOWN = {}\nKNOWN['a'] = 1\nif __name__ == '__main__': main()\nimport wave", ("wave", "numpy")),
    ("import os, wave\nos.environ['A'] = '1'\nimport decimal", ("os", "wave")),
    ("import wave\ndef setup():\n    os.putenv('A', '1')\nimport decimal", ("wave",)),
    ("from os import environ\nenviron.setdefault('A', '1')\nimport decimal", ("os",)),
    ("import matplotlib\nmatplotlib.use('Agg')\nimport matplotlib.pyplot", ("matplotlib",)),
    ("import matplotlib\nmatplotlib.rcParams['a'] = 1\nimport decimal", ("matplotlib",)),
    ("import wave\nsetup()", ("wave",)), ("import wave\nfor a in b: pass\nimport decimal", ("wave",)), ("def (", ())])
def test_a_local_modules_leading_imports_end_at_its_first_effect_and_so_do_its_importers(tmp_path: Path, source: str,
                                                                                        found: tuple[str, ...]) -> None:
    put(tmp_path / "inner.py", source)
    put(tmp_path / "outer.py", "import inner\nimport csv")
    whole = source.startswith(("import wave\nlog", "KNOWN"))
    expected = (*found[:-1], "csv", "numpy") if whole else found
    assert lead(tmp_path, "import outer\nimport numpy") == expected


def test_a_text_with_blank_lines_is_not_the_same_text(tmp_path: Path) -> None:
    one, two = 'x = """a\n\nb"""\n', 'x = """a\nb"""\n'
    assert without_comments(one) != without_comments(two)
    assert without_comments('x = """a  \nb"""') != without_comments('x = """a\nb"""')
    assert without_comments("x = 1\x0c\ny = '#1'") != without_comments("x = 1\x0c\ny = '#2'")
    assert without_comments("x = 1\r\n\r\n# a\r\ny = 2") == without_comments("x = 1\ny = 2  # b")


def test_a_notebook_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"No notebook .*gone.ipynb"): sources_of(tmp_path / "gone.ipynb")
    with pytest.raises(NotebookError, match=r"torn.ipynb is no notebook"): sources_of(put(tmp_path / "torn.ipynb", "{"))


def test_nothing_is_imported(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    for name in ("loud/__init__.py", "loud/part.py"): put(tmp_path / name, f"open({str(witness)!r}, 'w').close()\n")
    assert list(of(tmp_path, "import loud.part").modules) == ["loud", "loud.part"] and not witness.exists()
