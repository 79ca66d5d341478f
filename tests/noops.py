"""Steps that do nothing but say when: a notebook, and a plug-in package with a control step, for load tests and the bench."""
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import nbformat
import psutil
from farm import Farm
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from myspinbot.schema import Graph, Node, ParamRef, Port, PortRef

PLUG = '''"""A control step from a package of its own."""
import os
import time

from myspinbot.graph.catalogue import ControlContext, control_step

@control_step("noop.control", dict(value="int"))
async def control(ctx: ControlContext, value: int = 0) -> dict:
    "Nothing, from the cache if it can be."
    return dict(value=value + 1)

@control_step("noop.effect", dict(value="int"), cache=False)
async def effect(ctx: ControlContext, value: int = 0) -> dict:
    "Write down that it runs, where somebody wants to know."
    if where := os.environ.get("SPIN_WITNESS"):
        with open(where, "a") as f: f.write(f"{ctx.job} {ctx.key} {os.getpid()} {time.time():.6f}\\n")
    return dict(value=value + 1)
'''
PARAMETERS = 'job: str = ""   # whose step\nvalue: int = 0  # passed on, one larger'
STEP = 'import os, time\nbegan = time.time()\nfrom myspinbot import Step\nstep = Step("noop.notebook")'
SAY = '''if where := os.environ.get("SPIN_WITNESS"):
    with open(where, "a") as f: f.write(f"{job} {value} {os.getpid()} {began:.6f}\\n")
step.output(value=value + 1)'''


def write_pipelines(folder: Path) -> Path:
    "A pipelines folder with the notebook step `noop.notebook`."
    (folder / "steps").mkdir(parents=True)
    cells = [new_markdown_cell("# Nothing\nOne number in, the next one out."),
             new_code_cell(PARAMETERS, metadata=dict(tags=["parameters"])), new_code_cell(STEP), new_code_cell(SAY)]
    about = dict(id="noop.notebook", version="1", queue="cpu", outputs=dict(value="int"), cache=False)
    kernel = dict(name="python3", display_name="python3", language="python")
    nb = new_notebook(cells=cells, metadata=dict(myspinbot=about, kernelspec=kernel))
    nbformat.write(nb, folder / "steps" / "noop_notebook.ipynb")
    return folder


def write_plugin(folder: Path) -> Path:
    "An installed package, for PYTHONPATH, that offers `noop.control` as any other package would."
    about = folder / "spin_noops-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "spin_noops.py").write_text(PLUG)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: spin-noops\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[myspinbot.control]\nnoops = spin_noops\n")
    return folder


def with_plugin(env: Mapping[str, str], plugin: Path) -> dict[str, str]:
    "An environment whose processes find the plug-in."
    return {**env, "PYTHONPATH": os.pathsep.join([str(plugin), *filter(None, [env.get("PYTHONPATH")])])}


def chain(step: str, length: int, name: str = "chain") -> Graph:
    "A pipeline of no-op steps, each fed by the one before; its parameter is the first value."
    ref = lambda i: PortRef(node=f"n{i - 1}", port="value") if i else ParamRef(name="value")
    job = dict(job=ParamRef(name="job")) if step == "noop.notebook" else {}
    nodes = tuple(Node(id=f"n{i}", step=step, inputs=dict(value=ref(i)) | job) for i in range(length))
    params = (Port(name="value", type="int", default=0), Port(name="job", type="str", default=""))
    return Graph(name=name, params=params, nodes=nodes, outputs=dict(value=PortRef(node=f"n{length - 1}", port="value")))


@contextmanager
def installation(witness: bool = False) -> Iterator[Farm]:
    "An installation with servers of its own and the product's default settings; its processes know both steps."
    from myspinbot.core import Settings
    from myspinbot.embedded import Embedded
    with tempfile.TemporaryDirectory(prefix="spin") as name:
        folder, default = Path(name), Settings.model_fields
        servers, farm = Embedded(folder / "servers"), None
        try:
            urls = servers.start()
            add_plugin(folder / "plugin")
            farm = Farm(folder / "farm", urls.redis_url, urls.postgres_url, write_pipelines(folder / "pipelines"),
                        lease_s=default["lease_s"].default)
            farm.env = with_plugin(farm.env, folder / "plugin") | dict(SPIN_SCAN_S=str(default["scan_s"].default))
            if not witness: del farm.env["SPIN_WITNESS"]
            yield farm
        finally:
            if farm: farm.close()
            servers.stop()


def add_plugin(folder: Path) -> Path:
    "Let this process know the plug-in, too."
    sys.path.insert(0, str(write_plugin(folder)))
    import_module("spin_noops")
    return folder


def memory_mb(pid: int) -> float:
    "Resident memory."
    return psutil.Process(pid).memory_info().rss / 2**20
