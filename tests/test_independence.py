"""A result does not depend on what ran before: whatever a notebook changes goes with its process."""
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
from farm import wait_for

from myspinbot.graph.catalogue import Catalogue
from myspinbot.executor.engine import RunRecord, run_notebook
from myspinbot.executor.launcher import Launcher
from myspinbot.executor.pool import KernelPool
from myspinbot.jobs.local import LocalRunner
from myspinbot.schema import Graph, Node, PortRef

CHANGES = {  # what one notebook does, and what another one shows
    "decimal precision": ("import decimal; decimal.getcontext().prec = 3",
                          "import decimal; print(decimal.Decimal(1) / 3)"),
    "a constant of a module": ("import math; math.pi = 3", "import math; print(math.pi)"),
    "umask": ("import os; os.umask(0o777)", "import os; print(oct(os.umask(0o022)))"),
    "time-out of sockets": ("import socket; socket.setdefaulttimeout(0.001)",
                            "import socket; print(socket.getdefaulttimeout())"),
    "time zone": ("import os, time; os.environ['TZ'] = 'Asia/Tokyo'; time.tzset()", "import time; print(time.tzname)"),
    "logging": ("import logging; logging.disable(logging.CRITICAL)", "import logging; print(logging.root.manager.disable)"),
    "numpy's errors": ("import numpy; numpy.seterr(all='raise')", "import numpy; print(numpy.geterr())"),
    "numpy's prints": ("import numpy; numpy.set_printoptions(precision=1)", "import numpy; print(numpy.array([1 / 3]))"),
    "garbage collection": ("import gc; gc.disable(); gc.set_threshold(1)", "import gc; print(gc.isenabled(), gc.get_threshold())"),
    "recursion limit": ("import sys; sys.setrecursionlimit(5000)", "import sys; print(sys.getrecursionlimit())"),
    "signal handlers": ("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)",
                        "import signal; print(signal.getsignal(signal.SIGTERM))"),
    "locale": ("import locale; locale.setlocale(locale.LC_ALL, 'C')", "import locale; print(locale.setlocale(locale.LC_ALL))"),
    "a class of the standard library": ("import json; json.JSONEncoder.default = lambda s, o: 'x'",
                                        "import json\ntry: print(json.dumps(object()))\nexcept TypeError as e: print(e)"),
    "limits of the process": ("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))",
                              "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))"),
    "default encoding of json": ("import json; json._default_encoder.ensure_ascii = False", "import json; print(json.dumps('ü'))"),
}
TWICE = {  # what works once in a process
    "a metric": "import prometheus_client; print(prometheus_client.Counter('made_by_a_notebook', 'x')._name)",
    "a start method": "import multiprocessing; multiprocessing.set_start_method('spawn'); print('set')",
}
STEP = dict(queue="cpu", outputs=dict(value="str"), retries=0)


def notebook(path: Path, source: str, **about: object) -> Path:
    "A notebook with a parameters cell and one more."
    cells = [nbformat.v4.new_markdown_cell("# Step\nFor tests."),
             nbformat.v4.new_code_cell("n: int = 1  # any", metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell(source)]
    kernel = dict(name="python3", display_name="Python 3", language="python")
    nb = nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel) | (dict(myspinbot=about) if about else {}))
    nbformat.write(nb, path)
    return path


def printed(r: RunRecord) -> str:
    if r.error: raise r.error
    cells = nbformat.reads(r.document.decode(), 4).cells
    return "".join(o.text for c in cells if c.cell_type == "code" for o in c.outputs if o.output_type == "stream")


@pytest.fixture(scope="module")
def pool() -> Iterator[KernelPool]:
    with KernelPool() as p: yield p


@pytest.fixture
def shown(pool: KernelPool, tmp_path: Path) -> Callable[..., str]:
    "What a notebook prints."
    def go(source: str, **kw: object) -> str:
        kw = dict(pool=pool, cwd=tmp_path) | kw
        return printed(run_notebook(notebook(tmp_path / "nb.ipynb", source), None, **kw))
    return go


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_notebook_changes_no_other_one_sees(shown, what: str):
    change, show = CHANGES[what]
    imports = ["numpy"] if "numpy" in what else []
    before = shown(show, imports=imports)
    changed = shown(f"{change}\n{show}", imports=imports)
    assert changed != before, "the change shows in its own notebook"
    assert shown(show, imports=imports) == before


@pytest.mark.parametrize("what", TWICE)
def test_what_works_once_in_a_process_works_in_every_run(shown, what: str):
    assert shown(TWICE[what]) == shown(TWICE[what])


def test_step_after_a_step_that_changes_decimals_by_pipeline_run_and_the_cache_keeps_the_right_value(tmp_path: Path):
    (steps := tmp_path / "pipelines" / "steps").mkdir(parents=True)
    begin = "import decimal\nfrom myspinbot import Step\n"
    third = "Step('toy.third').output(value=str(decimal.Decimal(1) / 3))"
    notebook(steps / "toy_third.ipynb", begin + third, id="toy.third", **STEP)
    notebook(steps / "toy_spoil.ipynb", begin + "decimal.getcontext().prec = 3\nStep('toy.spoil').output(value='spoilt')",
             id="toy.spoil", **STEP)
    runner = LocalRunner(Catalogue(tmp_path / "pipelines"), tmp_path / "home", slots=1)
    spoil = tuple(Node(id=f"spoil{i}", step="toy.spoil", inputs=dict(n=i)) for i in range(4))
    graph = Graph(name="third", nodes=(*spoil, Node(id="third", step="toy.third", after=tuple(o.id for o in spoil))),
                  outputs=dict(value=PortRef(node="third", port="value")))
    try:
        for status in ("succeeded", "cached"):
            done = runner.run(graph, {})
            assert (done.job.status, done.rows["third"].status) == ("succeeded", status), done.job.error
            assert done.job.outputs == dict(value="0.3333333333333333333333333333")
        assert done.rows["third"].record["kernel"]["kind"] == "pristine"
    finally: runner.close()


# What kernels share

def test_imports_are_shared_and_what_cannot_be_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written = dict(
        spin_quiet="import json",
        spin_threads="import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        spin_prints="print('hello from the import')", spin_c_prints="import os; os.write(1, b'from C')",
        spin_sockets="import socket; s = socket.socket()", spin_numbers="import random; rng = random.Random()",
        spin_numpy_numbers="import numpy; rng = numpy.random.default_rng()", spin_raises="raise SystemExit(3)",
        spin_crashes="import os; os.abort()", spin_children="import subprocess; p = subprocess.Popen(['sleep', '60'])")
    for name, source in written.items(): (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    launcher = Launcher()
    try:
        parent = launcher.parent(["numpy", *written, "no_such_module"])
        assert parent.imports == ("numpy", "spin_quiet")
        assert launcher.refused == dict(
            spin_threads="its import starts threads (1)", spin_prints="its import prints", spin_c_prints="its import prints",
            spin_sockets="its import opens sockets", spin_numbers="it holds a generator of random numbers, spin_numbers.rng",
            spin_numpy_numbers="it holds a generator of random numbers, spin_numpy_numbers.rng",
            spin_raises="its import raised SystemExit", spin_crashes="its import ends the process",
            spin_children="its import starts processes", no_such_module="its import raised ModuleNotFoundError")
        [process] = [p for p in psutil.Process(launcher._process.pid).children() if p.is_running()]
        assert process.num_threads() == 1
        assert len([c for c in process.net_connections("all") if c.type]) <= 3, "the owner's and the two of its wake-up"
    finally: launcher.close()


def test_import_that_hangs_is_left_to_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "spin_hangs.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    launcher = Launcher()
    try:
        launcher.parent()
        assert launcher.parent(["wave", "spin_hangs"], timeout_s=1).imports == ("wave",)
        assert launcher.refused == dict(spin_hangs="its import takes over 1 s")
    finally: launcher.close()


def test_parent_whose_imports_changed_on_disk_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown):
    (tmp_path / "spin_installed.py").write_text("VALUE = 1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    show = "import spin_installed; print(spin_installed.VALUE)"
    with KernelPool() as pool:
        assert shown(show, imports=["spin_installed"], pool=pool) == "1\n"
        wait_for("spares", lambda: "spare=2" in repr(pool))
        (tmp_path / "spin_installed.py").write_text("VALUE = 222")
        assert shown(show, imports=["spin_installed"], pool=pool) == "222\n"


def test_kernels_of_one_parent_draw_different_random_numbers(shown):
    draw = ("import random, numpy, uuid, tempfile\n"
            "print(random.random(), numpy.random.rand(), uuid.uuid4(), next(tempfile._get_candidate_names()))")
    drawn = [shown(draw, imports=["random", "numpy", "uuid", "tempfile"]).split() for _ in range(4)]
    assert all(len(set(o)) == 4 for o in zip(*drawn, strict=True))


def test_numpy_computes_in_threads_after_a_fork(shown):
    many = "import numpy as np\na = np.ones((600, 600))\nprint((a @ a)[0, 0])"
    assert [shown(many, imports=["numpy"]) for _ in range(3)] == ["600.0\n"] * 3


def test_many_notebooks_at_once_each_get_their_own_kernel(pool: KernelPool, tmp_path: Path):
    path, seen = notebook(tmp_path / "nb.ipynb", "import os\nprint(n, os.getpid(), 'left' in dir(os))\nos.left = 1"), []
    def go(i: int) -> None: seen.append(printed(run_notebook(path, None, dict(n=i), pool=pool, cwd=tmp_path)).split())
    threads = [threading.Thread(target=go, args=(i,)) for i in range(12)]
    for t in threads: t.start()
    for t in threads: t.join(120)
    assert sorted(int(n) for n, _, _ in seen) == list(range(12))
    assert len({pid for _, pid, _ in seen}) == 12 and {left for _, _, left in seen} == {"False"}


# The end of a run

def test_file_that_a_step_did_not_close_is_whole_when_it_is_stored(tmp_path: Path):
    (steps := tmp_path / "pipelines" / "steps").mkdir(parents=True)
    source = ("from myspinbot import Step\nstep = Step('toy.open')\nf = open(step.path('long.json'), 'w')\n"
              "f.write('[' + '1, ' * 5000 + '1]')\nstep.output(value=step.path('long.json'))")
    notebook(steps / "toy_open.ipynb", source, id="toy.open", **STEP | dict(outputs=dict(value="application/json")))
    runner = LocalRunner(Catalogue(tmp_path / "pipelines"), tmp_path / "home", slots=1)
    graph = Graph(name="open", nodes=(Node(id="a", step="toy.open"),), outputs=dict(value=PortRef(node="a", port="value")))
    try:
        done = runner.run(graph, {})
        assert done.job.status == "succeeded", done.job.error
        assert done.job.outputs["value"].size == 15003
    finally: runner.close()


def test_exit_handlers_of_a_notebook_run_at_its_end(shown, tmp_path: Path):
    shown(f"import atexit; atexit.register(lambda: open({str(tmp_path / 'left')!r}, 'w').write('bye'))")
    wait_for("the handler", lambda: (tmp_path / "left").exists() and (tmp_path / "left").read_text() == "bye")
